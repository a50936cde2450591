"""LoRA files of other programs with layer names of BFL, SGM or Wan, converted with the converters of
diffusers.

Every layer is converted separately to detect layers that a converter drops (several do so silently). Weights
that cannot be applied to layers of a denoiser raise an error with their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor

from scalewise.common.errors import first_line
from scalewise.models import lora_keys

_TEXT = re.compile(r"^(lora_te\d?_|text_encoders?[._]|text_encoder_\d\.|te\d?\.)")
_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_w"),
    "LoKr": re.compile(r"\.lokr_w"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
}
_FLUX = re.compile(r"(double|single)_blocks[._]\d")
_FLUX_OUTER = re.compile(
    r"^((img|txt)_in|(time|vector|guidance)_in[._](in|out)_layer|final_layer[._](linear|adaLN_modulation[._]1))$"
)
_XLABS = re.compile(r"double_blocks\.\d+\.processor\.")
_SGM = re.compile(r"(input_blocks|middle_block|output_blocks)[._]\d")
_SGM_OUTER = re.compile(r"^(time_embed|label_emb|out)[._]\d")
_SD3 = re.compile(r"joint_blocks[._]\d")
_WAN = re.compile(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]\w")
_WAN_FLAT = (  # kohya names (with underscores) to names of the original Wan code (with dots)
    (re.compile(r"^blocks_(\d+)_(self_attn|cross_attn)_(q|k|v|o|k_img|v_img)$"), r"blocks.\1.\2.\3"),
    (re.compile(r"^blocks_(\d+)_ffn_([02])$"), r"blocks.\1.ffn.\2"),
    (re.compile(r"^(text_embedding|time_embedding|time_projection)_(\d)$"), r"\1.\2"),
    (re.compile(r"^head_head$"), "head.head"),
    (re.compile(r"^img_emb_proj_(\d)$"), r"img_emb.proj.\1"),
)
_PREFIX = re.compile(r"^(lora_(unet|transformer)_|diffusion_model\.|model\.diffusion_model\.)")
_SDXL = SimpleNamespace(layers_per_block=2)  # of the published UNet; block numbers of SGM depend on it


class ForeignError(ValueError):
    """A LoRA file with weights that cannot be applied; the message contains their names."""


def convert(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return weights under internal names and alphas by layer, like `lora_keys.read_names`.

    Raises ForeignError for weights of text encoders, DoRA and other adapter types, differences of full
    weights (`.diff`, except for the head of Wan), and layers that no converter supports.
    """
    _check_supported(raw)
    if any(_XLABS.search(name) for name in raw):
        raw = converters._convert_xlabs_flux_lora_to_diffusers(dict(raw))
    tensors, alphas = lora_keys.read_names(_without_zeros(raw))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer = lora_keys.layer_of(name)
        layers.setdefault(layer, {})[name.removeprefix(layer)] = value
    if strange := sorted(layer for layer in layers if _SD3.search(layer)):
        raise ForeignError(
            f"has layer names of the original SD3 code ({strange[0]}), which neither diffusers nor scalewise "
            "supports; convert it to names of diffusers"
        )
    if outer := sorted(layer for layer in layers if _FLUX_OUTER.search(layer)):
        raise ForeignError(
            f"contains FLUX layers outside the blocks ({', '.join(outer)}) under BFL or kohya names, which "
            "are not supported (diffusers ignores them); train without these layers, or remove them from "
            "the file"
        )
    is_wan = any(_WAN.search(layer) for layer in layers)
    is_sgm = any(_SGM.search(layer) for layer in layers)
    found: dict[str, Tensor] = {}
    out_alphas: dict[str, float] = {}
    for layer, own in sorted(layers.items()):
        needs_converter = (
            _FLUX.search(layer)
            or _SGM.search(layer)
            or (is_sgm and _SGM_OUTER.search(layer))
            or (is_wan and not lora_keys.is_diffusers_wan(layer))
        )
        if "" not in own and needs_converter:
            own = _lora_of_head(layer, own)
            converted = _convert_layer(layer, own, is_wan=is_wan)
        else:
            converted = {layer: own}
        for path, parts in converted.items():
            found |= {path + part: value for part, value in parts.items()}
            if layer in alphas:
                out_alphas[path] = alphas[layer]
    if whole := sorted(name for name in found if name.endswith(".diff")):
        raise ForeignError(
            f"contains differences of full weights for {len(whole)} layers, for example {whole[0]}, which "
            "are not supported (diffusers ignores them); use a LoRA without them"
        )
    return found, out_alphas


def _check_supported(raw: Mapping[str, Tensor]) -> None:
    text = sorted(name for name in raw if _TEXT.match(name))
    if text:
        raise ForeignError(
            f"contains weights for text encoders ({len(text)} of {len(raw)}, for example {text[0]}), but "
            "only weights for the denoiser are supported; fuse the file into the base with diffusers "
            "(load_lora_weights, fuse_lora, save_pretrained) and use that base"
        )
    for kind, pattern in _KINDS.items():
        if some := sorted(name for name in raw if pattern.search(name)):
            raise ForeignError(
                f"is a {kind} ({len(some)} weights such as {some[0]}), which is not supported; fuse it into "
                "the base with the program that created it"
            )


def _without_zeros(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove differences that are zero, which some trainers write for norms."""
    return {n: v for n, v in raw.items() if not n.endswith((".diff", ".diff_b")) or bool(v.any())}


def _lora_of_head(layer: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a weight difference of the last layer of Wan to a LoRA of full rank, as diffusers does."""
    if layer.endswith(("head.head", "head_head")) and ".diff" in own and ".lora_A.weight" not in own:
        diff = own[".diff"]
        rest = {part: value for part, value in own.items() if part != ".diff"}
        return {**rest, ".lora_A.weight": diff, ".lora_B.weight": torch.eye(len(diff)).to(diff)}
    return own


def _convert_layer(layer: str, own: Mapping[str, Tensor], *, is_wan: bool) -> dict[str, dict[str, Tensor]]:
    """Convert one layer to weights by layer path in diffusers; a fused layer becomes several."""
    a, b = own.get(".lora_A.weight"), own.get(".lora_B.weight")
    if (a is None) != (b is None):
        return {layer: dict(own)}  # rejected later by check_pairs
    if a is None or b is None:  # a bias difference only: an empty LoRA gives its path
        a, b = torch.zeros(1, 1), torch.zeros(len(next(iter(own.values()))), 1)
    try:
        pairs = _convert_matrices(layer, a, b, is_wan=is_wan)
    except (ValueError, KeyError, AssertionError, IndexError, RuntimeError) as error:
        reason = first_line(error) if str(error) else "the rows of its second matrix cannot be split"
        raise ForeignError(
            f"has a layer {layer} that the converter of diffusers cannot read: {reason} (its matrices are "
            f"{_shape(a)} and {_shape(b)}); download the file again, or use one for this model"
        ) from error
    pairs = {name.partition(".")[2]: value for name, value in pairs.items()}
    paths = [name.removesuffix(".lora_A.weight") for name in pairs if name.endswith(".lora_A.weight")]
    if not paths:
        raise ForeignError(f"has a layer {layer} that diffusers ignores; use a LoRA without it")
    rows = [len(pairs[f"{path}.lora_B.weight"]) for path in paths]
    out = {path: {f".lora_{h}.weight": pairs[f"{path}.lora_{h}.weight"] for h in "AB"} for path in paths}
    if ".lora_A.weight" not in own:
        out = {path: {} for path in paths}
    for part in (".lora_B.bias", ".diff_b"):
        if part in own:
            if len(own[part]) != sum(rows):
                raise ForeignError(
                    f"has a layer {layer} whose bias of {_shape(own[part])} does not match its {sum(rows)} "
                    "rows; download the file again"
                )
            for path, value in zip(paths, own[part].split(rows), strict=True):
                out[path][part] = value
    if ".diff" in own:
        out[paths[0]][".diff"] = own[".diff"]
    return out


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _convert_matrices(layer: str, a: Tensor, b: Tensor, *, is_wan: bool) -> dict[str, Tensor]:
    """Convert A [R, in] and B [out, R] of one layer to diffusers names with the converter of diffusers."""
    name = _PREFIX.sub("", layer)
    if _FLUX.search(layer):
        flat = f"lora_unet_{name.replace('.', '_')}"
        return dict(converters._convert_kohya_flux_lora_to_diffusers(
            {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}))  # fmt: skip
    if _SGM.search(layer) or _SGM_OUTER.search(layer):
        flat = f"lora_unet_{name.replace('.', '_')}"
        pair = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        pair = converters._maybe_map_sgm_blocks_to_diffusers(pair, _SDXL)
        named, _ = converters._convert_non_diffusers_lora_to_diffusers(pair)
        return {k.replace(".processor.", "."): v for k, v in convert_unet_state_dict_to_peft(named).items()}
    assert is_wan
    for pattern, path in _WAN_FLAT:
        name = pattern.sub(path, name)
    # The converter fails without blocks, so one is added for layers outside the blocks.
    one = {f"diffusion_model.{name}.lora_{h}.weight": v for h, v in (("A", a), ("B", b))}
    block = {} if name.startswith("blocks.") else {"diffusion_model.blocks.0.none.diff": torch.zeros(1)}
    return dict(converters._convert_non_diffusers_wan_lora_to_diffusers({**one, **block}))

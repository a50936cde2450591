"""LoRA files of other programs: BFL's, SGM's and Wan's layer names, read by diffusers' own converters.

Every layer is converted by itself, so that a converter that leaves a layer out (several do, silently) is
noticed. What cannot be applied to a denoiser's layers is refused by name.
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
_WAN_FLAT = (  # underscores of kohya's names that are dots in those of Wan's authors
    (re.compile(r"^blocks_(\d+)_(self_attn|cross_attn)_(q|k|v|o|k_img|v_img)$"), r"blocks.\1.\2.\3"),
    (re.compile(r"^blocks_(\d+)_ffn_([02])$"), r"blocks.\1.ffn.\2"),
    (re.compile(r"^(text_embedding|time_embedding|time_projection)_(\d)$"), r"\1.\2"),
    (re.compile(r"^head_head$"), "head.head"),
    (re.compile(r"^img_emb_proj_(\d)$"), r"img_emb.proj.\1"),
)
_PREFIX = re.compile(r"^(lora_(unet|transformer)_|diffusion_model\.|model\.diffusion_model\.)")
_SDXL = SimpleNamespace(layers_per_block=2)  # of the published UNet; SGM's block numbers count by it


class ForeignError(ValueError):
    """A LoRA file whose contents cannot be applied; the message names them."""


def convert(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Give the weights of a file inner names, and the alphas of layers, as `keys.read_names` does.

    Raises ForeignError for weights of text encoders, for DoRA and other kinds of adapters, for differences of
    whole weights (`.diff`) except that of Wan's head, and for layers that no converter knows.
    """
    _refuse(raw)
    if any(_XLABS.search(name) for name in raw):
        raw = converters._convert_xlabs_flux_lora_to_diffusers(dict(raw))
    tensors, alphas = lora_keys.read_names(_without_zeros(raw))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer = lora_keys.layer_of(name)
        layers.setdefault(layer, {})[name.removeprefix(layer)] = value
    if strange := sorted(layer for layer in layers if _SD3.search(layer)):
        raise ForeignError(
            f"names layers as SD3's authors do ({strange[0]}), which neither diffusers nor scalewise reads; "
            "convert it to diffusers' names first"
        )
    if outer := sorted(layer for layer in layers if _FLUX_OUTER.search(layer)):
        raise ForeignError(
            f"holds FLUX layers outside the blocks ({', '.join(outer)}) under the authors' or kohya's names, "
            "which are not supported and which diffusers leaves out; train without these layers, or remove "
            "them from the file"
        )
    is_wan = any(_WAN.search(layer) for layer in layers)
    is_sgm = any(_SGM.search(layer) for layer in layers)
    found: dict[str, Tensor] = {}
    out_alphas: dict[str, float] = {}
    for layer, own in sorted(layers.items()):
        by_authors = (
            _FLUX.search(layer)
            or _SGM.search(layer)
            or (is_sgm and _SGM_OUTER.search(layer))
            or (is_wan and not lora_keys.is_diffusers_wan(layer))
        )
        if "" not in own and by_authors:
            own = _lora_of_head(layer, own)
            placed = _placed(layer, own, is_wan=is_wan)
        else:
            placed = {layer: own}
        for path, parts in placed.items():
            found |= {path + part: value for part, value in parts.items()}
            if layer in alphas:
                out_alphas[path] = alphas[layer]
    if whole := sorted(name for name in found if name.endswith(".diff")):
        raise ForeignError(
            f"holds differences of whole weights for {len(whole)} layers, for example {whole[0]}, which "
            "are not supported; diffusers leaves them out"
        )
    return found, out_alphas


def _refuse(raw: Mapping[str, Tensor]) -> None:
    text = sorted(name for name in raw if _TEXT.match(name))
    if text:
        raise ForeignError(
            f"holds weights for text encoders ({len(text)} of {len(raw)}, for example {text[0]}), and only a "
            "denoiser's are applied; bring the file into the base with diffusers (load_lora_weights, "
            "fuse_lora, save_pretrained) and use that base"
        )
    for kind, pattern in _KINDS.items():
        if some := sorted(name for name in raw if pattern.search(name)):
            raise ForeignError(
                f"is a {kind} ({len(some)} weights such as {some[0]}), which is not supported; bring it into "
                "the base with the program that made it"
            )


def _without_zeros(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out differences that are zero, which trainers write for norms: they change nothing."""
    return {n: v for n, v in raw.items() if not n.endswith((".diff", ".diff_b")) or bool(v.any())}


def _lora_of_head(layer: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a difference of Wan's last layer as a LoRA of full rank, as diffusers does."""
    if layer.endswith(("head.head", "head_head")) and ".diff" in own and ".lora_A.weight" not in own:
        diff = own[".diff"]
        rest = {part: value for part, value in own.items() if part != ".diff"}
        return {**rest, ".lora_A.weight": diff, ".lora_B.weight": torch.eye(len(diff)).to(diff)}
    return own


def _placed(layer: str, own: Mapping[str, Tensor], *, is_wan: bool) -> dict[str, dict[str, Tensor]]:
    """Convert one layer: its parts by the path that they have in diffusers; fused layers become several."""
    a, b = own.get(".lora_A.weight"), own.get(".lora_B.weight")
    if (a is None) != (b is None):
        return {layer: dict(own)}  # refused with all others that lack a half
    if a is None or b is None:  # a difference alone: a LoRA of nothing finds its place
        a, b = torch.zeros(1, 1), torch.zeros(len(next(iter(own.values()))), 1)
    try:
        pairs = _pairs(layer, a, b, is_wan=is_wan)
    except (ValueError, KeyError, AssertionError, IndexError, RuntimeError) as error:
        reason = first_line(error) if str(error) else "the rows of its second matrix do not split"
        raise ForeignError(
            f"has a layer {layer} that diffusers' converter does not read: {reason} (its matrices are "
            f"{_shape(a)} and {_shape(b)}); fetch the file again, or one made for this model"
        ) from error
    pairs = {name.partition(".")[2]: value for name, value in pairs.items()}
    paths = [name.removesuffix(".lora_A.weight") for name in pairs if name.endswith(".lora_A.weight")]
    if not paths:
        raise ForeignError(f"has a layer {layer} that diffusers does not read, and would leave out")
    rows = [len(pairs[f"{path}.lora_B.weight"]) for path in paths]
    out = {path: {f".lora_{h}.weight": pairs[f"{path}.lora_{h}.weight"] for h in "AB"} for path in paths}
    if ".lora_A.weight" not in own:
        out = {path: {} for path in paths}
    for part in (".lora_B.bias", ".diff_b"):
        if part in own:
            if len(own[part]) != sum(rows):
                raise ForeignError(
                    f"has a layer {layer} whose bias of {_shape(own[part])} does not fit its {sum(rows)} "
                    "rows; fetch the file again"
                )
            for path, value in zip(paths, own[part].split(rows), strict=True):
                out[path][part] = value
    if ".diff" in own:
        out[paths[0]][".diff"] = own[".diff"]
    return out


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _pairs(layer: str, a: Tensor, b: Tensor, *, is_wan: bool) -> dict[str, Tensor]:
    """A and B of one layer under diffusers' names, by the converter of its family."""
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
    # The converter looks for blocks, also where the layer is none.
    one = {f"diffusion_model.{name}.lora_{h}.weight": v for h, v in (("A", a), ("B", b))}
    block = {} if name.startswith("blocks.") else {"diffusion_model.blocks.0.none.diff": torch.zeros(1)}
    return dict(converters._convert_non_diffusers_wan_lora_to_diffusers({**one, **block}))

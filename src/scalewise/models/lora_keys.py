"""Names of LoRA weights in the key formats of PEFT, diffusers and kohya, and the internal names.

An internal name is <path of the layer>.lora_A.weight or .lora_B.weight; the layer computes with
W + alpha / rank B A. Names of kohya contain the path with underscores, which can only be resolved with the
layers of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

Form = Literal["diffusers", "peft", "kohya"]
FORMS: tuple[Form, ...] = ("diffusers", "peft", "kohya")

_PEFT = "base_model.model."
# Layer names of the original Wan code, which ComfyUI uses too.
_WAN = re.compile(r"^blocks\.\d+\.(attn[12]|ffn)\.")
_WAN_AUTHORS = re.compile(r"\.(self_attn\.|cross_attn\.|ffn\.\d)")
_WAN_NAMES = (
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_out.0", ".o"), (".to_q", ".q"),
    (".to_k", ".k"), (".to_v", ".v"), (".net.0.proj", ".0"), (".net.2", ".2"),
)  # fmt: skip
_ALPHA = re.compile(r"^(?P<path>.+)\.alpha$")
_PARTS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$"), ".lora_A.weight"),  # PEFT may insert the name of the adapter
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), ".lora_B.weight"),
    (re.compile(r"[._]lora[._]down\.weight$"), ".lora_A.weight"),
    (re.compile(r"[._]lora[._]up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_B(\.\w+)?\.bias$|[._]lora[._]up\.bias$"), ".lora_B.bias"),
)
# Old names of diffusers: attention layers belong to the processor, and to_out is a list.
_PROCESSOR = re.compile(r"\.(?:processor\.)?(to_[qkv]|to_out|add_[qkv]_proj|to_add_out)_lora(?=\.|$)")
_ENDING = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|diff|diff_b)$")
_PREFIX = re.compile(r"^((transformer|unet|(model\.)?diffusion_model)\.|lora_(unet|transformer)_)")


def read_form(text: str) -> Form:
    """Return a key format by name; raise ValueError if it is unknown."""
    for form in FORMS:
        if text == form:
            return form
    raise ValueError(f"{text!r} is not a key format of LoRA files; use one of {', '.join(FORMS)}.")


def read_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return weights under internal names, and alphas by layer, from the tensors of a file.

    Layers of kohya keep their underscores; `match_layers` resolves them. In addition to its two matrices, a
    layer may have `.lora_B.bias` (scaled with alpha / rank and added to the bias), `.diff_b` (added to the
    bias) and `.diff` (added to the weight). Other tensors keep their names for error messages.
    """
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        if alpha := _ALPHA.match(name):
            alphas[_internal_name(alpha["path"])] = float(value)
        else:
            weights[_internal_name(name)] = value
    return weights, alphas


def _internal_name(name: str) -> str:
    name = _PREFIX.sub("", name.removeprefix(_PEFT))
    name = _PROCESSOR.sub(lambda found: f".{found[1]}{'.0' if found[1] == 'to_out' else ''}._lora", name)
    name = name.replace("._lora", ".lora")
    for pattern, ending in _PARTS:
        name = pattern.sub(ending, name)
    return name


def layer_of(name: str) -> str:
    """Return the layer of an internal name; a name that is not of a LoRA is returned unchanged."""
    return _ENDING.sub("", name)


def is_diffusers_wan(layer: str) -> bool:
    """Return whether the name of a layer of Wan is its path in diffusers."""
    return bool(_WAN.match(layer) and not _WAN_AUTHORS.search(f".{layer}")) or layer.startswith(
        ("condition_embedder.", "proj_out")
    )


def is_path(name: str) -> bool:
    """Return whether the layer of a weight is a path in diffusers (no underscores, no original names)."""
    layer = layer_of(name)
    return "." in layer and not _WAN_AUTHORS.search(layer)


def original_path(path: str) -> str:
    """Return the path of a layer in the original code of Wan, which ComfyUI uses; others are unchanged."""
    if _WAN.match(path):
        for ours, theirs in _WAN_NAMES:
            path = path.replace(ours, theirs)
    return path


def match_layers(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """Rename weights with underscored or original layer names to the paths of the layers of a model.

    Other weights keep their names.
    """
    paths: dict[str, str] = {}
    for path in layers:
        theirs = original_path(path)
        paths |= {theirs: path, theirs.replace(".", "_"): path, path.replace(".", "_"): path}
    out = {}
    for name, value in tensors.items():
        layer = layer_of(name)
        out[paths.get(layer, layer) + name.removeprefix(layer)] = value
    return out


def write_names(
    tensors: Mapping[str, Tensor], form: Form, *, denoiser: str, alpha: Tensor
) -> dict[str, Tensor]:
    """Rename weights (A [R, in], B [out, R], biases [out]) from internal names to a key format.

    `denoiser`: its name in the pipeline. `alpha`: a scalar tensor [] that kohya files store for every layer.
    """
    if form == "peft":
        return {_PEFT + name: value for name, value in tensors.items()}
    if form == "diffusers":
        return {f"{denoiser}.{name}": value for name, value in tensors.items()}
    out = {}
    for name, value in tensors.items():
        path = layer_of(name)
        theirs = original_path(path)
        prefix = denoiser if theirs == path else "unet"  # kohya uses this name for every denoiser
        layer = f"lora_{prefix}_{theirs.replace('.', '_')}"
        if name.endswith(".bias"):  # not scaled in kohya files; files with biases have alpha = rank
            out[f"{layer}.diff_b"] = value
            continue
        out[f"{layer}.{'lora_down' if name.endswith('.lora_A.weight') else 'lora_up'}.weight"] = value
        out[f"{layer}.alpha"] = alpha.clone()
    return out

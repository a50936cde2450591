"""Names of LoRA weights in files: PEFT's, diffusers' and kohya's, and the one that is used inside.

Inside, a weight is called <path of the layer>.lora_A.weight or .lora_B.weight; the layer then computes with
W + alpha / rank B A. kohya's names hold the path with underscores, which only the model itself can undo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

Form = Literal["diffusers", "peft", "kohya"]
FORMS: tuple[Form, ...] = ("diffusers", "peft", "kohya")

_PEFT = "base_model.model."
# Wan's layers as its authors' code names them, and after them ComfyUI.
_WAN = re.compile(r"^blocks\.\d+\.(attn[12]|ffn)\.")
_WAN_AUTHORS = re.compile(r"\.(self_attn\.|cross_attn\.|ffn\.\d)")
_WAN_NAMES = (
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_out.0", ".o"), (".to_q", ".q"),
    (".to_k", ".k"), (".to_v", ".v"), (".net.0.proj", ".0"), (".net.2", ".2"),
)  # fmt: skip
_ALPHA = re.compile(r"^(?P<path>.+)\.alpha$")
_PARTS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$"), ".lora_A.weight"),  # PEFT may name the adapter in between
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), ".lora_B.weight"),
    (re.compile(r"[._]lora[._]down\.weight$"), ".lora_A.weight"),
    (re.compile(r"[._]lora[._]up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_B(\.\w+)?\.bias$|[._]lora[._]up\.bias$"), ".lora_B.bias"),
)
# Attention of diffusers' old form: its layers are the processor's, and the last one is that of a list.
_PROCESSOR = re.compile(r"\.(?:processor\.)?(to_[qkv]|to_out|add_[qkv]_proj|to_add_out)_lora(?=\.|$)")
_ENDING = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|diff|diff_b)$")
_PREFIX = re.compile(r"^((transformer|unet|(model\.)?diffusion_model)\.|lora_(unet|transformer)_)")


def read_form(text: str) -> Form:
    """Read a convention's name; ValueError with those there are."""
    for form in FORMS:
        if text == form:
            return form
    raise ValueError(f"There is no form {text!r} of LoRA names; write one of {', '.join(FORMS)}.")


def read_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights under the inner names, and the alphas that the file gives, by layer.

    kohya's layers keep their underscores; `match_layers` finds their paths. Beside the two matrices a layer
    may have `.lora_B.bias` (alpha / rank times it is added to the bias), `.diff_b` (added as it is) and
    `.diff` (added to the weight). Weights of no LoRA keep their names, so that whoever uses them can say what
    was not expected.
    """
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        if alpha := _ALPHA.match(name):
            alphas[_plain(alpha["path"])] = float(value)
        else:
            weights[_plain(name)] = value
    return weights, alphas


def _plain(name: str) -> str:
    name = _PREFIX.sub("", name.removeprefix(_PEFT))
    name = _PROCESSOR.sub(lambda found: f".{found[1]}{'.0' if found[1] == 'to_out' else ''}._lora", name)
    name = name.replace("._lora", ".lora")
    for pattern, ending in _PARTS:
        name = pattern.sub(ending, name)
    return name


def layer_of(name: str) -> str:
    """Layer of a weight under its inner name; the name itself if it is of no LoRA."""
    return _ENDING.sub("", name)


def is_diffusers_wan(layer: str) -> bool:
    """Whether a layer of Wan is named by its path in diffusers."""
    return bool(_WAN.match(layer) and not _WAN_AUTHORS.search(f".{layer}")) or layer.startswith(
        ("condition_embedder.", "proj_out")
    )


def is_path(name: str) -> bool:
    """Whether a weight's layer is named by its path in diffusers, not with underscores or by the authors."""
    layer = layer_of(name)
    return "." in layer and not _WAN_AUTHORS.search(layer)


def authors_path(path: str) -> str:
    """Path of a layer in the code of the model's authors, where ComfyUI goes by that: so far Wan's."""
    if _WAN.match(path):
        for ours, theirs in _WAN_NAMES:
            path = path.replace(ours, theirs)
    return path


def match_layers(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """Give weights with underscored or the authors' layer names the paths of a model's layers.

    Others stay as they are.
    """
    paths: dict[str, str] = {}
    for path in layers:
        theirs = authors_path(path)
        paths |= {theirs: path, theirs.replace(".", "_"): path, path.replace(".", "_"): path}
    out = {}
    for name, value in tensors.items():
        layer = layer_of(name)
        out[paths.get(layer, layer) + name.removeprefix(layer)] = value
    return out


def write_names(
    tensors: Mapping[str, Tensor], form: Form, *, denoiser: str, alpha: Tensor
) -> dict[str, Tensor]:
    """Weights under a convention's names; `denoiser` is its name in the pipeline, `alpha` is for kohya's."""
    if form == "peft":
        return {_PEFT + name: value for name, value in tensors.items()}
    if form == "diffusers":
        return {f"{denoiser}.{name}": value for name, value in tensors.items()}
    out = {}
    for name, value in tensors.items():
        path = layer_of(name)
        theirs = authors_path(path)
        prefix = denoiser if theirs == path else "unet"  # kohya calls every denoiser so
        layer = f"lora_{prefix}_{theirs.replace('.', '_')}"
        if name.endswith(".bias"):  # kohya adds it as it is; files with biases have alpha = rank
            out[f"{layer}.diff_b"] = value
            continue
        out[f"{layer}.{'lora_down' if name.endswith('.lora_A.weight') else 'lora_up'}.weight"] = value
        out[f"{layer}.alpha"] = alpha.clone()
    return out

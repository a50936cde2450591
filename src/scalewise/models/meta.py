"""A model without weights: real classes on the meta device, from the configuration alone.

Configurations of the models that have recipes come along (known/*.json); others are read from their folder.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalewise.common.errors import ModelError
from scalewise.models import SD3, check_family, family_named
from scalewise.models.folder import (
    ALL_PARTS,
    diffusers_class,
    model_index,
    refuse_quantized,
    tokens_read,
    variants_of,
    with_defaults,
)
from scalewise.models.loading import check_vae, find_autoencoder, vae_class_of
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.models.schedulers import refuse_inverted

FOLDER = Path(__file__).parent / "known"


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """Configurations by hub id: the pipeline's class and options, denoiser, VAE, text encoders, scheduler."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return {entry["base"]: entry for entry in found}


def configuration(base: str | Path) -> dict[str, Any]:
    """The configuration of a known hub id or of a folder in diffusers' layout."""
    if str(base) in known():
        return known()[str(base)]
    folder = Path(base)
    if not (folder / "model_index.json").exists():
        names = ", ".join(known())
        raise ModelError(
            f"The configuration of {base} is not known here; give its folder in diffusers' layout, or one of "
            f"{names}."
        )
    index = model_index(base)
    family = family_named(index.get("_class_name"), str(base))
    found, denoiser = family.components(base), family.denoiser_name
    texts = sorted(name for name in found if name.startswith("text_encoder"))
    configs = {name: _read(folder / name / "config.json") for name in (denoiser, "vae", *texts)}
    for name, values in configs.items():
        refuse_quantized(values, name, base)
    lengths = [_tokens_read(folder, name, found[name][1], configs[name]) for name in texts]
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    return {
        "base": str(base),
        "pipeline_class": index["_class_name"],
        "sequence": family.usual_sequence(found) or min(512, lengths[-1]),
        "clip_sequence": lengths[0],
        "denoiser": {"_class_name": diffusers_class(found, denoiser, base).__name__, **configs[denoiser]},
        "vae": {"_class_name": found["vae"][1], **configs["vae"]},
        "text": [[found[name][1], configs[name]] for name in texts],
        "scheduler": {"_class_name": found["scheduler"][1], **scheduler},
        "pipeline": {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)},
    }


def skeleton(
    base: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    variant: str | None = None,
    family: str | None = None,
) -> PipelineAdapter:
    """The adapter of a model whose denoiser has shapes and no numbers; VAE and text encoders are left out.

    What loading refuses before it reads weights is refused here too.
    """
    import diffusers

    if str(base) not in known() and (Path(base) / "model_index.json").exists():
        _check_files(base, variant, family=family)
    config = configuration(base)
    kind: Any = check_family(family_named(config["pipeline_class"], str(base)), family, base)
    refuse_inverted(config["scheduler"], base)
    with torch.device("meta"):
        denoiser = build(diffusers, config["denoiser"]["_class_name"], config["denoiser"])
    cast(denoiser, dtype)
    scheduler = getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"])
    options = inspect.signature(kind.pipeline_class.__init__).parameters
    parts: dict[str, Any] = {
        name: None for name, option in options.items() if name != "self" and option.default is option.empty
    }
    parts |= {"scheduler": scheduler, kind.denoiser_name: denoiser}
    parts |= {name: value for name, value in config["pipeline"].items() if name in options}
    pipeline = kind.pipeline_class(**parts)
    longest = max_sequence_length or config.get("sequence")
    vae = with_defaults(config["vae"], vae_class_of(config["vae"]))
    model: PipelineAdapter = kind(pipeline, denoiser.config, vae, base=str(base), max_sequence_length=longest)
    if isinstance(model, SD3):
        model.clip_length = config.get("clip_sequence", 77)
    return model.freeze()


def _check_files(base: str | Path, variant: str | None, *, family: str | None) -> None:
    """What loading refuses of a folder's files before it reads weights."""
    kind = check_family(family_named(model_index(base).get("_class_name"), str(base)), family, base)
    found = kind.components(base)
    variants = variants_of(base, found.keys(), variant)
    kind.check_files(base, found, ALL_PARTS, variants=variants, planned=True)


def build(library: Any, name: str, config: Mapping[str, Any]) -> Any:
    """A diffusers module from its configuration."""
    return getattr(library, name).from_config(config)


def cast(module: Any, dtype: torch.dtype) -> None:
    """Bring a skeleton to the type that loading gives it: some layers stay in float32, as their class says.

    transformers keeps `_keep_in_fp32_modules` for float16 alone, diffusers for both half precisions.
    """
    exact = [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16 or type(module).__module__.startswith("diffusers."):
        exact += module._keep_in_fp32_modules or ()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name.split(".") for part in exact):
            tensor.data = tensor.data.to(dtype)


def autoencoder(base: str | Path, *, dtype: torch.dtype = torch.float32, vae: str | None = None) -> Any:
    """The VAE of a model without numbers, in the type that the family loads it in.

    `vae`: the folder of another one. Raises ModelError where it holds no configuration.
    """
    import diffusers

    config = configuration(base)
    family: Any = family_named(config["pipeline_class"], str(base))
    own = with_defaults(config["vae"], vae_class_of(config["vae"]))
    if vae:
        other = _read(find_autoencoder(vae, weights=False))
        refuse_quantized(other, "autoencoder", vae)
        other = with_defaults(other, vae_class_of(other))
        check_vae(other, own, vae)
        own = other
    with torch.device("meta"):
        module = build(diffusers, own["_class_name"], own)
    cast(module, family.vae_dtype(own, dtype))
    return module.eval()


def text_encoders(base: str | Path, *, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The text encoders of a model without numbers."""
    import transformers

    found = []
    for name, values in configuration(base)["text"]:
        kind = getattr(transformers, name)
        with torch.device("meta"):
            found.append(kind(kind.config_class(**values)).eval())
        cast(found[-1], dtype)
    return found


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def _tokens_read(folder: Path, name: str, kind: str, config: Mapping[str, Any]) -> int:
    """Tokens that a text encoder of transformers reads, by its tokenizer's or its own configuration."""
    import transformers

    path = folder / name.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
    length = _read(path).get("model_max_length") if path.exists() else None
    return tokens_read(length, getattr(transformers, kind).config_class(**config))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path} ({error}); fetch the model again.") from error
    return dict(found)

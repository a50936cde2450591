"""Models on the meta device, without weights, built from their configuration.

Configurations of the models with recipes are in known/*.json; others are read from the folder of the model.
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
from scalewise.models import SD3, check_family, family_of_pipeline
from scalewise.models.folder import (
    ALL_PARTS,
    choose_variants,
    diffusers_class,
    max_tokens,
    model_index,
    refuse_quantized,
    with_defaults,
)
from scalewise.models.loading import check_vae, find_vae_config, vae_class
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.models.schedulers import refuse_inverted

FOLDER = Path(__file__).parent / "known"


@functools.cache
def known_configurations() -> dict[str, dict[str, Any]]:
    """Return configurations by hub id: pipeline, denoiser, VAE, text encoders, scheduler."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return {entry["base"]: entry for entry in found}


def read_configuration(base: str | Path) -> dict[str, Any]:
    """Return the configuration of a known hub id or of a folder; raise ModelError for others."""
    if str(base) in known_configurations():
        return known_configurations()[str(base)]
    folder = Path(base)
    if not (folder / "model_index.json").exists():
        names = ", ".join(known_configurations())
        raise ModelError(
            f"There is no configuration for {base}; use its folder in diffusers' layout, or one of {names}."
        )
    index = model_index(base)
    family = family_of_pipeline(index.get("_class_name"), str(base))
    found, denoiser = family.components(base), family.denoiser_name
    texts = sorted(name for name in found if name.startswith("text_encoder"))
    configs = {name: _read(folder / name / "config.json") for name in (denoiser, "vae", *texts)}
    for name, values in configs.items():
        refuse_quantized(values, name, base)
    lengths = [_max_tokens(folder, name, found[name][1], configs[name]) for name in texts]
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    return {
        "base": str(base),
        "pipeline_class": index["_class_name"],
        "sequence": family.sequence_length_for(found) or min(512, lengths[-1]),
        "clip_sequence": lengths[0],
        "denoiser": {"_class_name": diffusers_class(found, denoiser, base).__name__, **configs[denoiser]},
        "vae": {"_class_name": found["vae"][1], **configs["vae"]},
        "text": [[found[name][1], configs[name]] for name in texts],
        "scheduler": {"_class_name": found["scheduler"][1], **scheduler},
        "pipeline": {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)},
    }


def build_meta_model(
    base: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    variant: str | None = None,
    family: str | None = None,
) -> PipelineAdapter:
    """Build the adapter of a model with the denoiser on the meta device, without VAE and text encoders.

    Raises the same ModelErrors as loading does before it reads weights.
    """
    import diffusers

    if str(base) not in known_configurations() and (Path(base) / "model_index.json").exists():
        _check_files(base, variant, family=family)
    config = read_configuration(base)
    kind: Any = check_family(family_of_pipeline(config["pipeline_class"], str(base)), family, base)
    refuse_inverted(config["scheduler"], base)
    with torch.device("meta"):
        denoiser = build_module(diffusers, config["denoiser"]["_class_name"], config["denoiser"])
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
    vae = with_defaults(config["vae"], vae_class(config["vae"]))
    model: PipelineAdapter = kind(pipeline, denoiser.config, vae, base=str(base), max_sequence_length=longest)
    if isinstance(model, SD3):
        model.clip_length = config.get("clip_sequence", 77)
    return model.freeze()


def _check_files(base: str | Path, variant: str | None, *, family: str | None) -> None:
    """Check the files of a folder as loading does before it reads weights."""
    kind = check_family(family_of_pipeline(model_index(base).get("_class_name"), str(base)), family, base)
    found = kind.components(base)
    variants = choose_variants(base, found.keys(), variant)
    kind.check_files(base, found, ALL_PARTS, variants=variants, planned=True)


def build_module(library: Any, name: str, config: Mapping[str, Any]) -> Any:
    """Build a diffusers module from its configuration."""
    return getattr(library, name).from_config(config)


def cast(module: Any, dtype: torch.dtype) -> None:
    """Cast a module on the meta device to the dtypes that it has after loading; some layers stay in float32.

    transformers applies `_keep_in_fp32_modules` only for float16, diffusers for float16 and bfloat16.
    """
    keep_fp32 = [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16 or type(module).__module__.startswith("diffusers."):
        keep_fp32 += module._keep_in_fp32_modules or ()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name.split(".") for part in keep_fp32):
            tensor.data = tensor.data.to(dtype)


def build_vae(base: str | Path, *, dtype: torch.dtype = torch.float32, vae: str | None = None) -> Any:
    """Build the VAE of a model on the meta device, in the dtype that it is loaded in.

    `vae`: folder of another VAE. Raises ModelError if it has no configuration or does not fit the base.
    """
    import diffusers

    config = read_configuration(base)
    family: Any = family_of_pipeline(config["pipeline_class"], str(base))
    own = with_defaults(config["vae"], vae_class(config["vae"]))
    if vae:
        other = _read(find_vae_config(vae, weights=False))
        refuse_quantized(other, "VAE", vae)
        other = with_defaults(other, vae_class(other))
        check_vae(other, own, vae)
        own = other
    with torch.device("meta"):
        module = build_module(diffusers, own["_class_name"], own)
    cast(module, family.vae_dtype(own, dtype))
    return module.eval()


def build_text_encoders(base: str | Path, *, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Build the text encoders of a model on the meta device."""
    import transformers

    found = []
    for name, values in read_configuration(base)["text"]:
        kind = getattr(transformers, name)
        with torch.device("meta"):
            found.append(kind(kind.config_class(**values)).eval())
        cast(found[-1], dtype)
    return found


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def _max_tokens(folder: Path, name: str, kind: str, config: Mapping[str, Any]) -> int:
    """Return the maximum number of tokens of a text encoder from the configuration files."""
    import transformers

    path = folder / name.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
    length = _read(path).get("model_max_length") if path.exists() else None
    return max_tokens(length, getattr(transformers, kind).config_class(**config))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path} ({error}); download the model again.") from error
    return dict(found)

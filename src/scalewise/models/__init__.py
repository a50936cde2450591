"""The registry of model families: one line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from scalewise.errors import first_line
from scalewise.models.base import ALL_PARTS, Condition, ModelAdapter, ModelError, Part
from scalewise.models.flux import Flux
from scalewise.models.pipelined import PipelineAdapter
from scalewise.models.sd3 import SD3
from scalewise.models.sdxl import SDXL
from scalewise.models.wan import Wan

FAMILIES: dict[str, type[PipelineAdapter]] = {family.family: family for family in (SD3, Flux, SDXL, Wan)}

__all__ = [
    "ALL_PARTS",
    "FAMILIES",
    "SD3",
    "SDXL",
    "Condition",
    "Flux",
    "ModelAdapter",
    "ModelError",
    "Part",
    "PipelineAdapter",
    "Wan",
    "family_named",
    "family_of",
    "load_model",
]


def family_of(base: str | Path) -> type[PipelineAdapter]:
    """Find the family of a model folder or hub id by the pipeline class that its model_index.json names."""
    index = Path(base) / "model_index.json"
    if not index.exists():
        if Path(base).exists() or str(base).startswith((".", "/")):
            raise ModelError(
                f"{base} is no model folder: it has no model_index.json. Give a folder in diffusers' layout."
            )
        index = _from_hub(str(base))
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{index} does not describe a model ({error}); fetch the model again.") from error
    return family_named(name, str(base))


def family_named(pipeline_class: str, base: str) -> type[PipelineAdapter]:
    """The family of a pipeline class."""
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    known = ", ".join(n for f in FAMILIES.values() for n in f.pipeline_classes)
    raise ModelError(
        f"{base} is a {pipeline_class or 'model of no named class'}, which no family here handles; known are "
        f"{known}. A family is added by one file (CONTRIBUTING.md)."
    )


def load_model(
    base: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[Part] = ALL_PARTS,
    max_sequence_length: int | None = None,
    vae: str | Path | None = None,
) -> PipelineAdapter:
    """Load the parts of a model that are asked for, whatever its family."""
    return family_of(base).load(
        base, dtype=dtype, parts=parts, max_sequence_length=max_sequence_length, vae=vae
    )


def _from_hub(base: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, "model_index.json"))
    except Exception as error:
        raise ModelError(
            f"Cannot find the model {base!r}: it is no folder here, and the hub answered: "
            f"{first_line(error)} Give a folder in diffusers' layout, or log in if the model is gated."
        ) from error

"""The registry of model families: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scalewise.method.adapter import ALL_PARTS, Condition, ModelAdapter, ModelError, Part
from scalewise.models.flux import Flux
from scalewise.models.folder import model_index
from scalewise.models.pipeline_adapter import PipelineAdapter
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
    "check_family",
    "family_named",
    "family_of",
    "load_model",
]


def family_of(base: str | Path, wanted: str | None = None) -> type[PipelineAdapter]:
    """Find the family of a model folder or hub id by the pipeline class that its model_index.json names.

    ModelError for no family of here, and for another than the one `wanted` by a recipe (`model.family`).
    """
    name = model_index(base).get("_class_name")
    return check_family(family_named(name, str(base)), wanted, base)


def check_family(
    family: type[PipelineAdapter], wanted: str | None, base: str | Path
) -> type[PipelineAdapter]:
    """Refuse a base of another family than its recipe's."""
    if wanted is not None and wanted not in FAMILIES:
        raise ModelError(f"There is no family {wanted!r}; set model.family to one of {', '.join(FAMILIES)}.")
    if wanted in (None, family.family):
        return family
    raise ModelError(
        f"The recipe is for models of the family {wanted!r} (model.family), but {base} is a "
        f"{family.pipeline_classes[0]}, of the family {family.family!r}. Give a base of {wanted!r}, or a "
        f"recipe for {family.family!r}: `scalewise recipes` lists them."
    )


def family_named(pipeline_class: Any, base: str) -> type[PipelineAdapter]:
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
    variant: str | None = None,
    family: str | None = None,
) -> PipelineAdapter:
    """Load the parts of a model that are asked for; one of another `family`, if given, is refused."""
    return family_of(base, family).load(
        base, dtype=dtype, parts=parts, max_sequence_length=max_sequence_length, vae=vae, variant=variant
    )

"""The registry of model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalewise.common.errors import ModelError
from scalewise.method.adapter import Condition
from scalewise.models.flux import Flux
from scalewise.models.folder import ALL_PARTS, Part, model_index
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
    "ModelError",
    "Part",
    "PipelineAdapter",
    "Wan",
    "check_family",
    "family_of",
    "family_of_pipeline",
    "load_model",
]


def family_of(base: str | Path, wanted: str | None = None) -> type[PipelineAdapter]:
    """Return the family of a model folder or hub id, from the pipeline class in its model_index.json.

    Raises ModelError for an unsupported family, and for a family other than `wanted` (`model.family`).
    """
    name = model_index(base).get("_class_name")
    return check_family(family_of_pipeline(name, str(base)), wanted, base)


def check_family(
    family: type[PipelineAdapter], wanted: str | None, base: str | Path
) -> type[PipelineAdapter]:
    """Return `family`; raise ModelError if it is not the family `wanted` by a recipe (None = any)."""
    if wanted is not None and wanted not in FAMILIES:
        raise ModelError(
            f"model.family is {wanted!r}, which is not supported; set it to one of {', '.join(FAMILIES)}."
        )
    if wanted in (None, family.family):
        return family
    raise ModelError(
        f"The recipe is for the model family {wanted!r} (model.family), but {base} is a "
        f"{family.pipeline_class.__name__} of the family {family.family!r}. Use a base of the family "
        f"{wanted!r}, or a recipe for {family.family!r} (`scalewise recipes` lists the recipes)."
    )


def family_of_pipeline(pipeline_class: Any, base: str) -> type[PipelineAdapter]:
    """Return the family of a pipeline class; raise ModelError if it is not supported."""
    for family in FAMILIES.values():
        if pipeline_class == family.pipeline_class.__name__:
            return family
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES.values())
    raise ModelError(
        f"{base} is a {pipeline_class or 'model without a class name'}, which is not supported; supported "
        f"pipelines: {known}. CONTRIBUTING.md describes how to add a model family."
    )


def load_model(base: str | Path, *, family: str | None = None, **options: Any) -> PipelineAdapter:
    """Load a model with the options of `PipelineAdapter.load`; ModelError if it is not of `family`."""
    return family_of(base, family).load(base, **options)

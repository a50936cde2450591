"""The registry of model families: one line each."""

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
        f"{family.pipeline_class.__name__}, of the family {family.family!r}. Give a base of {wanted!r}, or a "
        f"recipe for {family.family!r}: `scalewise recipes` lists them."
    )


def family_named(pipeline_class: Any, base: str) -> type[PipelineAdapter]:
    """The family of a pipeline class."""
    for family in FAMILIES.values():
        if pipeline_class == family.pipeline_class.__name__:
            return family
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES.values())
    raise ModelError(
        f"{base} is a {pipeline_class or 'model of no named class'}, which no family here handles; known are "
        f"{known}. A family is added by one file (CONTRIBUTING.md)."
    )


def load_model(base: str | Path, *, family: str | None = None, **options: Any) -> PipelineAdapter:
    """Load a model, with the options of `PipelineAdapter.load`; one of another `family` is refused."""
    return family_of(base, family).load(base, **options)

"""diffusers pipelines that sample scale-wise, one for each family; `load` gives the one that fits a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scalewise import mini
from scalewise.common.errors import first_line
from scalewise.common.paths import expand_home
from scalewise.method.scales import ScaleSchedule
from scalewise.models import SD3, SDXL, Flux, PipelineAdapter, Wan, family_of
from scalewise.models.lora import StudentError, load_student
from scalewise.pipelines import checks
from scalewise.pipelines.scale_wise import (
    ADAPTER,
    ScaleWiseFluxPipeline,
    ScaleWisePipeline,
    ScaleWiseSD3Pipeline,
    ScaleWiseSDXLPipeline,
    ScaleWiseWanPipeline,
    stock_options,
)
from scalewise.pipelines.schedules import read_schedule

PIPELINES: dict[type[PipelineAdapter], type[ScaleWisePipeline]] = {
    SD3: ScaleWiseSD3Pipeline,
    Flux: ScaleWiseFluxPipeline,
    SDXL: ScaleWiseSDXLPipeline,
    Wan: ScaleWiseWanPipeline,
}

__all__ = ["ADAPTER", "PIPELINES", "ScaleWisePipeline", "load", "read_schedule"]


def load(
    base: str | Path = "mini",
    *,
    student: str | Path | None = "mini",
    schedule: str | ScaleSchedule | None = None,
    weight: float = 1.0,
    dtype: torch.dtype | str = torch.float32,
    **options: Any,
) -> Any:
    """Load a base with a student into the family's scale-wise pipeline.

    `base`: 'mini', a folder in diffusers' layout, or a hub id. `student`: a safetensors file, a run's or
    PEFT folder, a hub id, or None for the undistilled base. `schedule`: replaces, or stands in for, the one
    in the student's metadata: a ScaleSchedule, a recipe's name, or text such as "1000@64 896@80 737@96
    602@128". `weight`: of the student's adapter. `dtype`: torch.float32, torch.bfloat16 or torch.float16, or
    its name. `options` go to the adapter's `load`: `vae` (a tiny autoencoder's folder), `variant` (such as
    "fp16") and `max_sequence_length`.
    """
    checks.check_load_options(options, ("vae", "variant", "max_sequence_length"))
    dtype = checks.check_dtype(dtype)
    folder = mini.resolve(expand_home(str(base)), mini.TEACHER)
    family = family_of(folder)
    if mini.is_named(str(student)) and not mini.is_named(str(base)):
        raise StudentError(
            f"The student 'mini' is the mini's and does not fit {base}; name its own with student=..., or "
            "give student=None and a schedule for the undistilled base."
        )
    given = read_schedule(schedule) if schedule is not None else None
    found = (
        load_student(_local(mini.resolve(expand_home(str(student)), mini.STUDENT)), schedule=given)
        if student
        else None
    )
    if found is None and given is None:
        raise StudentError(
            f"Without a student {base} has no schedule; give one, as in schedule='sd35-medium-4'."
        )
    told = found.recipe.get("model", {}) if found else {}
    options = {"max_sequence_length": told.get("max_sequence_length")} | options
    if options.get("vae"):
        options["vae"] = expand_home(str(options["vae"]))
    model: Any = family.load(folder, dtype=dtype, **options)
    pipeline: Any = PIPELINES[family](**model.pipeline.components)
    pipeline.register_to_config(**stock_options(model.pipeline, pipeline))
    if found is None and given is not None:
        pipeline.set_schedule(given)
    pipeline.max_sequence_length = model.max_sequence_length
    pipeline.embedded_guidance = told.get("embedded_guidance")
    if found is not None:
        pipeline.set_student(found, weight=weight)
    return pipeline


def _local(student: str) -> str:
    """A student's place on this disk; what is neither file nor folder is taken for a hub id."""
    if Path(student).exists() or student.startswith((".", "/")) or student.count("/") != 1:
        return student
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(student, allow_patterns=["*.safetensors", "*adapter_config.json"])
    except Exception as error:
        raise StudentError(
            f"Cannot find the student {student!r}: it is no file here, and the hub answered: "
            f"{first_line(error)} Give a file, or log in if the repository is gated."
        ) from error
    files = sorted(Path(folder).rglob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(str(f.relative_to(folder)) for f in files) or "no .safetensors file"
        raise StudentError(f"{student} holds {names}; download the one you mean and give its path.")
    return str(files[0])

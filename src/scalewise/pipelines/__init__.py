"""Diffusers pipelines for scale-wise sampling, one per model family; `load` returns the one for a base."""

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
    """Load a base and a student into a pipeline for scale-wise sampling.

    `base`: 'mini', a folder in diffusers' layout, or a hub id. `student`: a safetensors file, the folder of a
    run or of PEFT, a hub id, or None for the base without a student. `schedule`: a ScaleSchedule, the name of
    a recipe, or text such as "1000@64 896@80 737@96 602@128", which replaces the schedule of the student.
    `weight`: LoRA scale of the student (1 = full). `dtype`: torch.float32, torch.bfloat16, torch.float16, or
    its name. `options`: `vae` (folder of another VAE), `variant` (such as "fp16") and `max_sequence_length`.
    """
    checks.check_load_options(options, ("vae", "variant", "max_sequence_length"))
    dtype = checks.check_dtype(dtype)
    folder = mini.resolve(expand_home(str(base)), mini.TEACHER)
    family = family_of(folder)
    if mini.is_named(str(student)) and not mini.is_named(str(base)):
        raise StudentError(
            f"The student 'mini' belongs to the base 'mini' and does not fit {base}; pass the student of "
            "this base as student=..., or student=None and a schedule for the base without a student."
        )
    given = read_schedule(schedule) if schedule is not None else None
    found = (
        load_student(_find_student(mini.resolve(expand_home(str(student)), mini.STUDENT)), schedule=given)
        if student
        else None
    )
    if found is None and given is None:
        raise StudentError(
            f"{base} has no schedule without a student; pass one, as in schedule='sd35-medium-4'."
        )
    trained_with = found.recipe.get("model", {}) if found else {}
    options = {"max_sequence_length": trained_with.get("max_sequence_length")} | options
    if options.get("vae"):
        options["vae"] = expand_home(str(options["vae"]))
    model: Any = family.load(folder, dtype=dtype, **options)
    pipeline: Any = PIPELINES[family](**model.pipeline.components)
    pipeline.register_to_config(**stock_options(model.pipeline, pipeline))
    if found is None and given is not None:
        pipeline.set_schedule(given)
    pipeline.max_sequence_length = model.max_sequence_length
    pipeline.embedded_guidance = trained_with.get("embedded_guidance")
    if found is not None:
        pipeline.set_student(found, weight=weight)
    return pipeline


def _find_student(student: str) -> str:
    """Return the path of a student; download it if it is a hub id."""
    if Path(student).exists() or student.startswith((".", "/")) or student.count("/") != 1:
        return student
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(student, allow_patterns=["*.safetensors", "*adapter_config.json"])
    except Exception as error:
        raise StudentError(
            f"Cannot find the student {student!r}: there is no such file, and the hub answered: "
            f"{first_line(error)} Use a file, or log in if the repository is gated."
        ) from error
    files = sorted(Path(folder).rglob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(str(f.relative_to(folder)) for f in files) or "no .safetensors file"
        raise StudentError(f"{student} contains {names}; download one student file and pass its path.")
    return str(files[0])

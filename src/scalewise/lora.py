"""A student on disk: LoRA weights under diffusers' key names, with schedule and recipe in the metadata."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalewise.recipe import Recipe
from scalewise.scales import ScaleSchedule

# What diffusers itself reads back when it loads the file with `pipeline.load_lora_weights`.
_DIFFUSERS_KEY = "lora_adapter_metadata"


class StudentError(ValueError):
    """A student file that cannot be used; the message says why and what would help."""


@dataclass(frozen=True)
class Student:
    """Weights by role-parameter name, and what is needed to sample with them."""

    tensors: dict[str, Tensor]
    schedule: ScaleSchedule
    rank: int
    alpha: float
    base: str
    recipe: dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on."""
    names = ("scalewise-diffusion", "torch", "diffusers", "transformers", "peft", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_student(
    path: Path,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    *,
    targets: list[str],
    dtype: torch.dtype = torch.float16,
    prefix: str = "transformer",
) -> None:
    """Write a student atomically; the schedule travels with the weights, so that it cannot get lost."""
    schedule = recipe.schedule.build()
    alpha = recipe.lora.alpha if recipe.lora.alpha is not None else recipe.lora.rank
    adapter = {
        f"{prefix}.r": recipe.lora.rank,
        f"{prefix}.lora_alpha": alpha,
        f"{prefix}.target_modules": targets,
    }
    metadata = {
        "format": "pt",
        "scalewise.timesteps": json.dumps(schedule.timesteps),
        "scalewise.scales": json.dumps([str(s) for s in schedule.scales]),
        "scalewise.rank": str(recipe.lora.rank),
        "scalewise.alpha": str(alpha),
        "scalewise.base": recipe.model.base,
        "scalewise.versions": json.dumps(versions()),
        "scalewise.recipe": recipe.model_dump_json(),
        _DIFFUSERS_KEY: json.dumps(adapter),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(
        {f"{prefix}.{k}": v.to(dtype).contiguous() for k, v in tensors.items()}, temporary, metadata=metadata
    )
    os.replace(temporary, path)


@contextmanager
def fused(module: nn.Module, student: Student) -> Iterator[None]:
    """Add a student's update to the weights of a module without adapters; leaving restores them bit by bit.

    W + alpha / rank B A: sampling then costs what the teacher's own forward costs.
    """
    before: dict[nn.Parameter, Tensor] = {}
    _check_pairs(student)
    try:
        for name, a in student.tensors.items():
            if name.endswith(".lora_A.weight"):
                weight = _weight(module, name.removesuffix(".lora_A.weight"))
                b = student.tensors[name.replace("lora_A", "lora_B")].to(weight.device)
                _check_shape(name, weight, a, b=b)
                before[weight] = weight.detach().clone()
                update = student.alpha / student.rank * (b.float() @ a.to(weight.device).float())
                weight.data = (weight.data.float() + update).to(weight.dtype)
        yield
    finally:
        for weight, original in before.items():
            weight.data = original


def _check_pairs(student: Student) -> None:
    a, b = (
        {n.rsplit(f".{k}.", 1)[0] for n in student.tensors if f".{k}." in n} for k in ("lora_A", "lora_B")
    )
    if a != b:
        raise StudentError(
            f"The student does not fit any base: {len(a ^ b)} layers lack one of their two matrices, for "
            f"example {sorted(a ^ b)[0]}. Fetch or train it again."
        )


def _weight(module: nn.Module, path: str) -> nn.Parameter:
    try:
        return module.get_submodule(path).weight  # type: ignore[return-value]
    except AttributeError:
        raise StudentError(
            f"The student does not fit this base: there is no layer {path}. It was made for another model."
        ) from None


def _check_shape(name: str, weight: nn.Parameter, a: Tensor, *, b: Tensor) -> None:
    if weight.shape != (b.shape[0], a.shape[1]):
        raise StudentError(
            f"The student does not fit this base: {name} is made for a layer of {b.shape[0]} x {a.shape[1]}, "
            f"which has {weight.shape[0]} x {weight.shape[1]} here. Sample with the base it was made for."
        )


def load_student(path: str | Path) -> Student:
    """Read a student: a .safetensors file, or a run's folder that holds student.safetensors."""
    file = Path(path)
    if file.is_dir():
        file = file / "student.safetensors"
    if not file.exists():
        raise StudentError(
            f"There is no student at {path}; give a .safetensors file or the folder of a finished run."
        )
    if file.suffix != ".safetensors":
        raise StudentError(
            f"{file} is not a safetensors file; others (pickles) are never loaded. Convert it first."
        )
    try:
        with safe_open(file, "pt") as opened:
            head = opened.metadata() or {}
            tensors = {key.partition(".")[2]: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StudentError(f"{file} is damaged ({error}); fetch or train it again.") from error
    if "scalewise.timesteps" not in head:
        raise StudentError(f"{file} carries no schedule in its metadata, so it was not written by scalewise.")
    schedule = ScaleSchedule.build(
        json.loads(head["scalewise.timesteps"]), json.loads(head["scalewise.scales"])
    )
    return Student(
        tensors,
        schedule,
        int(head["scalewise.rank"]),
        float(head["scalewise.alpha"]),
        head["scalewise.base"],
        json.loads(head["scalewise.recipe"]),
    )

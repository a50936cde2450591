"""Samplers under comparison: their command-line form, and image generation from shared prompts and seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from scalewise import mini
from scalewise.common.images import to_bytes
from scalewise.common.paths import expand_home
from scalewise.common.progress import ProgressCallback, no_progress
from scalewise.config.recipe import Recipe
from scalewise.evaluation.stored_images import SamplerError, read_folder
from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone, Precision
from scalewise.method.rng import derive
from scalewise.method.roles import TEACHER
from scalewise.method.sampling import OnStep, Sampler, sample_student, sample_teacher
from scalewise.method.scales import ScaleSchedule
from scalewise.models import PipelineAdapter
from scalewise.models.attached import apply_student, check_student
from scalewise.models.lora import Student, load_student

Kind = Literal["teacher", "undistilled", "student", "folder"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMS = "teacher, teacher:STEPS, undistilled, undistilled:full, student:PATH or folder:PATH"


@dataclass(frozen=True)
class SamplerSpec:
    """A way to generate images (teacher, student, undistilled model), or a folder of existing ones."""

    name: str
    kind: Kind
    steps: int = 0
    """0 for a folder."""
    guidance: float = 1.0
    schedule: ScaleSchedule | None = None
    """Its last scale is the size of the images; the teacher only uses that. None for a folder."""
    path: Path | None = None
    """The student's file or run folder, or the folder of images."""
    negative_prompt: str = ""
    """Negative prompt of the teacher's guidance."""
    shift: float | None = None
    """Shift of the teacher's schedule; None = that of the base."""
    text_length: int | None = None
    """Number of T5 tokens of the teacher; None = the default of the stock pipeline."""

    @property
    def about(self) -> str:
        """Steps, scales and guidance in a few words; the folder if it is one."""
        if self.schedule is None:
            return f"images from {self.path}"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if self.kind == "teacher":
            return f"{steps} at {self.schedule.full}, guidance {self.guidance:g}"
        scales = [str(scale) for scale in self.schedule.scales]
        return f"{steps} at {scales[0] if len(set(scales)) == 1 else ' → '.join(scales)}"


@dataclass(frozen=True)
class Prompts:
    """Prompts and seeds shared by all samplers: image i is generated from captions[i] and seeds[i]."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, captions: Sequence[str], *, each: int = 1, seed: int = 0) -> Prompts:
        """Repeat every caption `each` times, and derive a seed for each image from `seed`."""
        repeated = tuple(caption for caption in captions for _ in range(each))
        return cls(repeated, tuple(derive(seed, "evaluation", i) for i in range(len(repeated))))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.captions[part], self.seeds[part])

    def select(self, numbers: Sequence[int]) -> Prompts:
        """Return the prompts and seeds of the images with these numbers."""
        return Prompts(tuple(self.captions[i] for i in numbers), tuple(self.seeds[i] for i in numbers))

    @property
    def unique(self) -> tuple[str, ...]:
        """The distinct captions, in order of first appearance."""
        return tuple(dict.fromkeys(self.captions))

    @property
    def prompt_index(self) -> Tensor:
        """The index [N] into `unique` of the caption of each image."""
        index = {caption: i for i, caption in enumerate(self.unique)}
        return torch.tensor([index[caption] for caption in self.captions])


def parse_sampler(text: str, recipe: Recipe) -> SamplerSpec:
    """Parse a sampler as written on the command line, with an optional label: "4 steps=teacher:4".

    Raises SamplerError for an unknown form.
    """
    label, form = "", text
    if match := re.fullmatch(r"([^:=]+)=(.*)", text):
        label, form = match[1].strip(), match[2]
    word, _, rest = form.partition(":")
    parsers = {
        "teacher": _parse_teacher, "undistilled": _parse_undistilled, "student": _parse_student,
        "folder": _parse_folder,
    }  # fmt: skip
    if not is_sampler(form):
        raise SamplerError(
            f"Unknown sampler {text!r}; write {FORMS}, optionally with a label before it (name=...)."
        )
    spec = parsers[word](expand_home(rest), recipe)
    return replace(spec, name=label) if label else spec


def is_sampler(form: str) -> bool:
    """Return whether text without a label starts with a kind of sampler; the part after ":" is not
    checked.
    """
    return form.partition(":")[0] in KINDS


def parse_samplers(texts: Sequence[str], recipe: Recipe) -> list[SamplerSpec]:
    """Parse several samplers; raises SamplerError if two have the same name."""
    specs = [parse_sampler(text, recipe) for text in texts]
    names = [spec.name for spec in specs]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise SamplerError(f"Two samplers are named {duplicate!r}; label them, as in mine=student:PATH.")
    return specs


def _parse_teacher(rest: str, recipe: Recipe) -> SamplerSpec:
    if rest and not re.fullmatch(r"[1-9]\d*", rest):
        raise SamplerError(f"'teacher:{rest}' needs a number of steps, as in teacher:4.")
    steps = int(rest or recipe.teacher.steps)
    name = f"teacher, {steps} steps" if rest else "teacher"
    full = recipe.schedule.build().at_full_scale()
    teacher = recipe.teacher
    return SamplerSpec(
        name, "teacher", steps, teacher.guidance, full, negative_prompt=teacher.negative_prompt,
        shift=teacher.shift, text_length=teacher.max_sequence_length,
    )  # fmt: skip


def _parse_undistilled(rest: str, recipe: Recipe) -> SamplerSpec:
    if rest not in ("", "full"):
        raise SamplerError(f"Unknown form 'undistilled:{rest}'; write undistilled or undistilled:full.")
    name = "undistilled, full scale" if rest else "undistilled"
    schedule = recipe.schedule.build().at_full_scale() if rest else recipe.schedule.build()
    return SamplerSpec(name, "undistilled", len(schedule), 1.0, schedule)


def _parse_student(rest: str, recipe: Recipe) -> SamplerSpec:
    if not rest:
        raise SamplerError("'student' needs a student file or a run folder, as in student:runs/mini.")
    path = Path(mini.resolve(rest, mini.STUDENT))
    # Read here, so that a missing file fails before the teacher samples for an hour.
    schedule = load_student(path).schedule
    return SamplerSpec("student", "student", len(schedule), 1.0, schedule, path)


def _parse_folder(rest: str, recipe: Recipe) -> SamplerSpec:
    if not rest or not Path(rest).is_dir():
        problem = "is a file" if rest and Path(rest).exists() else "does not exist" if rest else "has no path"
        raise SamplerError(f"'folder:{rest}' {problem}; give a folder of images.")
    return SamplerSpec(Path(rest).resolve().name, "folder", path=Path(rest))


def check_fit(model: PipelineAdapter, samplers: Sequence[SamplerSpec]) -> None:
    """Raise if a student does not fit the model, or the model does not support a schedule."""
    for spec in samplers:
        if spec.kind == "student":
            assert spec.path is not None
            check_student(model.denoiser, load_student(spec.path, schedule=spec.schedule))
        if spec.schedule is not None:
            model.check_schedule(spec.schedule)


def count_passes(model: PipelineAdapter, spec: SamplerSpec) -> int:
    """Return the number of denoiser evaluations per sample, where one with guidance counts once.

    A second-order scheduler of the teacher (Heun) evaluates the denoiser twice per step, except in the last.
    """
    assert spec.schedule is not None, "a folder cannot sample"
    if spec.kind != "teacher":
        return spec.steps
    return len(model.teacher_scheduler(spec.steps, spec.schedule.full, shift=spec.shift).timesteps)


@contextmanager
def enter(
    model: PipelineAdapter, spec: SamplerSpec, *, precision: Precision = "float32",
    student: Student | None = None, weight: float = 1.0,
) -> Iterator[Sampler]:  # fmt: skip
    """Give the spec's spec; a student is fused into the model just for the time within.

    `student`: one that is loaded already; `weight`: the part of its update that is taken.
    """
    assert spec.schedule is not None, "a folder cannot sample"
    context: AbstractContextManager[None] = nullcontext()
    if spec.kind == "student":
        if student is None:
            assert spec.path is not None
            student = load_student(spec.path)
        context = apply_student(model.denoiser, student, weight=weight)
    with context:
        backbone = Backbone(model, precision=precision)
        yield partial(_sample, backbone, spec)


def encode(model: PipelineAdapter, spec: SamplerSpec, captions: Sequence[str]) -> Condition:
    """Embed captions for a sampler; the teacher has its own number of T5 tokens (`text_length`)."""
    if spec.kind == "teacher":
        return model.encode_for_teacher(captions, spec.text_length)
    return model.encode_prompts(captions)


def _sample(
    backbone: Backbone, spec: SamplerSpec, cond: Condition, uncond: Condition, seeds: Sequence[int], *,
    on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    assert spec.schedule is not None
    if spec.kind != "teacher":  # a student is fused into the base, so the role without adapters is used
        return sample_student(backbone, spec.schedule, cond, seeds, role=TEACHER, on_step=on_step)
    return sample_teacher(
        backbone, spec.schedule.full, cond, seeds, steps=spec.steps, guidance=spec.guidance,
        uncond=uncond, shift=spec.shift, on_step=on_step,
    )  # fmt: skip


@torch.no_grad()
def generate_images(
    model: PipelineAdapter | None, spec: SamplerSpec, prompts: Prompts, *,
    batch: int = 16,
    precision: Precision = "float32",
    numbers: Sequence[int] | None = None,
    done: ProgressCallback = no_progress,
    load_batch: Callable[[Sequence[int]], np.ndarray | None] = lambda _numbers: None,
    save_batch: Callable[[Sequence[int], np.ndarray], None] = lambda _numbers, _images: None,
) -> np.ndarray:  # fmt: skip
    """Generate the images of all prompts, or those with the given numbers.

    Returns uint8 [N, H, W, 3], or [N, T, H, W, 3] for videos. An image depends on its caption and seed, not
    on the batch. `load_batch(numbers)` may return the images of a batch that already exist;
    `save_batch(numbers, images)` is called for every newly generated batch.
    """
    if spec.kind == "folder":
        assert spec.path is not None
        return read_folder(spec.path, prompts.captions, numbers=numbers)
    numbers = range(len(prompts)) if numbers is None else numbers
    assert model is not None, "sampling needs a model"
    uncond = encode(model, spec, [spec.negative_prompt])
    parts = []
    with enter(model, spec, precision=precision) as sampler:
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            images, selected = load_batch(part), prompts.select(part)
            if images is None:
                x0 = sampler(encode(model, spec, selected.captions), uncond, selected.seeds)
                images = to_bytes(model.decode(x0))
                save_batch(part, images)
            parts.append(images)
            done(min(start + batch, len(numbers)))
    return np.concatenate(parts)


@torch.no_grad()
def generate_steps(
    model: PipelineAdapter, spec: SamplerSpec, prompts: Prompts, *, precision: Precision = "float32"
) -> list[np.ndarray]:
    """Return the decoded x0 of every step, uint8 [N, H_i, W_i, 3]; the last entry is the final image."""
    cond = encode(model, spec, prompts.captions)
    uncond = encode(model, spec, [spec.negative_prompt])
    with enter(model, spec, precision=precision) as sampler:
        predictions: list[Tensor] = []
        sample = sampler(cond, uncond, prompts.seeds, on_step=lambda _i, x0: predictions.append(x0))
        return [to_bytes(model.decode(x0)) for x0 in [*predictions[:-1], sample]]

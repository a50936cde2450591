"""Who takes part in a comparison, and how each of them draws the same prompts from the same seeds."""

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
from scalewise.evaluation.stored_images import ContenderError, read_folder
from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone, Precision
from scalewise.method.rng import derive
from scalewise.method.roles import TEACHER
from scalewise.method.sampling import OnStep, Sampler, sample_student, sample_teacher
from scalewise.method.scales import ScaleSchedule
from scalewise.models import PipelineAdapter
from scalewise.models.attached import check_student, with_student
from scalewise.models.lora import Student, load_student

Kind = Literal["teacher", "undistilled", "student", "folder"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMS = "teacher, teacher:STEPS, undistilled, undistilled:full, student:PATH or folder:PATH"


@dataclass(frozen=True)
class Contender:
    """One way to draw pictures."""

    name: str
    kind: Kind
    steps: int = 0
    """0 for a folder."""
    guidance: float = 1.0
    schedule: ScaleSchedule | None = None
    """Its last scale is the size drawn; the teacher takes nothing else from it. None for a folder."""
    path: Path | None = None
    """The student's file or run, or the folder of pictures."""
    negative_prompt: str = ""
    """What the teacher's guidance leads away from."""
    shift: float | None = None
    """Of the teacher's schedule; None = the base's own."""
    text_length: int | None = None
    """T5 tokens that the teacher reads; None = as the family's own pipeline."""

    @property
    def about(self) -> str:
        """How it draws, in a few words."""
        if self.schedule is None:
            return f"pictures from {self.path}"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if self.kind == "teacher":
            return f"{steps} at {self.schedule.full}, guidance {self.guidance:g}"
        scales = [str(scale) for scale in self.schedule.scales]
        return f"{steps} at {scales[0] if len(set(scales)) == 1 else ' → '.join(scales)}"


@dataclass(frozen=True)
class Prompts:
    """What every contender draws: image i shows captions[i] from seeds[i]."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, captions: Sequence[str], *, each: int = 1, seed: int = 0) -> Prompts:
        """Every caption `each` times, every image from a seed of its own."""
        repeated = tuple(caption for caption in captions for _ in range(each))
        return cls(repeated, tuple(derive(seed, "evaluation", i) for i in range(len(repeated))))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.captions[part], self.seeds[part])

    def chosen(self, numbers: Sequence[int]) -> Prompts:
        """Those of some images."""
        return Prompts(tuple(self.captions[i] for i in numbers), tuple(self.seeds[i] for i in numbers))

    @property
    def unique(self) -> tuple[str, ...]:
        """The different captions, in order of appearance."""
        return tuple(dict.fromkeys(self.captions))

    @property
    def number(self) -> Tensor:
        """Which of the unique captions each image has, [N]."""
        place = {caption: i for i, caption in enumerate(self.unique)}
        return torch.tensor([place[caption] for caption in self.captions])


def parse_contender(text: str, recipe: Recipe) -> Contender:
    """Read a contender as written on the command line, optionally with a label: "4 steps=teacher:4"."""
    label, form = "", text
    if match := re.fullmatch(r"([^:=]+)=(.*)", text):
        label, form = match[1].strip(), match[2]
    word, _, rest = form.partition(":")
    readers = {"teacher": _teacher, "undistilled": _undistilled, "student": _student, "folder": _folder}
    if not is_contender(form):
        raise ContenderError(
            f"{text!r} is no contender; write {FORMS}, optionally with a label before it (name=...)."
        )
    contender = readers[word](expand_home(rest), recipe)
    return replace(contender, name=label) if label else contender


def is_contender(form: str) -> bool:
    """Whether text without a label names a kind of contender; what stands behind the colon is not read."""
    return form.partition(":")[0] in KINDS


def parse_contenders(texts: Sequence[str], recipe: Recipe) -> list[Contender]:
    """Read several contenders; their names have to differ."""
    found = [parse_contender(text, recipe) for text in texts]
    names = [contender.name for contender in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ContenderError(f"Two contenders are called {twice!r}; label them, as in mine=student:PATH.")
    return found


def _teacher(rest: str, recipe: Recipe) -> Contender:
    if rest and not re.fullmatch(r"[1-9]\d*", rest):
        raise ContenderError(f"'teacher:{rest}' needs a number of steps, as in teacher:4.")
    steps = int(rest or recipe.teacher.steps)
    name = f"teacher, {steps} steps" if rest else "teacher"
    full = recipe.schedule.build().at_full_scale()
    teacher = recipe.teacher
    return Contender(
        name, "teacher", steps, teacher.guidance, full, negative_prompt=teacher.negative_prompt,
        shift=teacher.shift, text_length=teacher.max_sequence_length,
    )  # fmt: skip


def _undistilled(rest: str, recipe: Recipe) -> Contender:
    if rest not in ("", "full"):
        raise ContenderError(f"'undistilled:{rest}' is unknown; write undistilled or undistilled:full.")
    name = "undistilled, full scale" if rest else "undistilled"
    schedule = recipe.schedule.build().at_full_scale() if rest else recipe.schedule.build()
    return Contender(name, "undistilled", len(schedule), 1.0, schedule)


def _student(rest: str, recipe: Recipe) -> Contender:
    if not rest:
        raise ContenderError("'student' needs a file or the folder of a run, as in student:runs/mini.")
    path = Path(mini.resolve(rest, mini.STUDENT))
    # Read at once: a missing file shall not show after an hour of the teacher's drawing.
    schedule = load_student(path).schedule
    return Contender("student", "student", len(schedule), 1.0, schedule, path)


def _folder(rest: str, recipe: Recipe) -> Contender:
    if not rest or not Path(rest).is_dir():
        why = "is a file" if rest and Path(rest).exists() else "does not exist" if rest else "names none"
        raise ContenderError(f"'folder:{rest}' {why}; give a folder that holds pictures.")
    return Contender(Path(rest).resolve().name, "folder", path=Path(rest))


def check_fit(model: PipelineAdapter, contenders: Sequence[Contender]) -> None:
    """Refuse students that do not fit the model and schedules it cannot draw, before anything is drawn."""
    for contender in contenders:
        if contender.kind == "student":
            assert contender.path is not None
            check_student(model.denoiser, load_student(contender.path, schedule=contender.schedule))
        if contender.schedule is not None:
            model.check_schedule(contender.schedule)


def passes_of(model: PipelineAdapter, contender: Contender) -> int:
    """Passes through the denoiser for one sample; under guidance each may be two forwards.

    A teacher's scheduler of second order (Heun's) takes two for all steps but the last.
    """
    assert contender.schedule is not None, "a folder does not draw"
    if contender.kind != "teacher":
        return contender.steps
    return len(
        model.teacher_scheduler(contender.steps, contender.schedule.full, shift=contender.shift).timesteps
    )


@contextmanager
def enter(
    model: PipelineAdapter, contender: Contender, *, precision: Precision = "float32",
    student: Student | None = None, weight: float = 1.0,
) -> Iterator[Sampler]:  # fmt: skip
    """Give the contender's sampler; a student is fused into the model just for the time within.

    `student`: one that is loaded already; `weight`: the part of its update that is taken.
    """
    assert contender.schedule is not None, "a folder does not draw"
    held: AbstractContextManager[None] = nullcontext()
    if contender.kind == "student":
        if student is None:
            assert contender.path is not None
            student = load_student(contender.path)
        held = with_student(model.denoiser, student, weight=weight)
    with held:
        backbone = Backbone(model, precision=precision)
        yield partial(_sample, backbone, contender)


def encode(model: PipelineAdapter, contender: Contender, captions: Sequence[str]) -> Condition:
    """Embed captions for a contender: the teacher reads as many tokens as its own pipeline, students those of
    their training.
    """
    if contender.kind == "teacher":
        return model.encode_for_teacher(captions, contender.text_length)
    return model.encode_prompts(captions)


def _sample(
    backbone: Backbone, contender: Contender, cond: Condition, uncond: Condition, seeds: Sequence[int], *,
    on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    assert contender.schedule is not None
    if contender.kind != "teacher":  # in the base's own role: a student, if any, is fused into it
        return sample_student(backbone, contender.schedule, cond, seeds, role=TEACHER, on_step=on_step)
    return sample_teacher(
        backbone, contender.schedule.full, cond, seeds, steps=contender.steps, guidance=contender.guidance,
        uncond=uncond, shift=contender.shift, on_step=on_step,
    )  # fmt: skip


@torch.no_grad()
def draw(
    model: PipelineAdapter | None, contender: Contender, prompts: Prompts, *,
    batch: int = 16,
    precision: Precision = "float32",
    numbers: Sequence[int] | None = None,
    done: ProgressCallback = no_progress,
    known: Callable[[Sequence[int]], np.ndarray | None] = lambda _numbers: None,
    keep: Callable[[Sequence[int], np.ndarray], None] = lambda _numbers, _images: None,
) -> np.ndarray:  # fmt: skip
    """Draw all prompts, or those of some `numbers`: bytes [N, H, W, 3], videos [N, F, H, W, 3].

    Image i depends on its caption and seed, not on the batch. `known(numbers)` may give a batch that was
    drawn before; `keep(numbers, images)` is called with every other one as soon as it is drawn.
    """
    if contender.kind == "folder":
        assert contender.path is not None
        return read_folder(contender.path, prompts.captions, numbers=numbers)
    numbers = range(len(prompts)) if numbers is None else numbers
    assert model is not None, "who draws needs a model"
    uncond = encode(model, contender, [contender.negative_prompt])
    parts = []
    with enter(model, contender, precision=precision) as sampler:
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            images, some = known(part), prompts.chosen(part)
            if images is None:
                x0 = sampler(encode(model, contender, some.captions), uncond, some.seeds)
                images = to_bytes(model.decode(x0))
                keep(part, images)
            parts.append(images)
            done(min(start + batch, len(numbers)))
    return np.concatenate(parts)


@torch.no_grad()
def draw_steps(
    model: PipelineAdapter, contender: Contender, prompts: Prompts, *, precision: Precision = "float32"
) -> list[np.ndarray]:
    """Draw a few prompts and decode x0 of every step: bytes [N, h_i, w_i, 3], growing with the scales.

    The last one is the sample itself.
    """
    cond = encode(model, contender, prompts.captions)
    uncond = encode(model, contender, [contender.negative_prompt])
    with enter(model, contender, precision=precision) as sampler:
        found: list[Tensor] = []
        sample = sampler(cond, uncond, prompts.seeds, on_step=lambda _i, x0: found.append(x0))
        return [to_bytes(model.decode(x0)) for x0 in [*found[:-1], sample]]

"""Who takes part in a comparison, and how each of them draws the same prompts from the same seeds."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from scalewise import mini
from scalewise.common.errors import first_line
from scalewise.common.images import read_picture, to_bytes
from scalewise.common.paths import expand_home, one_form
from scalewise.config.recipe import Recipe
from scalewise.data.files import READABLE
from scalewise.data.image_folder import scan_images
from scalewise.method.adapter import Condition, ModelAdapter
from scalewise.method.backbone import Backbone, Precision
from scalewise.method.rng import derive
from scalewise.method.roles import TEACHER
from scalewise.method.sampling import last, student_steps, teacher_steps
from scalewise.method.scales import ScaleSchedule
from scalewise.models.attached import check_student, with_student
from scalewise.models.lora import Student, load_student

Kind = Literal["teacher", "undistilled", "student", "folder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Sampler = Callable[[Condition, Condition, Sequence[int]], Iterator[tuple[int, Tensor]]]
"""(captions' condition, unconditional one, seeds) -> (step, x0) of every step."""

DRAWN_FOR = "prompts.json"
"""Beside pictures that a comparison kept: the captions and seeds that they were drawn for."""

FORMS = "teacher, teacher:STEPS, undistilled, undistilled:full, student:PATH or folder:PATH"


class ContenderError(ValueError):
    """A contender that cannot take part; the message says what to write instead."""


@dataclass(frozen=True)
class Contender:
    """One way to draw pictures."""

    name: str
    kind: Kind
    steps: int = 0
    """Forwards of the denoiser, or pairs of them with guidance; 0 for a folder."""
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


def check_fit(model: ModelAdapter, contenders: Sequence[Contender]) -> None:
    """Refuse students that do not fit the model and schedules it cannot draw, before anything is drawn."""
    for contender in contenders:
        if contender.kind == "student":
            assert contender.path is not None
            check_student(model.denoiser, load_student(contender.path, schedule=contender.schedule))
        if contender.schedule is not None:
            model.check_schedule(contender.schedule)


@contextmanager
def enter(
    model: ModelAdapter, contender: Contender, *, precision: Precision = "float32",
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
        yield partial(_as_teacher if contender.kind == "teacher" else _as_student, backbone, contender)


def encode(model: ModelAdapter, contender: Contender, captions: Sequence[str]) -> Condition:
    """Embed captions for a contender: the teacher reads as many tokens as its own pipeline, students those of
    their training.
    """
    if contender.kind == "teacher":
        return model.encode_for_teacher(captions, contender.text_length)
    return model.encode_prompts(captions)


def _as_teacher(
    backbone: Backbone, contender: Contender, cond: Condition, uncond: Condition, seeds: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    assert contender.schedule is not None
    return teacher_steps(
        backbone, contender.schedule.full, cond, seeds, steps=contender.steps, guidance=contender.guidance,
        uncond=uncond, shift=contender.shift,
    )  # fmt: skip


def _as_student(
    backbone: Backbone, contender: Contender, cond: Condition, uncond: Condition, seeds: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    assert contender.schedule is not None
    # The base's own role: a student, if any, is fused into it.
    return student_steps(backbone, contender.schedule, cond, seeds, role=TEACHER)


@torch.no_grad()
def draw(
    model: ModelAdapter | None, contender: Contender, prompts: Prompts, *,
    batch: int = 16,
    precision: Precision = "float32",
    numbers: Sequence[int] | None = None,
    done: Callable[[int], None] = lambda count: None,
    known: Callable[[Sequence[int]], np.ndarray | None] = lambda _numbers: None,
    keep: Callable[[Sequence[int], np.ndarray], None] = lambda _numbers, _images: None,
) -> np.ndarray:  # fmt: skip
    """Draw all prompts, or those of some `numbers`: bytes [N, H, W, 3], videos [N, F, H, W, 3].

    Image i depends on its caption and seed, not on the batch. `known(numbers)` may give a batch that was
    drawn before; `keep(numbers, images)` is called with every other one as soon as it is drawn.
    """
    if contender.kind == "folder":
        return read_folder(contender, prompts, numbers=numbers)
    numbers = range(len(prompts)) if numbers is None else numbers
    assert model is not None, "who draws needs a model"
    uncond = encode(model, contender, [contender.negative_prompt])
    parts = []
    with enter(model, contender, precision=precision) as sampler:
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            images, some = known(part), prompts.chosen(part)
            if images is None:
                x0 = last(sampler(encode(model, contender, some.captions), uncond, some.seeds))
                images = to_bytes(model.decode(x0))
                keep(part, images)
            parts.append(images)
            done(min(start + batch, len(numbers)))
    return np.concatenate(parts)


@torch.no_grad()
def draw_steps(
    model: ModelAdapter, contender: Contender, prompts: Prompts, *, precision: Precision = "float32"
) -> list[np.ndarray]:
    """Draw a few prompts and decode x0 of every step: bytes [N, h_i, w_i, 3], growing with the scales."""
    cond = encode(model, contender, prompts.captions)
    uncond = encode(model, contender, [contender.negative_prompt])
    with enter(model, contender, precision=precision) as sampler:
        return [to_bytes(model.decode(x0)) for _, x0 in sampler(cond, uncond, prompts.seeds)]


def read_folder(
    contender: Contender, prompts: Prompts, *, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Read a folder's images, all or some by number: bytes [N, H, W, 3], or videos [N, F, H, W, 3].

    0.png, 1.jpg, ... are taken by number, those in GenEval's layout (00000/samples/0000.png beside
    00000/metadata.jsonl) and others by caption. Numbered ones that a comparison kept know what they were
    drawn for, and are refused for other prompts. Images beyond the prompts are warned of.
    """
    assert contender.path is not None
    paths = _by_number(contender.path, len(prompts))
    if paths and (contender.path / DRAWN_FOR).exists():
        _check_drawn_for(contender.path, prompts)
    paths = paths or _by_caption(contender.path, prompts)
    chosen = paths if numbers is None else [paths[i] for i in numbers]
    return np.stack(list(_pictures(contender.path, chosen)))


def _pictures(folder: Path, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Pictures of one size."""
    first: np.ndarray | None = None
    for path in paths:
        try:
            picture = read_picture(path)
        except Exception as error:  # Pillow's plugins raise many kinds
            raise ContenderError(f"Cannot read {path} ({first_line(error)}); replace it.") from error
        first = picture if first is None else first
        if picture.shape != first.shape:
            sizes = " and ".join(f"{p.shape[-2]}x{p.shape[-3]}" for p in (first, picture))
            raise ContenderError(f"{folder} holds pictures of {sizes} pixels; bring them to one size.")
        yield picture


def _check_drawn_for(folder: Path, prompts: Prompts) -> None:
    try:
        told = list(json.loads((folder / DRAWN_FOR).read_text(encoding="utf-8"))["captions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ContenderError(
            f"{folder / DRAWN_FOR} is not what a comparison writes there, captions and seeds; rename it to "
            "have the pictures taken by number."
        ) from error
    for number, (was, wanted) in enumerate(zip_longest(told[: len(prompts)], prompts.captions)):
        if was != wanted:
            raise ContenderError(
                f"{folder / f'{number}.png'} was drawn for {was!r}, but is to be judged by {wanted!r}; give "
                f"the prompts and --each that it was drawn with (they stand in {DRAWN_FOR} there)."
            )


def _by_number(folder: Path, count: int) -> list[Path]:
    """Paths of 0 .. count - 1, or nothing if one is missing; any readable format, its suffix in any case."""
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READABLE or (number := number_of(path)) < 0:
            continue
        if number in numbered:
            raise ContenderError(
                f"{folder} has two images of number {number}, {numbered[number].name} and {path.name}; "
                "remove one."
            )
        numbered[number] = path
    if any(i not in numbered for i in range(count)):
        return []
    _warn_of_more(folder, len(numbered), count)
    return [numbered[i] for i in range(count)]


def _warn_of_more(folder: Path, there: int, count: int) -> None:
    if there > count:
        warnings.warn(
            f"{folder} holds {there:,} images for {count:,} to be judged: {there - count:,} are left out. "
            "Give all their prompts, or --each with the number of images of a prompt, to judge them.",
            stacklevel=2,
        )


def number_of(path: Path) -> int:
    """17 of 17.png or 017.jpg; -1 of other names."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else -1


def _by_caption(folder: Path, prompts: Prompts) -> list[Path]:
    found = _geneval_layout(folder)
    if not found:
        for image in scan_images(folder, caption_from_name=True)[0]:
            found.setdefault(one_form(image.caption), []).append(image.path)
    there, paths = sum(map(len, found.values())), []
    for caption in prompts.captions:
        if not found.get(one_form(caption)):
            raise ContenderError(
                f"{folder} has too few pictures with the caption {caption!r}; name them 0.png to "
                f"{len(prompts) - 1}.png in the order of the prompts, or give them captions."
            )
        paths.append(found[one_form(caption)].pop(0))
    _warn_of_more(folder, there, len(paths))
    return paths


def _geneval_layout(folder: Path) -> dict[str, list[Path]]:
    """Images by prompt of folders NUMBER/samples with NUMBER/metadata.jsonl, GenEval's layout."""
    found: dict[str, list[Path]] = {}
    for told in sorted(folder.glob("*/metadata.jsonl")):
        samples = told.parent / "samples"
        if not samples.is_dir():
            continue
        try:
            prompt = str(json.loads(told.read_text(encoding="utf-8"))["prompt"]).strip()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ContenderError(
                f'{told} does not hold GenEval\'s {{"prompt": ...}} ({first_line(error)}); write it again.'
            ) from error
        images = (p for p in samples.iterdir() if p.suffix.lower() in READABLE and number_of(p) >= 0)
        found.setdefault(one_form(prompt), []).extend(sorted(images, key=number_of))
    return found

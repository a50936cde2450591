"""GenEval (arXiv 2310.11513): whether the objects that a prompt asks for are in the picture.

Its six tasks, its prompts' grammar and its check. Prompts are drawn here, by the same grammar, so that they
are not the authors' list; that list is understood, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalewise.method.rng import permutation
from scalewise.metrics.base import Mean, Metric, Seen, Statistic
from scalewise.metrics.clip import ClipScorer
from scalewise.metrics.detection import COLOURS, ColourJudge, Detector, Found
from scalewise.metrics.extras import Device, Extra

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"

THRESHOLD = 0.3
"""Less sure detections do not count ..."""
COUNTING_THRESHOLD = 0.9
"""... nor these where the task is to count."""
MOST = 16
"""No more detections of a name are looked at."""
SLACK = 0.1
"""How much of the sum of two objects' sizes does not count as their distance."""

NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 objects, three of them with GenEval's spelling."""

THINGS = tuple(name for name in NAMES if name != "person")
"""What is given a colour."""
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")

SIZES = {
    "single_object": len(NAMES),
    "two_object": len(NAMES) * (len(NAMES) - 1),
    "counting": len(NAMES) * len(COUNTS),
    "colors": len(THINGS) * len(COLOURS),
    "position": len(NAMES) * (len(NAMES) - 1) * len(RELATIONS),
    "color_attr": len(THINGS) * (len(THINGS) - 1) * len(COLOURS) * (len(COLOURS) - 1),
}
"""The tasks, in their authors' order, and how many different prompts each of them has."""


@dataclass(frozen=True)
class Wanted:
    """One kind of object that a prompt asks for."""

    name: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Requirement:
    """What a prompt asks for."""

    task: str
    objects: tuple[Wanted, ...]
    relation: str | None = None
    """Where the first object is, seen from the second."""


def geneval_prompts(count: int, *, seed: int = 0) -> list[str]:
    """Draw different prompts, the tasks in turn; a longer list begins with a shorter one of the same seed.

    A task whose prompts are used up is left out of the further rounds: single objects after 80 of them.
    Raises ValueError when there are not so many.
    """
    if not 1 <= count <= sum(SIZES.values()):
        raise ValueError(
            f"GenEval's grammar makes {sum(SIZES.values()):,} different prompts, not {count:,}; ask for a "
            "number from 1 to that."
        )
    orders = {task: permutation(size, "geneval", task, seed)[:count].tolist() for task, size in SIZES.items()}
    drawn: list[str] = []
    turn = 0
    while len(drawn) < count:
        drawn += [
            prompt_of(_numbered(task, order[turn])) for task, order in orders.items() if turn < len(order)
        ]
        turn += 1
    return drawn[:count]


def prompt_of(asked: Requirement) -> str:
    """Write down a requirement in GenEval's words."""
    if asked.task == "counting":
        [thing] = asked.objects
        number = next(word for word, count in COUNTS.items() if count == thing.count)
        return f"a photo of {number} {_plural(thing.name)}"
    joint = f" {asked.relation or 'and'} "
    return "a photo of " + joint.join(_phrase(thing) for thing in asked.objects)


def parse_prompt(text: str) -> Requirement | None:
    """What a prompt of GenEval's grammar asks for; None for other texts."""
    start, _, rest = text.strip().partition("a photo of ")
    if start:
        return None
    if rest in _COUNTED:
        return Requirement("counting", (_COUNTED[rest],))
    if rest in _PHRASES:
        return Requirement("colors" if _PHRASES[rest].colour else "single_object", (_PHRASES[rest],))
    for joint in ("and", *RELATIONS):
        one, _, two = rest.partition(f" {joint} ")
        if one in _PHRASES and two in _PHRASES:
            return _pair_of(_PHRASES[one], _PHRASES[two], joint)
    return None


def _pair_of(one: Wanted, two: Wanted, joint: str) -> Requirement | None:
    colours = {one.colour, two.colour}
    if one.name == two.name:
        return None
    if colours == {None}:
        if joint == "and":
            return Requirement("two_object", (one, two))
        return Requirement("position", (one, two), joint)
    if joint != "and" or None in colours or len(colours) == 1:
        return None
    return Requirement("color_attr", (one, two))


def _numbered(task: str, number: int) -> Requirement:
    """The requirement with some number in range(SIZES[task])."""
    if task == "single_object":
        return Requirement(task, (Wanted(NAMES[number]),))
    if task == "two_object":
        return Requirement(task, tuple(Wanted(name) for name in _two_of(NAMES, number)))
    if task == "counting":
        name, count = divmod(number, len(COUNTS))
        return Requirement(task, (Wanted(NAMES[name], list(COUNTS.values())[count]),))
    if task == "colors":
        name, colour = divmod(number, len(COLOURS))
        return Requirement(task, (Wanted(THINGS[name], colour=COLOURS[colour]),))
    if task == "position":
        names, relation = divmod(number, len(RELATIONS))
        objects = tuple(Wanted(name) for name in _two_of(NAMES, names))
        return Requirement(task, objects, RELATIONS[relation])
    names, colours = divmod(number, len(COLOURS) * (len(COLOURS) - 1))
    both = zip(_two_of(THINGS, names), _two_of(COLOURS, colours), strict=True)
    return Requirement(task, tuple(Wanted(name, colour=colour) for name, colour in both))


def _two_of(words: Sequence[str], number: int) -> tuple[str, str]:
    """The ordered pair of different words with some number."""
    one, two = divmod(number, len(words) - 1)
    return words[one], words[two + (two >= one)]


def _phrase(thing: Wanted) -> str:
    words = f"{thing.colour} {thing.name}" if thing.colour else thing.name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """GenEval's rule, whatever the language says: knifes, skises."""
    return name + ("es" if name.endswith("s") else "s")


_COUNTED = {
    f"{word} {_plural(name)}": Wanted(name, count) for name in NAMES for word, count in COUNTS.items()
}
_PHRASES = {
    _phrase(thing): thing
    for thing in (*map(Wanted, NAMES), *(Wanted(name, colour=c) for name in THINGS for c in COLOURS))
}


def correct(asked: Requirement, found: Iterable[Found], colour_of: Callable[[Found], str]) -> bool:
    """GenEval's check of what a detector found in one picture.

    Counting wants the exact number, all else at least one. Colour and place are those of the surest
    detections alone, as many as are wanted.
    """
    threshold = COUNTING_THRESHOLD if asked.task == "counting" else THRESHOLD
    ranked = sorted((one for one in found if one.score > threshold), key=lambda one: -one.score)
    picked: list[list[Found]] = []
    for thing in asked.objects:
        named = [one for one in ranked if one.name == thing.name][:MOST]
        if len(named) < thing.count or (asked.task == "counting" and len(named) > thing.count):
            return False
        picked.append(named[: thing.count])
        if thing.colour and any(colour_of(one) != thing.colour for one in picked[-1]):
            return False
    if asked.relation is None:
        return True
    return all(asked.relation in relations(a.box, b.box) for a in picked[0] for b in picked[1])


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies as seen from box b (left, top, right, bottom): none, one or two of `RELATIONS`.

    The distance of centres counts, less a tenth of both sizes along each axis; an axis counts if that is
    more than half of the whole distance.
    """
    corners = np.asarray([a, b], dtype=np.float64).reshape(2, 2, 2)
    centres, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    apart = np.maximum(np.abs(offset) - SLACK * sizes.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, held in holds.items() if held}


def _asked(captions: Sequence[str]) -> list[Requirement | None]:
    asked = [parse_prompt(caption) for caption in captions]
    if not any(asked):
        raise ValueError(
            f"None of the {len(captions)} prompts is one of GenEval's, which the metric geneval needs; "
            "draw pictures of those with --prompts geneval."
        )
    return asked


def check(captions: Sequence[str]) -> None:
    """Refuse captions of which none is GenEval's, and warn of tasks that none of them belongs to."""
    tasks = {one.task for one in _asked(captions) if one}
    if left := [task for task in SIZES if task not in tasks]:
        warnings.warn(
            f"No prompt is of GenEval's {'task' if len(left) == 1 else 'tasks'} {', '.join(left)}: its mean "
            f"is over {len(tasks)} of {len(SIZES)} tasks.",
            stacklevel=2,
        )


class GenEval:
    """Judges pictures of GenEval's prompts, each by itself."""

    def __init__(self, detector: Detector, colours: ColourJudge) -> None:
        self.detector, self.colours = detector, colours

    @classmethod
    def load(cls, source: str, device: Device) -> GenEval:
        """`source`: "DETECTOR" or "DETECTOR,CLIP", hub ids or folders."""
        parts = source.split(",")
        if len(parts) > 2 or not all(parts):
            raise ValueError(
                f"The metric geneval takes a detector and a CLIP model, not {source!r}: write "
                "geneval=DETECTOR or geneval=DETECTOR,CLIP with a hub id or folder for each."
            )
        clip = parts[1] if len(parts) == 2 else CLIP
        return cls(Detector.load(parts[0], device), ColourJudge(ClipScorer.load(clip, device=device)))

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """1 for a picture that its prompt's check passes, else 0, NaN for prompts of other tasks [N].

        "geneval" has all tasks' pictures. Raises ValueError if no caption is a prompt of GenEval's, and if
        the detector has no label for an object that one asks for.
        """
        asked = _asked(captions)
        known = [one for one in asked if one]
        self.detector.require(thing.name for one in known for thing in one.objects)
        looks = {metric.name: torch.full((len(captions),), torch.nan) for metric in EXTRA.metrics}
        for i, (picture, one) in enumerate(zip(images, asked, strict=True)):
            if one:
                looks["geneval"][i] = looks[f"geneval_{one.task}"][i] = float(self._passes(picture, one))
        return looks

    def _passes(self, picture: np.ndarray, asked: Requirement) -> bool:
        found = self.detector.find(picture, above=THRESHOLD)
        return correct(asked, found, lambda one: self.colours(picture, one))


def _overall(seen: Seen) -> Statistic | None:
    """The mean over tasks of each one's share; tasks without a picture of the given prompts are left out."""
    tasks = [seen.looks[f"geneval_{task}"] for task in SIZES if f"geneval_{task}" in seen.looks]
    if all(bool(values.isnan().all()) for values in tasks):
        return None
    return Mean(seen, torch.stack(tasks))


def _metric(task: str, title: str, about: str) -> Metric:
    name = f"geneval_{task}"
    return Metric(
        name=name, title=f"GenEval {title}", better="higher", bounds=(0, 1), percent=True, share=True,
        statistic=lambda seen: seen.mean_look(name),
        about=f"share of pictures {about}, as a detector sees them",
    )  # fmt: skip


EXTRA = Extra(
    name="geneval",
    load=GenEval.load,
    check=check,
    source=DETECTOR,
    metrics=(
        Metric(
            name="geneval", title="GenEval", better="higher", bounds=(0, 1), percent=True, share=True,
            statistic=_overall,
            about="mean over GenEval's tasks of the share of pictures that show what their prompt asks for",
        ),
        _metric("single_object", "single object", "with the one object asked for"),
        _metric("two_object", "two objects", "with both objects asked for"),
        _metric("counting", "counting", "with exactly as many objects as asked for"),
        _metric("colors", "colours", "whose object has the colour asked for"),
        _metric("position", "position", "with one object where asked for, seen from the other"),
        _metric("color_attr", "colour attribution", "with two objects, each in the colour asked for"),
    ),
)  # fmt: skip

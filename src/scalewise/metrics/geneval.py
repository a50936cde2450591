"""GenEval (arXiv 2310.11513): whether an image contains the objects of its prompt.

The six tasks, the grammar of prompts, and the check of images. Prompts are generated with the authors'
grammar; the authors' own list of prompts is parsed, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalewise.method.rng import permutation
from scalewise.metrics.base import ImageFeatures, Mean, Metric, Statistic, share_metric
from scalewise.metrics.clip import ClipScorer
from scalewise.metrics.detection import COLORS, ColorClassifier, Detection, Detector
from scalewise.metrics.extras import Device, Extra

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"

THRESHOLD = 0.3
"""Minimum score of a detection ..."""
COUNTING_THRESHOLD = 0.9
"""... and in the counting task."""
MAX_DETECTIONS = 16
"""Maximum number of detections considered per name."""
POSITION_SLACK = 0.1
"""Fraction of the sum of two objects' sizes that is subtracted from their distance."""

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
"""COCO's 80 objects, three of them renamed by GenEval."""

THINGS = tuple(name for name in NAMES if name != "person")
"""Objects used in color prompts."""
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")

SIZES = {
    "single_object": len(NAMES),
    "two_object": len(NAMES) * (len(NAMES) - 1),
    "counting": len(NAMES) * len(COUNTS),
    "colors": len(THINGS) * len(COLORS),
    "position": len(NAMES) * (len(NAMES) - 1) * len(RELATIONS),
    "color_attr": len(THINGS) * (len(THINGS) - 1) * len(COLORS) * (len(COLORS) - 1),
}
"""Number of distinct prompts of each task, in the authors' order."""


@dataclass(frozen=True)
class ObjectSpec:
    """An object requested by a prompt, with its count and color."""

    name: str
    count: int = 1
    color: str | None = None


@dataclass(frozen=True)
class Requirement:
    """Content requested by a prompt: objects and their relation."""

    task: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    """Position of the first object relative to the second."""


def geneval_prompts(count: int, *, seed: int = 0) -> list[str]:
    """Generate distinct prompts, alternating between tasks; with equal seeds, shorter lists are prefixes.

    A task is skipped when its prompts are used up (single objects after 80). Raises ValueError if `count`
    exceeds the number of distinct prompts.
    """
    if not 1 <= count <= sum(SIZES.values()):
        raise ValueError(
            f"The number of GenEval prompts must be between 1 and {sum(SIZES.values()):,}; got {count:,}."
        )
    orders = {task: permutation(size, "geneval", task, seed)[:count].tolist() for task, size in SIZES.items()}
    prompts: list[str] = []
    turn = 0
    while len(prompts) < count:
        prompts += [
            format_prompt(_numbered(task, order[turn])) for task, order in orders.items() if turn < len(order)
        ]
        turn += 1
    return prompts[:count]


def format_prompt(asked: Requirement) -> str:
    """Format a requirement as a prompt of GenEval's grammar."""
    if asked.task == "counting":
        [thing] = asked.objects
        number = next(word for word, count in COUNTS.items() if count == thing.count)
        return f"a photo of {number} {_plural(thing.name)}"
    joint = f" {asked.relation or 'and'} "
    return "a photo of " + joint.join(_phrase(thing) for thing in asked.objects)


def parse_prompt(text: str) -> Requirement | None:
    """Parse a prompt of GenEval's grammar; return None for other prompts."""
    start, _, rest = text.strip().partition("a photo of ")
    if start:
        return None
    if rest in _COUNTED:
        return Requirement("counting", (_COUNTED[rest],))
    if rest in _PHRASES:
        return Requirement("colors" if _PHRASES[rest].color else "single_object", (_PHRASES[rest],))
    for joint in ("and", *RELATIONS):
        one, _, two = rest.partition(f" {joint} ")
        if one in _PHRASES and two in _PHRASES:
            return _pair_of(_PHRASES[one], _PHRASES[two], joint)
    return None


def _pair_of(one: ObjectSpec, two: ObjectSpec, joint: str) -> Requirement | None:
    colors = {one.color, two.color}
    if one.name == two.name:
        return None
    if colors == {None}:
        if joint == "and":
            return Requirement("two_object", (one, two))
        return Requirement("position", (one, two), joint)
    if joint != "and" or None in colors or len(colors) == 1:
        return None
    return Requirement("color_attr", (one, two))


def _numbered(task: str, index: int) -> Requirement:
    """Return the requirement with an index in range(TASK_SIZES[task])."""
    if task == "single_object":
        return Requirement(task, (ObjectSpec(NAMES[index]),))
    if task == "two_object":
        return Requirement(task, tuple(ObjectSpec(name) for name in _two_of(NAMES, index)))
    if task == "counting":
        name, count = divmod(index, len(COUNTS))
        return Requirement(task, (ObjectSpec(NAMES[name], list(COUNTS.values())[count]),))
    if task == "colors":
        name, color = divmod(index, len(COLORS))
        return Requirement(task, (ObjectSpec(THINGS[name], color=COLORS[color]),))
    if task == "position":
        names, relation = divmod(index, len(RELATIONS))
        objects = tuple(ObjectSpec(name) for name in _two_of(NAMES, names))
        return Requirement(task, objects, RELATIONS[relation])
    names, colors = divmod(index, len(COLORS) * (len(COLORS) - 1))
    both = zip(_two_of(THINGS, names), _two_of(COLORS, colors), strict=True)
    return Requirement(task, tuple(ObjectSpec(name, color=color) for name, color in both))


def _two_of(words: Sequence[str], index: int) -> tuple[str, str]:
    """Return the ordered pair of distinct words with an index."""
    one, two = divmod(index, len(words) - 1)
    return words[one], words[two + (two >= one)]


def _phrase(thing: ObjectSpec) -> str:
    words = f"{thing.color} {thing.name}" if thing.color else thing.name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """Form the plural by GenEval's rule, which ignores irregular nouns: knifes, skises."""
    return name + ("es" if name.endswith("s") else "s")


_COUNTED = {
    f"{word} {_plural(name)}": ObjectSpec(name, count) for name in NAMES for word, count in COUNTS.items()
}
_PHRASES = {
    _phrase(thing): thing
    for thing in (*map(ObjectSpec, NAMES), *(ObjectSpec(name, color=c) for name in THINGS for c in COLORS))
}


def correct(
    asked: Requirement,
    detections: Iterable[Detection],
    color_of: Callable[[Detection], str],
    *,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> bool:
    """Check an image's detections against its prompt as GenEval does.

    Counting needs the exact number of objects, other tasks at least one. Colors and positions are checked
    only for the requested number of detections, those with the highest scores.
    """
    threshold = counting_threshold if asked.task == "counting" else THRESHOLD
    ranked = sorted((one for one in detections if one.score > threshold), key=lambda one: -one.score)
    selected: list[list[Detection]] = []
    for thing in asked.objects:
        named = [one for one in ranked if one.name == thing.name][:MAX_DETECTIONS]
        if len(named) < thing.count or (asked.task == "counting" and len(named) > thing.count):
            return False
        selected.append(named[: thing.count])
        if thing.color and any(color_of(one) != thing.color for one in selected[-1]):
            return False
    if asked.relation is None:
        return True
    return all(asked.relation in relations(a.box, b.box) for a in selected[0] for b in selected[1])


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Return the positions of box a relative to box b (left, top, right, bottom): up to two of `RELATIONS`.

    Along each axis, the distance between centers is reduced by a tenth of the boxes' summed sizes; it must
    then exceed half of the total distance.
    """
    corners = np.asarray([a, b], dtype=np.float64).reshape(2, 2, 2)
    centers, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    shifts = np.maximum(np.abs(offset) - POSITION_SLACK * sizes.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(shifts) < 1e-3):
        return set()
    x, y = shifts / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, valid in holds.items() if valid}


def _asked(captions: Sequence[str]) -> list[Requirement | None]:
    asked = [parse_prompt(caption) for caption in captions]
    if not any(asked):
        raise ValueError(
            f"The metric geneval needs GenEval prompts; none of the {len(captions)} prompts is one. Use "
            "--prompts geneval."
        )
    return asked


def check(captions: Sequence[str]) -> None:
    """Raise ValueError if no caption is a GenEval prompt, and warn about tasks without prompts."""
    tasks = {one.task for one in _asked(captions) if one}
    if unused := [task for task in SIZES if task not in tasks]:
        warnings.warn(
            f"No prompt belongs to GenEval's {'task' if len(unused) == 1 else 'tasks'} {', '.join(unused)}; "
            "the mean "
            f"is over {len(tasks)} of {len(SIZES)} tasks.",
            stacklevel=2,
        )


class GenEval:
    """Checks images of GenEval prompts with a detector and a color classifier."""

    def __init__(self, detector: Detector, colors: ColorClassifier) -> None:
        self.detector, self.colors = detector, colors

    @classmethod
    def load(cls, source: str, device: Device) -> GenEval:
        """Load the models of `source`: "DETECTOR" or "DETECTOR,CLIP", each a hub id or folder."""
        parts = source.split(",")
        if len(parts) > 2 or not all(parts):
            raise ValueError(
                f"Cannot parse the models {source!r} of the metric geneval; write geneval=DETECTOR or "
                "geneval=DETECTOR,CLIP with a hub id or folder for each."
            )
        clip = parts[1] if len(parts) == 2 else CLIP
        return cls(Detector.load(parts[0], device), ColorClassifier(ClipScorer.load(clip, device=device)))

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return [N] for each task: 1 if an image passes its prompt's check, else 0; NaN for other tasks.

        `images` are uint8 [N, H, W, 3]. "geneval" covers all tasks. Raises ValueError if no caption is a
        GenEval prompt, or if the detector has no label for a requested object.
        """
        asked = _asked(captions)
        known = [one for one in asked if one]
        self.detector.require(thing.name for one in known for thing in one.objects)
        outputs = {metric.name: torch.full((len(captions),), torch.nan) for metric in EXTRA.metrics}
        for i, (image, one) in enumerate(zip(images, asked, strict=True)):
            if one:
                outputs["geneval"][i] = outputs[f"geneval_{one.task}"][i] = float(self._passes(image, one))
        return outputs

    def _passes(self, image: np.ndarray, asked: Requirement) -> bool:
        detections = self.detector.find(image, threshold=THRESHOLD)
        return correct(asked, detections, lambda one: self.colors(image, one))


def _overall(features: ImageFeatures) -> Statistic | None:
    """Return the mean of the tasks' shares; tasks without images of the given prompts are left out."""
    tasks = [features.outputs[f"geneval_{task}"] for task in SIZES if f"geneval_{task}" in features.outputs]
    if all(bool(values.isnan().all()) for values in tasks):
        return None
    return Mean(features, torch.stack(tasks))


def _metric(task: str, title: str, about: str) -> Metric:
    return share_metric(
        f"geneval_{task}", f"GenEval {title}", about=f"share of images {about}, according to a detector",
        group="GenEval by task",
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
            about="mean over GenEval's tasks of the share of images with the content of their prompt",
        ),
        _metric("single_object", "single object", "that contain the object of the prompt"),
        _metric("two_object", "two objects", "that contain both objects of the prompt"),
        _metric("counting", "counting", "with the exact number of objects of the prompt"),
        _metric("colors", "colors", "whose object has the color of the prompt"),
        _metric("position", "position", "with the relative position of the prompt"),
        _metric("color_attr", "color attribution", "with two objects, each in its color of the prompt"),
    ),
)  # fmt: skip

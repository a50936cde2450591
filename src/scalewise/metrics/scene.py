"""Scene metrics: whether an image of the mini is exactly what its caption says, and how cleanly it is drawn.

The mini's images are scenes drawn by a program, so the truth is known: `mini.detector` reads the content of
an image, GenEval's check (geneval.py) compares it with the caption, and every detected thing is compared with
its true drawing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalewise.metrics.base import ImageFeatures, Metric, Statistic, share_metric
from scalewise.metrics.clip import from_bytes
from scalewise.metrics.detection import Detection
from scalewise.metrics.extras import Device, Extra
from scalewise.metrics.frechet import distance_to
from scalewise.metrics.geneval import ObjectSpec, Requirement, correct
from scalewise.metrics.ssim import clip_box, shifted_ssim
from scalewise.mini.detector import (
    THRESHOLD,
    Detector,
    Found,
    Reading,
    clean_threshold,
    load_detector,
    read_images,
)
from scalewise.mini.grammar import BACKGROUNDS, TASKS, THINGS, Description, Thing, parse_caption
from scalewise.mini.scenes import SIDE, Item, drawing, layout

SHIFT = 3
"""Largest shift in pixels, along each axis, between a detected thing and its true drawing."""
LAYOUTS = 400
"""Number of random layouts from which the spread of a caption's layouts is estimated."""


class SceneJudge:
    """Checks images against captions of the mini's grammar."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, _source: str, device: Device) -> SceneJudge:
        """Load the shipped detector."""
        return cls(load_detector(device))

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return values [N] by metric for uint8 images [N, H, W, 3], features [N, D] and centers [N, 8].

        NaN where a metric does not apply: tasks of other captions, fidelity of images without a thing,
        centers of images that do not match, everything but the features for an empty caption. Raises
        CaptionError for other captions outside the mini's grammar.
        """
        described = [parse_caption(caption) if caption else None for caption in captions]
        pixels = from_bytes(images)
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        readings, features = read_images(self.detector, pixels)
        names = ["scene_match", *(f"scene_{task}" for task in TASKS), "scene_fidelity", "scene_clean"]
        outputs = {name: torch.full((len(images),), torch.nan) for name in names}
        outputs |= {"scene": features, "scene_centers": torch.full((len(images), 8), torch.nan)}
        outputs["scene_spread"] = torch.full((len(images),), torch.nan)
        for i, (reading, wanted) in enumerate(zip(readings, described, strict=True)):
            if wanted:
                for name, value in self._scores(pixels[i], reading, wanted).items():
                    outputs[name][i] = value
        return outputs

    def _scores(self, pixels: Tensor, reading: Reading, wanted: Description) -> dict[str, float | Tensor]:
        """Return the outputs of one image [3, 128, 128]."""
        passes = matches(reading, wanted)
        values = [fidelity(pixels, one.item, reading) for one in reading.found]
        scores: dict[str, float | Tensor] = {
            "scene_match": float(passes),
            f"scene_{wanted.task}": float(passes),
            "scene_clean": float(bool(values) and min(values) >= clean_threshold()),
            "scene_spread": expected_distance(wanted),
        }
        if values:
            scores["scene_fidelity"] = sum(values) / len(values)
        if passes:
            centers = centers_of([one.item for one in reading.found])
            scores["scene_centers"] = F.pad(centers, (0, 8 - len(centers)), value=torch.nan)
        return scores


def matches(reading: Reading, wanted: Description) -> bool:
    """Return whether an image has exactly what its caption says: GenEval's check of things, number, color and
    position, and besides the style, the background and no other things.
    """
    if (reading.style, reading.background) != (wanted.style, wanted.background):
        return False
    if len(reading.found) != sum(thing.count for thing in wanted.things):
        return False
    objects = tuple(ObjectSpec(thing.name, thing.count, thing.color) for thing in wanted.things)
    detections = {_detection(one): one for one in reading.found}
    return correct(
        Requirement(wanted.task, objects, wanted.relation), detections,
        lambda detection: str(detections[detection].item.color), counting_threshold=THRESHOLD,
    )  # fmt: skip


def _detection(found: Found) -> Detection:
    item = found.item
    return Detection(item.thing, (item.x, item.y, item.x + item.size, item.y + item.size), found.score)


def fidelity(pixels: Tensor, item: Item, reading: Reading) -> float:
    """Return the SSIM of a detected thing with its true drawing, in pixels [3, H, W] of 128 x 128 in [-1, 1].

    The drawing has the place, size, color and style that were detected, on the detected background. It is
    shifted by up to SHIFT pixels to the least squared error. Its part outside the image is left out. 0 if
    there is no such drawing: in the ink style, every thing has a color.
    """
    box = clip_box((item.x, item.y, item.x + item.size, item.y + item.size), SIDE, margin=SHIFT)
    if box is None or (reading.style == "ink" and item.color is None):
        return 0.0
    left, top, right, bottom = box
    true = true_drawing(reading.style, item, reading.background)
    true = true[:, top - item.y : bottom - item.y, left - item.x : right - item.x]
    return shifted_ssim(pixels, true, (left, top), shift=SHIFT)


@cache
def _drawn(style: str, thing: str, color: str | None, size: int, background: str) -> Tensor:
    page = np.empty((size, size, 3), np.float32)
    page[:] = BACKGROUNDS[background]
    sprite = np.asarray(drawing(style, thing, color, size), np.float32)
    alpha = sprite[..., 3:] / 255
    return torch.from_numpy((page * (1 - alpha) + sprite[..., :3] * alpha) / 127.5 - 1).permute(2, 0, 1)


def true_drawing(style: str, item: Item, background: str) -> Tensor:
    """Return the drawing of a thing on a background: pixels [3, S, S] in [-1, 1], S its size."""
    return _drawn(style, item.thing, item.color if style == "ink" else None, item.size, background)


def centers_of(items: Sequence[Item]) -> Tensor:
    """Return the centers of K items in pixels, sorted by name and place: [M], x and y by turns, M = 2 K."""
    ordered = sorted(items, key=lambda one: (one.thing, one.y, one.x))
    return torch.tensor([float(edge + i.size / 2) for i in ordered for edge in (i.x, i.y)])


def expected_distance(described: Description) -> float:
    """Return the mean distance in pixels between the centers of two random layouts of a description."""
    return _expected_distance(len(described.things), described.things[0].count, described.relation)


@cache
def _expected_distance(things: int, count: int, relation: str | None) -> float:
    named = tuple(Thing(name, None, count) for name in THINGS[:things])
    rng, described = random.Random(0), Description("noto", "white", named, relation)
    rows = torch.stack([centers_of(layout(described, rng)) for _ in range(2 * LAYOUTS)])
    return float(center_distance(rows[:LAYOUTS], rows[LAYOUTS:]).mean())


def center_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean distance [N] between corresponding centers of a and b [N, 8], ignoring NaN."""
    return (a - b).unflatten(1, (-1, 2)).norm(dim=2).nanmean(1)


def _diversity(features: ImageFeatures) -> Statistic | None:
    """Mean over images of the distance to other matching images of the prompt, relative to renders."""
    if "scene_centers" not in features.outputs:
        return None
    centers, spread = features.outputs["scene_centers"], features.outputs["scene_spread"]
    values = torch.full((len(centers),), torch.nan)
    for prompt in features.prompt.unique().tolist():
        rows = [
            i for i in (features.prompt == prompt).nonzero().flatten().tolist() if not centers[i, 0].isnan()
        ]
        pairs = list(combinations(rows, 2))
        if pairs:
            one, two = (torch.tensor(side) for side in zip(*pairs, strict=True))
            distance = center_distance(centers[one], centers[two]).mean()
            values[rows] = distance / spread[rows]
    return None if bool(values.isnan().all()) else features.mean_of(values)


def _frechet(features: ImageFeatures) -> Statistic | None:
    if "scene" not in features.outputs or "scene" not in features.real:
        return None
    return distance_to(features.outputs["scene"], features, features.real["scene"])


def _check(captions: Sequence[str]) -> None:
    for caption in captions:
        parse_caption(caption)


EXTRA = Extra(
    name="scene", load=SceneJudge.load, source=None, real=True, frechet=True, check=_check,
    metrics=(
        share_metric(
            "scene_match", "Scene match",
            about="share of images with exactly the things, number, colors, position, style and background "
            "of the caption, according to a detector",
        ),
        *(
            share_metric(
                f"scene_{task}", title, about=f"scene match of captions {about}", group="Scene match by task"
            )
            for task, title, about in (
                ("single_object", "Single object", "with one thing"),
                ("two_object", "Two objects", "with two things"),
                ("counting", "Counting", "with two to four of one thing"),
                ("colors", "Colors", "with one thing in one color"),
                ("position", "Position", "with the relative position of two things"),
                ("color_attr", "Color attribution", "with two things in a color each"),
            )
        ),
        Metric(
            name="scene_fidelity", title="Fidelity", better="higher", bounds=(-1, 1),
            statistic=lambda features: features.mean_output("scene_fidelity"),
            about="mean SSIM of every detected thing with its true drawing",
        ),
        share_metric(
            "scene_clean", "Clean",
            about="share of images of which every thing is as close to its true drawing as 99% of VAE "
            "reconstructions",
        ),
        Metric(
            name="scene_diversity", title="Layout diversity", better="higher", bounds=(0, float("inf")),
            statistic=_diversity, digits=2,
            about="mean distance between the places of things in images of one caption, relative to that in "
                  "renders (1)",
        ),
        Metric(
            name="scene_frechet", title="Scene Fréchet distance", better="lower", bounds=(0, float("inf")),
            statistic=_frechet, rounds=400, digits=1,
            about="Fréchet distance to renders of the same captions, in the detector's features",
        ),
    ),
)  # fmt: skip

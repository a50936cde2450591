"""The mini's detector: reads the content of a scene from its pixels, to judge generated images.

A convolutional network (centernet.py) predicts a heat map over 32 x 32 cells for each thing, with size and
ink color at each cell, and style and background of the image. It was trained on renders by
scripts/mini; its errors are measured in MODEL_CARD.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scalewise.mini import DETECTOR
from scalewise.mini.centernet import STRIDE, CenterNet, find_peaks
from scalewise.mini.grammar import BACKGROUNDS, INKS, STYLES, THINGS
from scalewise.mini.scenes import LARGE, SIDE, SMALL, Item

COLORS, GROUNDS, SIZES = (None, *INKS), tuple(BACKGROUNDS), (LARGE, SMALL)
CELLS = SIDE // STRIDE
FEATURES = 128
"""Width of the features of an image, used for the Fréchet distance."""
THRESHOLD = 0.3
"""Minimum score of a detection, as in GenEval."""
SUPPRESSED = 5
"""Radius in cells around a detection without others; centers of two things are at least 12 cells apart."""
CHUNK = 64


@dataclass(frozen=True)
class Found:
    """A detected thing: its content and place in the image, and the score of the detection in [0, 1]."""

    item: Item
    score: float


@dataclass(frozen=True)
class Reading:
    """The content that the detector reads from an image."""

    style: str
    background: str
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Logits:
    """Output of the detector: things [N, 32, 32, 32], sizes [N, 2, 32, 32] and colors [N, 7, 32, 32] by cell;
    style [N, 2], background [N, 9] and features [N, FEATURES] of the image.
    """

    things: Tensor
    sizes: Tensor
    colors: Tensor
    style: Tensor
    background: Tensor
    features: Tensor


class Detector(CenterNet):
    """Maps images [N, 3, 128, 128] in [-1, 1] to `Logits`."""

    def __init__(self) -> None:
        super().__init__(
            (48, 96, FEATURES), joined=64, outputs=(len(THINGS), len(SIZES), len(COLORS)),
            image=len(STYLES) + len(GROUNDS), stem=2,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Logits:
        (things, sizes, colors), image, features = self.outputs_of(x)
        style, background = image.split((len(STYLES), len(GROUNDS)), dim=1)
        return Logits(things, sizes, colors, style, background, features)


@cache
def clean_threshold() -> float:
    """Return the fidelity that 99% of the things in VAE reconstructions of held-out scenes exceed.

    It was measured with the detector and is stored with its weights.
    """
    with safe_open(DETECTOR, "pt") as file:
        return float(file.metadata()["clean"])


@cache
def load_detector(device: torch.device | str = "cpu") -> Detector:
    """Load the shipped detector in float32, for reading only."""
    model = Detector()
    model.load_state_dict({name: value.float() for name, value in load_file(DETECTOR).items()})
    return model.eval().requires_grad_(False).to(device)


def center_cell(item: Item) -> tuple[int, int]:
    """Return the cell (row, column) of an item's center."""
    return (item.y + item.size // 2) // STRIDE, (item.x + item.size // 2) // STRIDE


@torch.no_grad()
def read_images(
    model: Detector, pixels: Tensor, *, threshold: float = THRESHOLD
) -> tuple[list[Reading], Tensor]:
    """Read images [N, 3, 128, 128] in [-1, 1]; returns their content and their features [N, FEATURES]."""
    readings: list[Reading] = []
    features = []
    device = next(model.parameters()).device
    for part in pixels.split(CHUNK):
        logits = model(part.to(device))
        readings += _readings(logits, threshold)
        features.append(logits.features.float().cpu())
    return readings, torch.cat(features)


def _readings(logits: Logits, threshold: float) -> list[Reading]:
    sizes, colors = logits.sizes.argmax(1), logits.colors.argmax(1)
    found: list[list[Found]] = [[] for _ in range(len(sizes))]
    for n, row, column, name, score in find_peaks(logits.things, threshold=threshold, radius=SUPPRESSED):
        size = SIZES[int(sizes[n, row, column])]
        item = Item(
            THINGS[name], COLORS[int(colors[n, row, column])],
            STRIDE * column - size // 2, STRIDE * row - size // 2, size,
        )  # fmt: skip
        found[n].append(Found(item, score))
    styles, grounds = logits.style.argmax(1).tolist(), logits.background.argmax(1).tolist()
    return [
        Reading(STYLES[style], GROUNDS[ground], tuple(sorted(one, key=lambda f: -f.score)))
        for style, ground, one in zip(styles, grounds, found, strict=True)
    ]

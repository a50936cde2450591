"""The mini's detector: reads the content of a scene from its pixels, to judge generated images.

A convolutional network predicts a heat map over 32 x 32 cells for each thing (CenterNet, arXiv 1904.07850),
with size and ink color at each cell, and style and background of the image. It was trained on renders by
scripts/mini; its errors are measured in MODEL_CARD.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scalewise.mini import DETECTOR
from scalewise.mini.grammar import BACKGROUNDS, INKS, STYLES, THINGS
from scalewise.mini.scenes import LARGE, SIDE, SMALL, Item

COLORS, GROUNDS, SIZES = (None, *INKS), tuple(BACKGROUNDS), (LARGE, SMALL)
STRIDE, CELLS = 4, SIDE // 4
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


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


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


class Detector(nn.Module):
    """Maps images [N, 3, 128, 128] in [-1, 1] to `Logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 8, stride=STRIDE, padding=2), _Block(48), _Block(48))
        self.down = nn.Sequential(nn.Conv2d(48, 96, 4, stride=2, padding=1), _Block(96), _Block(96))
        self.low = nn.Sequential(
            nn.Conv2d(96, FEATURES, 4, stride=2, padding=1), _Block(FEATURES), _Block(FEATURES)
        )
        self.up_1 = nn.Conv2d(FEATURES, 96, 1)
        self.up_2 = nn.Conv2d(96, 64, 1)
        self.skip = nn.Conv2d(48, 64, 1)
        self.last = _Block(64)
        self.cells = nn.Conv2d(64, len(THINGS) + len(SIZES) + len(COLORS), 1)
        assert self.cells.bias is not None
        nn.init.constant_(self.cells.bias, -4.0)  # hardly any cell is the center of a thing
        self.image = nn.Linear(FEATURES, len(STYLES) + len(GROUNDS))

    def forward(self, x: Tensor) -> Logits:
        fine = self.stem(x)
        middle = self.down(fine)
        low = self.low(middle)
        joined = middle + F.interpolate(self.up_1(low), scale_factor=2.0)
        joined = self.skip(fine) + F.interpolate(self.up_2(joined), scale_factor=2.0)
        cells: Sequence[Tensor] = self.cells(self.last(joined)).split(
            (len(THINGS), len(SIZES), len(COLORS)), dim=1
        )
        features = low.mean((2, 3))
        style, background = self.image(features).split((len(STYLES), len(GROUNDS)), dim=1)
        things, sizes, colors = cells
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
    scores, names = logits.things.sigmoid().max(1)  # [N, 32, 32]
    window = 2 * SUPPRESSED + 1
    nearby = F.max_pool2d(scores[:, None], window, stride=1, padding=SUPPRESSED)[:, 0]
    peaks = (scores == nearby) & (scores > threshold)
    sizes, colors = logits.sizes.argmax(1), logits.colors.argmax(1)
    found: list[list[Found]] = [[] for _ in range(len(scores))]
    for n, row, column in peaks.nonzero().tolist():
        size = SIZES[int(sizes[n, row, column])]
        item = Item(
            THINGS[int(names[n, row, column])], COLORS[int(colors[n, row, column])],
            STRIDE * column - size // 2, STRIDE * row - size // 2, size,
        )  # fmt: skip
        found[n].append(Found(item, float(scores[n, row, column])))
    styles, grounds = logits.style.argmax(1).tolist(), logits.background.argmax(1).tolist()
    return [
        Reading(STYLES[style], GROUNDS[ground], tuple(sorted(one, key=lambda f: -f.score)))
        for style, ground, one in zip(styles, grounds, found, strict=True)
    ]

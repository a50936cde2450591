"""The detector of the video mini: reads the things of every frame and their poses, to judge generated videos.

A convolutional network predicts a heat map over 16 x 16 cells for each thing (CenterNet, arXiv 1904.07850),
with offset, size and angle at each cell, and the background of the frame. scripts/mini/video_detector.py
trains it and measures its errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scalewise.mini.motions import GROUNDS, MOVING
from scalewise.mini.videos import SIDE, SIZE, Pose

STRIDE, CELLS = 4, SIDE // 4
THRESHOLD = 0.3
"""Minimum score of a detection."""
SUPPRESSED = 3
"""Radius in cells around a detection without others; centers of two things are 8 cells apart or more."""
CHUNK = 144
CLEAN = "clean"
"""Key in the metadata of the weights: the lowest fidelity of a frame that 99% of reconstructions exceed."""


@dataclass(frozen=True)
class Seen:
    """A detected thing, its pose in the frame and the score of the detection in [0, 1]."""

    thing: str
    pose: Pose
    score: float


@dataclass(frozen=True)
class Frame:
    """The content that the detector reads from a frame; the highest score comes first."""

    background: str
    found: tuple[Seen, ...]


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
    """Output of the detector by cell: things [N, 12, 16, 16], offsets of the center [N, 2, 16, 16] in cells,
    log2 of size / 32 [N, 1, 16, 16], cosine and sine of the angle [N, 2, 16, 16]; background [N, 4].
    """

    things: Tensor
    offsets: Tensor
    sizes: Tensor
    angles: Tensor
    background: Tensor


class VideoDetector(nn.Module):
    """Maps frames [N, 3, 64, 64] in [-1, 1] to `Logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, stride=STRIDE, padding=2), _Block(32))
        self.down = nn.Sequential(nn.Conv2d(32, 64, 4, stride=2, padding=1), _Block(64), _Block(64))
        self.low = nn.Sequential(nn.Conv2d(64, 96, 4, stride=2, padding=1), _Block(96), _Block(96))
        self.up_1, self.up_2 = nn.Conv2d(96, 64, 1), nn.Conv2d(64, 48, 1)
        self.skip = nn.Conv2d(32, 48, 1)
        self.last = _Block(48)
        self.parts = (len(MOVING), 2, 1, 2)
        self.cells = nn.Conv2d(48, sum(self.parts), 1)
        assert self.cells.bias is not None
        nn.init.zeros_(self.cells.bias)
        nn.init.constant_(self.cells.bias[: len(MOVING)], -4.0)  # hardly any cell is the center of a thing
        self.image = nn.Linear(96, len(GROUNDS))

    def forward(self, x: Tensor) -> Logits:
        fine = self.stem(x)
        middle = self.down(fine)
        low = self.low(middle)
        joined = middle + F.interpolate(self.up_1(low), scale_factor=2.0)
        joined = self.skip(fine) + F.interpolate(self.up_2(joined), scale_factor=2.0)
        cells: Sequence[Tensor] = self.cells(self.last(joined)).split(self.parts, dim=1)
        things, offsets, sizes, angles = cells
        return Logits(things, offsets, sizes, angles, self.image(low.mean((2, 3))))


def load_video_detector(path: Path, device: torch.device | str = "cpu") -> tuple[VideoDetector, float]:
    """Load a detector in float32 for reading, and the fidelity that counts as clean.

    Raises ValueError if the file is missing or is not a video detector.
    """
    model = VideoDetector()
    try:
        with safe_open(path, "pt") as file:
            clean = float(file.metadata()[CLEAN])
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"Cannot load the video detector {path} ({type(error).__name__}); use the file that "
            "scripts/mini/video_detector.py writes."
        ) from error
    return model.eval().requires_grad_(False).to(device), clean


def center_cell(pose: Pose) -> tuple[int, int]:
    """Return the cell (row, column) of a center; cells at the border hold centers outside the frame."""
    return tuple(min(max(math.floor(part / STRIDE), 0), CELLS - 1) for part in (pose.y, pose.x))  # type: ignore[return-value]


def encode_pose(pose: Pose) -> list[float]:
    """Return the targets [5] of a pose at its cell: offset x and y in cells, log2 size, cosine and sine."""
    row, column = center_cell(pose)
    angle = math.radians(pose.angle)
    offsets = [pose.x / STRIDE - column - 0.5, pose.y / STRIDE - row - 0.5]
    return [*offsets, math.log2(pose.size / SIZE), math.cos(angle), math.sin(angle)]


def decode_pose(row: int, column: int, values: Sequence[float]) -> Pose:
    """Invert `encode_pose`; the angle is in (-180, 180]."""
    x, y, size, cos, sin = values
    return Pose(
        STRIDE * (column + 0.5 + x), STRIDE * (row + 0.5 + y), SIZE * 2.0**size,
        math.degrees(math.atan2(sin, cos)),
    )  # fmt: skip


@torch.no_grad()
def read_frames(model: VideoDetector, pixels: Tensor) -> list[Frame]:
    """Read frames [N, 3, 64, 64] in [-1, 1]."""
    device = next(model.parameters()).device
    return [frame for part in pixels.split(CHUNK) for frame in _read(model(part.to(device)))]


def _read(logits: Logits) -> list[Frame]:
    scores, names = logits.things.sigmoid().max(1)  # [N, 16, 16]
    window = 2 * SUPPRESSED + 1
    nearby = F.max_pool2d(scores[:, None], window, stride=1, padding=SUPPRESSED)[:, 0]
    peaks = ((scores == nearby) & (scores > THRESHOLD)).nonzero()
    poses = torch.cat([logits.offsets, logits.sizes, logits.angles], 1)
    found: list[list[Seen]] = [[] for _ in range(len(scores))]
    for n, row, column in peaks.tolist():
        pose = decode_pose(row, column, poses[n, :, row, column].tolist())
        found[n].append(Seen(MOVING[int(names[n, row, column])], pose, float(scores[n, row, column])))
    grounds = logits.background.argmax(1).tolist()
    return [
        Frame(GROUNDS[ground], tuple(sorted(one, key=lambda seen: -seen.score)))
        for ground, one in zip(grounds, found, strict=True)
    ]

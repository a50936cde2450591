"""The detector of the video mini: reads the things of every frame and their poses, to judge generated videos.

A convolutional network (centernet.py) predicts a heat map over 16 x 16 cells for each thing, with offset,
size and angle at each cell, and the background of the frame. scripts/mini/video_detector.py
trains it and measures its errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scalewise.mini.centernet import STRIDE, CenterNet, find_peaks
from scalewise.mini.motions import GROUNDS, MOVING
from scalewise.mini.videos import SIDE, SIZE, Pose

CELLS = SIDE // STRIDE
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


class VideoDetector(CenterNet):
    """Maps frames [N, 3, 64, 64] in [-1, 1] to `Logits`."""

    def __init__(self) -> None:
        super().__init__((32, 64, 96), joined=48, outputs=(len(MOVING), 2, 1, 2), image=len(GROUNDS), stem=1)

    def forward(self, x: Tensor) -> Logits:
        (things, offsets, sizes, angles), background, _ = self.outputs_of(x)
        return Logits(things, offsets, sizes, angles, background)


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
    poses = torch.cat([logits.offsets, logits.sizes, logits.angles], 1)
    found: list[list[Seen]] = [[] for _ in range(len(poses))]
    for n, row, column, name, score in find_peaks(logits.things, threshold=THRESHOLD, radius=SUPPRESSED):
        pose = decode_pose(row, column, poses[n, :, row, column].tolist())
        found[n].append(Seen(MOVING[name], pose, score))
    grounds = logits.background.argmax(1).tolist()
    return [
        Frame(GROUNDS[ground], tuple(sorted(one, key=lambda seen: -seen.score)))
        for ground, one in zip(grounds, found, strict=True)
    ]

"""Videos of the video mini: the emoji set in motion, rendered on the fly, with captions that say how.

    python scripts/mini/first/video.py --sheet sheet.png    # one clip of every motion, frame by frame

A clip is a function of its picture, motion and seed. One style, three subjects: breadth that a small model
learns in an hour.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from common import to_float
from pictures import Pictures, load_pictures
from torch import Tensor

FRAMES, SIDE = 9, 48
STYLE, CATEGORIES = "fluent-flat", ("animals-nature", "food-drink", "travel-places")

Path2D = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, y in [-1, 1] (y downwards), size and angle in radians, each [FRAMES]."""


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def moving(x: float, y: float) -> Callable[[Tensor, torch.Generator], Path2D]:
    """From one side to the other."""

    def path(u: Tensor, rng: torch.Generator) -> Path2D:
        reach, off = uniform(0.4, 0.55, rng), uniform(-0.12, 0.12, rng)
        along = reach * (2 * u - 1)
        return x * along + off * abs(y), y * along + off * abs(x), torch.ones_like(u), torch.zeros_like(u)

    return path


def sizing(start: float, end: float) -> Callable[[Tensor, torch.Generator], Path2D]:
    """Grow or shrink in the middle."""

    def path(u: Tensor, rng: torch.Generator) -> Path2D:
        x, y = (uniform(-0.1, 0.1, rng) + torch.zeros_like(u) for _ in range(2))
        return x, y, start * (end / start) ** u, torch.zeros_like(u)

    return path


def turning(u: Tensor, rng: torch.Generator) -> Path2D:
    """Half a turn clockwise."""
    x, y = (uniform(-0.1, 0.1, rng) + torch.zeros_like(u) for _ in range(2))
    return x, y, torch.full_like(u, 1.1), math.pi * u


def bouncing(u: Tensor, rng: torch.Generator) -> Path2D:
    """Up and down twice."""
    height, x = uniform(0.5, 0.7, rng), uniform(-0.15, 0.15, rng)
    return x + torch.zeros_like(u), 0.35 - height * (2 * math.pi * u).sin().abs(), torch.ones_like(u), 0 * u


MOTIONS: dict[str, Callable[[Tensor, torch.Generator], Path2D]] = {
    "moving to the right": moving(1, 0),
    "moving to the left": moving(-1, 0),
    "moving up": moving(0, -1),
    "moving down": moving(0, 1),
    "growing": sizing(0.5, 1.4),
    "shrinking": sizing(1.4, 0.5),
    "turning": turning,
    "bouncing": bouncing,
    "standing still": sizing(1.1, 1.1),
}


@dataclass(frozen=True)
class Clip:
    """One video of the set: which picture, which motion, which split."""

    picture: int
    text: str
    motion: str

    @property
    def caption(self) -> str:
        return f"{self.text} {self.motion}"

    @property
    def number(self) -> int:
        """What decides on its seed and split."""
        return int(hashlib.md5(self.caption.encode()).hexdigest(), 16)

    @property
    def split(self) -> str:
        """A sixth of all pairs of object and motion is held out; every object is seen in other motions."""
        return "test" if self.number % 6 == 0 else "train"


class Clips:
    """All clips, by number."""

    def __init__(self) -> None:
        everything = load_pictures(split="train")
        self.pictures: Pictures = everything.select(
            lambda r: r["style"] == STYLE and r["category"] in CATEGORIES
        )
        self.all = [
            Clip(i, r["text"], motion) for i, r in enumerate(self.pictures.records) for motion in MOTIONS
        ]

    def of(self, split: str) -> list[Clip]:
        return [clip for clip in self.all if clip.split == split]

    @property
    def captions(self) -> list[str]:
        return [clip.caption for clip in self.all]

    @cached_property
    def pixels(self) -> Tensor:
        """The pictures [N, 3, 128, 128] in [-1, 1]."""
        return to_float(self.pictures.pixels)

    def render(self, clip: Clip) -> Tensor:
        """The clip's pixels [3, FRAMES, SIDE, SIDE] in [-1, 1]; always the same."""
        rng = torch.Generator().manual_seed(clip.number % 2**31)
        return render(self.pixels[clip.picture], MOTIONS[clip.motion], rng)


def render(
    picture: Tensor, motion: Callable[[Tensor, torch.Generator], Path2D], rng: torch.Generator
) -> Tensor:
    """Move a picture [3, 128, 128] over white ground: [3, FRAMES, SIDE, SIDE]; drawn at twice the size."""
    x, y, size, angle = motion(torch.linspace(0, 1, FRAMES), rng)
    # What lies at p in the frame is found at R^-1 (p - centre) / size in the picture.
    zoom = 1 / (uniform(0.48, 0.58, rng) * size)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos, sin, -cos * x - sin * y], 1),
            torch.stack([-sin, cos, sin * x - cos * y], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [FRAMES, 3, 2 * SIDE, 2 * SIDE], align_corners=False)
    # Zeros beyond the picture's edge: white, once 1 is added again.
    moved = F.grid_sample((picture - 1).expand(FRAMES, -1, -1, -1), grid, align_corners=False) + 1
    return F.avg_pool2d(moved, 2).transpose(0, 1).clamp(-1, 1)


def filmstrip(clips: Tensor, path: Path, *, every: int = 1) -> None:
    """Save clips [N, 3, F, H, W] as one image, a row each, of every so manieth frame."""
    from scalewise.common.images import contact_sheet, to_bytes

    frames = [frame for clip in clips for frame in to_bytes(clip.transpose(0, 1))[::every]]
    contact_sheet(frames, columns=len(range(0, clips.shape[2], every)), gap=2).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, required=True)
    clips = Clips()
    known, held_out = len(clips.of("train")), len(clips.of("test"))
    print(f"{len(clips.pictures.records)} objects, {known} clips, {held_out} held out")
    chosen = clips.all[:: len(MOTIONS) * 17 + 1][: len(MOTIONS)]
    print([clip.caption for clip in chosen])
    filmstrip(torch.stack([clips.render(clip) for clip in chosen]), parser.parse_args().sheet)

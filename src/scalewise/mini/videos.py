"""Videos of the video mini: where the things of a description are in every frame, drawn by a program.

The truth of every frame is known exactly. Things move by 4 pixels per frame from places on a grid of 8
pixels, so that latents (8 pixels and 2 frames wide) of the same thing are equal up to a shift.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from scalewise.mini.grammar import BACKGROUNDS
from scalewise.mini.motions import (
    CROSS,
    DOWN,
    GROW,
    LEFT,
    RIGHT,
    SHRINK,
    TURN,
    UP,
    Motion,
    all_descriptions,
    parse_motion,
    write_motion,
)
from scalewise.mini.scenes import SPRITE, drawing

FRAMES, SIDE, SIZE, GRID = 9, 64, 32, 8
SPEED, SMALLEST, LARGEST, TURNED = 4, 24, 48, 90
"""Pixels per frame of a movement; pixels at both ends of growing; degrees of a whole turn."""
PATCH = 52
"""Side in pixels of the part of a frame that a thing is drawn in: the largest size with a margin."""
_FINE = 4


@dataclass(frozen=True)
class Pose:
    """Place of a thing in a frame: center and size in pixels, angle in degrees (clockwise)."""

    x: float
    y: float
    size: float = SIZE
    angle: float = 0


@dataclass(frozen=True)
class Track:
    """A thing and its pose in every frame."""

    thing: str
    poses: tuple[Pose, ...]


@dataclass(frozen=True)
class Video:
    """The exact content of a video, and a caption of it."""

    description: Motion
    tracks: tuple[Track, ...]
    caption: str


@cache
def course(motion: str) -> tuple[Pose, ...]:
    """Return the poses of a motion of one thing, with centers relative to their mean."""
    path = [SPEED * (i - (FRAMES - 1) / 2) for i in range(FRAMES)]
    sizes = [SMALLEST + (LARGEST - SMALLEST) * i / (FRAMES - 1) for i in range(FRAMES)]
    poses = {
        LEFT: [Pose(-step, 0) for step in path],
        RIGHT: [Pose(step, 0) for step in path],
        UP: [Pose(0, -step) for step in path],
        DOWN: [Pose(0, step) for step in path],
        TURN: [Pose(0, 0, angle=TURNED * i / (FRAMES - 1)) for i in range(FRAMES)],
        GROW: [Pose(0, 0, size) for size in sizes],
        SHRINK: [Pose(0, 0, size) for size in reversed(sizes)],
    }
    return tuple(poses[motion])


def layouts(description: Motion) -> list[tuple[Track, ...]]:
    """Return everything that a description leaves open: the tracks of each of its videos."""
    middle, things, motion = SIDE // 2, description.things, description.motion
    if motion == CROSS:
        found = []
        for heights in ((16, 48), (48, 16)):
            for ways in ((LEFT, RIGHT), (RIGHT, LEFT)):
                pairs = zip(things, ways, heights, strict=True)
                found.append(tuple(_track(thing, way, middle, y) for thing, way, y in pairs))
        return found
    rows = range(SIZE // 2, SIDE - SIZE // 2 + 1, GRID)
    near = range(middle - GRID, middle + GRID + 1, GRID)
    if motion in (LEFT, RIGHT):
        centers = [(middle, y) for y in rows]
    elif motion in (UP, DOWN):
        centers = [(x, middle) for x in rows]
    else:
        centers = [(x, y) for x in near for y in near]
    return [(_track(things[0], motion, x, y),) for x, y in centers]


def _track(thing: str, motion: str, x: float, y: float) -> Track:
    return Track(thing, tuple(Pose(x + p.x, y + p.y, p.size, p.angle) for p in course(motion)))


def random_video(rng: random.Random, *, held_out: bool = False, motion: str | None = None) -> Video:
    """Generate a video of a random motion, or of a given one, whose combination is held out or not."""
    chosen = motion or rng.choice(sorted(_by_motion(held_out)))
    description = rng.choice(_by_motion(held_out)[chosen])
    return Video(description, rng.choice(layouts(description)), write_motion(description, rng))


@cache
def _by_motion(held_out: bool) -> dict[str, list[Motion]]:
    found: dict[str, list[Motion]] = {}
    for description in all_descriptions():
        if description.held_out == held_out:
            found.setdefault(description.motion, []).append(description)
    return found


def video_of(caption: str, rng: random.Random) -> Video:
    """Generate a video of a caption; CaptionError if it is not one of the video mini's grammar."""
    description = parse_motion(caption)
    return Video(description, rng.choice(layouts(description)), caption)


def render_video(video: Video) -> np.ndarray:
    """Render a video as uint8 [9, 64, 64, 3]."""
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.float32)
    frames[:] = BACKGROUNDS[video.description.background]
    for track in video.tracks:
        for frame, pose in zip(frames, track.poses, strict=True):
            draw_thing(frame, track.thing, pose)
    return (frames + 0.5).astype(np.uint8)


def render_videos(captions: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """Render a video of every caption: uint8 [N, 9, 64, 64, 3]; CaptionError for other captions."""
    rng = random.Random(f"videos {seed}")
    return np.stack([render_video(video_of(caption, rng)) for caption in captions])


def draw_thing(frame: np.ndarray, thing: str, pose: Pose) -> None:
    """Draw a thing into a frame, float32 [H, W, 3] in [0, 255], in place; parts outside are left out."""
    left, top = math.floor(pose.x) - PATCH // 2, math.floor(pose.y) - PATCH // 2
    rest = (round(pose.x % 1, 3), round(pose.y % 1, 3))
    color, alpha = _patch(thing, round(pose.size, 3), round(pose.angle, 3), rest)
    height, width = frame.shape[:2]
    rows = slice(max(top, 0), max(min(top + PATCH, height), 0))
    columns = slice(max(left, 0), max(min(left + PATCH, width), 0))
    inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    frame[rows, columns] += alpha[inside] * (color[inside] - frame[rows, columns])


@cache
def _noto(thing: str) -> Image.Image:
    return drawing("noto", thing, None, SPRITE)


def _patch(thing: str, size: float, angle: float, rest: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return color [PATCH, PATCH, 3] and alpha [PATCH, PATCH, 1] of a thing whose center is at the middle of
    the patch, moved by `rest` pixels.
    """
    on_grid = rest == (0, 0) and SMALLEST <= size <= LARGEST and size % 1 == 0
    if on_grid and 0 <= angle <= TURNED:
        return _cached_patch(thing, size, angle)
    return _draw_patch(thing, size, angle, rest)


@cache
def _cached_patch(thing: str, size: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return _draw_patch(thing, size, angle, (0, 0))


def _draw_patch(
    thing: str, size: float, angle: float, rest: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    side, zoom = _FINE * PATCH, SPRITE / (_FINE * size)
    cos, sin = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
    x, y = (side / 2 + _FINE * part for part in rest)
    # What is at p in the patch is at R^-1 (p - center) * zoom in the drawing, measured from its middle.
    inverse = (
        cos, sin, SPRITE / 2 - cos * x - sin * y,
        -sin, cos, SPRITE / 2 + sin * x - cos * y,
    )  # fmt: skip
    fine = _noto(thing).transform(
        (side, side), Image.Transform.AFFINE, inverse, resample=Image.Resampling.BICUBIC
    )
    pixels = np.asarray(fine.reduce(_FINE), np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255

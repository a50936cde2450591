"""Scenes of the mini: where the things of a description lie, and the image, drawn by a program.

The truth of every scene is known exactly. Positions are on a grid of 16 pixels and there are two sizes, so
latents of the same thing are equal up to a shift.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from scalewise.mini import DRAWINGS
from scalewise.mini.grammar import (
    BACKGROUNDS,
    INKS,
    STYLES,
    TASKS,
    THINGS,
    Description,
    parse_caption,
    random_description,
    write_caption,
)

SPRITE = 112
"""Side of a drawing on the sheet DRAWINGS, which has a row of THINGS for every style."""
SIDE, LARGE, SMALL, GRID = 128, 96, 56, 16


@dataclass(frozen=True)
class Item:
    """A thing in a scene: its name, its ink color (None outside the ink style), its box in pixels."""

    thing: str
    color: str | None
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """The exact content of an image, and a caption of it."""

    description: Description
    items: tuple[Item, ...]
    caption: str


def random_scene(rng: random.Random, *, held_out: bool = False, task: str | None = None) -> Scene:
    """Generate a scene whose combination is held out, or one that may be used in training."""
    while True:
        description = random_description(rng, task=task)
        if description.held_out == held_out:
            return Scene(description, layout(description, rng), write_caption(description, rng))


def scene_of(caption: str, rng: random.Random) -> Scene:
    """Generate a scene of a caption; CaptionError if it is not one of the mini's grammar."""
    description = parse_caption(caption)
    return Scene(description, layout(description, rng), caption)


def layout(description: Description, rng: random.Random) -> tuple[Item, ...]:
    """Choose positions for the things of a description, uniformly among those that the caption leaves open.

    The first item of a position is the first thing of the description.
    """
    things = description.things
    if len(things) == 1 and things[0].count == 1:
        x, y = GRID * rng.randint(0, 2), GRID * rng.randint(0, 2)
        return (Item(things[0].name, things[0].color, x, y, LARGE),)
    if len(things) == 1:
        cells = _cells(rng, things[0].count)
        return tuple(_small(things[0].name, things[0].color, cell) for cell in cells)
    across = rng.random() < 0.5 if description.relation is None else description.relation == "left of"
    pair = _pair(rng, across)
    if description.relation is None and rng.random() < 0.5:
        pair = (pair[1], pair[0])
    return tuple(_small(t.name, t.color, cell) for t, cell in zip(things, pair, strict=True))


def render(scene: Scene) -> np.ndarray:
    """Render a scene as a uint8 image [128, 128, 3]."""
    description = scene.description
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[description.background])
    for item in scene.items:
        sprite = drawing(description.style, item.thing, item.color, item.size)
        image.paste(sprite, (item.x, item.y), sprite)
    return np.asarray(image)


def render_captions(captions: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """Render a scene for every caption: uint8 images [N, 128, 128, 3]; CaptionError for other captions."""
    rng = random.Random(f"render {seed}")
    return np.stack([render(scene_of(caption, rng)) for caption in captions])


@cache
def drawing(style: str, thing: str, color: str | None, size: int) -> Image.Image:
    """Return the RGBA drawing of a thing, size x size pixels, in its ink color if it has one."""
    row, column = STYLES.index(style), THINGS.index(thing)
    left, top = SPRITE * column, SPRITE * row
    image = _sheet().crop((left, top, left + SPRITE, top + SPRITE))
    if color is not None:
        filled = Image.new("RGBA", image.size, (*INKS[color], 0))
        filled.putalpha(image.getchannel("A"))
        image = filled
    return image.resize((size, size), Image.Resampling.LANCZOS)


@cache
def held_out_captions(count: int) -> tuple[str, ...]:
    """Return distinct captions of held-out combinations, alternating between GenEval's tasks.

    A shorter list is a prefix of a longer one. A task is skipped once its captions are used up.
    """
    rngs = {task: random.Random(f"held out {task}") for task in TASKS}
    found: dict[str, None] = {}
    while len(found) < count and rngs:
        for task, rng in list(rngs.items()):
            for _ in range(2000):
                caption = random_scene(rng, held_out=True, task=task).caption
                if caption not in found:
                    found[caption] = None
                    break
            else:
                del rngs[task]
    return tuple(found)[:count]


@cache
def training_captions(count: int) -> tuple[str, ...]:
    """Return distinct captions of combinations that are not held out; a shorter list is a prefix."""
    rng, found = random.Random("training captions"), dict[str, None]()
    while len(found) < count:
        found[random_scene(rng).caption] = None
    return tuple(found)


@cache
def _sheet() -> Image.Image:
    return Image.open(DRAWINGS).convert("RGBA")


def _small(thing: str, color: str | None, cell: tuple[int, int]) -> Item:
    return Item(thing, color, cell[0] + 4, cell[1] + 4, SMALL)


def _pair(rng: random.Random, across: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    free = [GRID * rng.randint(0, 4) for _ in range(2)]
    return ((0, free[0]), (64, free[1])) if across else ((free[0], 0), (free[1], 64))


def _cells(rng: random.Random, count: int) -> list[tuple[int, int]]:
    if count == 2:
        return list(_pair(rng, rng.random() < 0.5))
    corners = [(0, 0), (64, 0), (0, 64), (64, 64)]
    return rng.sample(corners, 3) if count == 3 else corners

"""World, stage 2: scenes of things, with their captions and exact content.

    python scripts/mini/world_scenes.py          # save a contact sheet, print the rendering speed

A scene has a style, a background, items (thing, color, box) and a caption from a small grammar. Positions are
on a grid of 16 pixels and there are two sizes, so latents of the same thing are equal up to a shift. The
caption does not determine exact positions. One combination in ten, chosen by a hash, is held out from all
training.
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
from common import work_folder
from PIL import Image
from world_things import THINGS, sprites

SIDE, LARGE, SMALL, GRID = 128, 96, 56, 16
STYLES = ("noto", "ink")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (120, 170, 250),
    "green": (140, 215, 140),
    "yellow": (250, 225, 120),
    "pink": (250, 180, 205),
    "gray": (190, 195, 200),
    "black": (35, 35, 45),
    "purple": (185, 150, 235),
    "orange": (250, 180, 110),
}
INK_BACKGROUNDS = ("white", "yellow", "pink", "gray")
"""Backgrounds on which every ink color is distinguishable."""
INKS = {
    "red": (215, 40, 40),
    "blue": (40, 80, 215),
    "green": (30, 150, 60),
    "orange": (235, 125, 20),
    "purple": (130, 50, 190),
    "black": (20, 20, 25),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"butterfly": "butterflies", "fish": "fish", "bus": "buses", "cactus": "cactuses"}
RELATIONS = ("left of", "above")
KINDS = ("single", "counting", "two", "position")


@dataclass(frozen=True)
class Item:
    """One thing in a scene: its name, its ink color (None outside the ink style), its box in pixels."""

    thing: str
    color: str | None
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Content of an image. `relation` is the position of the first item relative to the second, if given."""

    kind: str
    style: str
    background: str
    items: tuple[Item, ...]
    relation: str | None
    caption: str

    @property
    def task(self) -> str:
        """GenEval's task: single, two, counting, colors, position or color_attr."""
        if self.style == "ink" and self.kind in ("single", "two"):
            return {"single": "colors", "two": "color_attr"}[self.kind]
        return self.kind

    @property
    def combination(self) -> str:
        """Key for holding out scenes: things, colors, number, relation, style and background."""
        things = [f"{item.color or ''} {item.thing}" for item in self.items]
        if self.kind != "position":
            things.sort()
        return "|".join([self.kind, *things, self.relation or "", self.style, self.background])

    @property
    def held_out(self) -> bool:
        """Whether this combination is excluded from training."""
        return int(hashlib.md5(self.combination.encode()).hexdigest(), 16) % 10 == 0


def scene(rng: random.Random) -> Scene:
    """Generate a random scene: kind, style, background, things, positions and caption."""
    style = rng.choice(STYLES)
    names = INK_BACKGROUNDS if style == "ink" else tuple(BACKGROUNDS)
    background = rng.choice(names) if rng.random() < 0.8 else "white"
    kind = rng.choices(KINDS, (3, 2, 2, 2))[0]

    def color() -> str | None:
        return rng.choice(tuple(INKS)) if style == "ink" else None

    def at(thing: str, ink: str | None, cell: tuple[int, int]) -> Item:
        return Item(thing, ink, cell[0] + 4, cell[1] + 4, SMALL)

    relation = None
    if kind == "single":
        place = (GRID * rng.randint(0, 2), GRID * rng.randint(0, 2))
        items = [Item(rng.choice(tuple(THINGS)), color(), *place, LARGE)]
    elif kind == "counting":
        thing, ink = rng.choice(tuple(THINGS)), color()
        items = [at(thing, ink, cell) for cell in _cells(rng, rng.randint(2, 4))]
    else:
        one, two = rng.sample(tuple(THINGS), 2)
        across = rng.random() < 0.5
        first, second = _pair(rng, across)
        items = [at(one, color(), first), at(two, color(), second)]
        if kind == "position":
            relation = RELATIONS[0] if across else RELATIONS[1]
        elif rng.random() < 0.5:
            items.reverse()
    caption = caption_of(rng, kind, style, background, items, relation)
    return Scene(kind, style, background, tuple(items), relation, caption)


def training_scene(rng: random.Random, *, single: float = 0.0) -> Scene:
    """Generate a scene that is not held out; at least a fraction `single` of scenes has only one thing."""
    alone = rng.random() < single
    while True:
        found = scene(rng)
        if not found.held_out and (not alone or found.kind == "single"):
            return found


def held_out_scene(rng: random.Random, *, kind: str | None = None) -> Scene:
    """Generate a held-out scene of the given kind, or of any."""
    while True:
        found = scene(rng)
        if found.held_out and kind in (None, found.kind):
            return found


def _pair(rng: random.Random, across: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    free = [GRID * rng.randint(0, 4) for _ in range(2)]
    if across:
        return (0, free[0]), (64, free[1])
    return (free[0], 0), (free[1], 64)


def _cells(rng: random.Random, count: int) -> list[tuple[int, int]]:
    if count == 2:
        return list(_pair(rng, rng.random() < 0.5))
    corners = [(0, 0), (64, 0), (0, 64), (64, 64)]
    return rng.sample(corners, 3) if count == 3 else corners


def plural(thing: str) -> str:
    """The plural of a thing's name."""
    return PLURALS.get(thing, thing + "s")


def _named(item: Item) -> str:
    words = f"{item.color} {item.thing}" if item.color else item.thing
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_of(
    rng: random.Random, kind: str, style: str, background: str, items: list[Item], relation: str | None
) -> str:
    """Write a caption of a scene, choosing randomly among paraphrases."""
    first = items[0]
    if kind == "single":
        what = _named(first)
    elif kind == "counting":
        ink = f"{first.color} " if first.color else ""
        what = f"{NUMBERS[len(items)]} {ink}{plural(first.thing)}"
    elif relation is None:
        what = f"{_named(items[0])} {rng.choice(('and', 'and', 'with'))} {_named(items[1])}"
    else:
        forward, backward = {
            "left of": (("left of", "to the left of"), ("right of", "to the right of")),
            "above": (("above", "over"), ("below", "under")),
        }[relation]
        if rng.random() < 0.5:
            what = f"{_named(items[0])} {rng.choice(forward)} {_named(items[1])}"
        else:
            what = f"{_named(items[1])} {rng.choice(backward)} {_named(items[0])}"
    article = "an" if background[0] in "aeiou" else "a"
    return rng.choices(
        (
            f"{what} on {article} {background} background, {style} style",
            f"{what}, {background} background, {style} style",
            f"{style} style: {what} on {background}",
        ),
        (3, 1, 1),
    )[0]


@cache
def _drawings() -> dict[str, Image.Image]:
    return {key: Image.fromarray(pixels) for key, pixels in sprites(STYLES, THINGS).items()}


@cache
def drawing(style: str, thing: str, color: str | None, size: int) -> Image.Image:
    """Return the RGBA sprite of a thing, size x size pixels; ink sprites are filled with their color."""
    image = _drawings()[f"{style}/{thing}"]
    if color is not None:
        filled = Image.new("RGBA", image.size, (*INKS[color], 0))
        filled.putalpha(image.getchannel("A"))
        image = filled
    return image.resize((size, size), Image.Resampling.LANCZOS)


def render(shown: Scene) -> np.ndarray:
    """Render a scene as a uint8 image [128, 128, 3]."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[shown.background])
    for item in shown.items:
        sprite = drawing(shown.style, item.thing, item.color, item.size)
        image.paste(sprite, (item.x, item.y), sprite)
    return np.asarray(image)


def training_scenes(count: int, *, seed: int, single: float = 0.0) -> tuple[np.ndarray, list[Scene]]:
    """Render `count` training scenes: uint8 images [count, 128, 128, 3] and their scenes."""
    rng = random.Random(seed)
    scenes = [training_scene(rng, single=single) for _ in range(count)]
    return np.stack([render(shown) for shown in scenes]), scenes


def held_out_scenes(count: int, *, seed: int = 0) -> tuple[np.ndarray, list[Scene]]:
    """Render `count` held-out scenes: uint8 images [count, 128, 128, 3] and their scenes."""
    rng = random.Random(f"held out {seed}")
    scenes = [held_out_scene(rng) for _ in range(count)]
    return np.stack([render(shown) for shown in scenes]), scenes


if __name__ == "__main__":
    started = time.time()
    pixels, scenes = training_scenes(1000, seed=0)
    print(f"{len(pixels) / (time.time() - started):.0f} scenes per second")
    page = Image.new("RGB", (8 * 130, 4 * 130), "white")
    for number in range(32):
        page.paste(Image.fromarray(pixels[number]), ((number % 8) * 130, (number // 8) * 130))
        print(scenes[number].task, "|", scenes[number].caption)
    page.save(work_folder() / "world" / "scenes.png")

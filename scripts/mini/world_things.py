"""World, stage 1: the drawings of the things, rendered from four npm packages of openly licensed emoji.

    python scripts/mini/world_things.py          # writes mini-work/world/sprites.npz and sheet.png

Needs npm and the extra `mini`. The packages are pinned, so the result is the same on every machine.
"""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from common import work_folder
from PIL import Image

SPRITE = 112
"""Side in pixels at which a drawing is kept; scenes scale it down."""


@dataclass(frozen=True)
class Package:
    """An npm package of icons and its license."""

    name: str
    version: str
    license: str

    @property
    def folder(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


PACKAGES = {
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "ink": Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
    "fluent": Package("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
}

# The small world: 32 things that are told apart at 44 pixels. Values are the icons' names.
THINGS = {
    "apple": "red-apple",
    "banana": "banana",
    "cat": "cat-face",
    "dog": "dog-face",
    "frog": "frog",
    "rabbit": "rabbit-face",
    "penguin": "penguin",
    "crab": "crab",
    "fish": "tropical-fish",
    "whale": "spouting-whale",
    "turtle": "turtle",
    "butterfly": "butterfly",
    "mushroom": "mushroom",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "star": "star",
    "moon": "crescent-moon",
    "snowman": "snowman-without-snow",
    "car": "automobile",
    "bus": "bus",
    "rocket": "rocket",
    "airplane": "airplane",
    "house": "house",
    "guitar": "guitar",
    "key": "key",
    "umbrella": "umbrella",
    "balloon": "balloon",
    "camera": "camera",
    "clock": "alarm-clock",
    "robot": "robot",
    "heart": "red-heart",
    "crown": "crown",
}

MORE_THINGS = {
    "lemon": "lemon",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "carrot": "carrot",
    "pizza": "pizza",
    "burger": "hamburger",
    "donut": "doughnut",
    "cake": "shortcake",
    "cup": "hot-beverage",
    "fox": "fox",
    "bear": "bear",
    "panda": "panda",
    "pig": "pig-face",
    "lion": "lion",
    "monkey": "monkey-face",
    "cow": "cow-face",
    "mouse": "mouse-face",
    "chicken": "chicken",
    "owl": "owl",
    "octopus": "octopus",
    "snail": "snail",
    "bee": "honeybee",
    "tree": "deciduous-tree",
    "pine": "evergreen-tree",
    "tulip": "tulip",
    "rose": "rose",
    "sun": "sun",
    "cloud": "cloud",
    "truck": "delivery-truck",
    "train": "locomotive",
    "sailboat": "sailboat",
    "bicycle": "bicycle",
    "tent": "tent",
    "ball": "soccer-ball",
    "drum": "drum",
    "bell": "bell",
    "hammer": "hammer",
    "book": "closed-book",
    "gift": "wrapped-gift",
    "ghost": "ghost",
    "skull": "skull",
    "hat": "top-hat",
}
"""The rest of the 74, for a larger world."""


def fetch(npm: Path, package: Package) -> dict:
    """Return the package's icons.json, fetched with `npm pack` and unpacked if it is not there yet."""
    folder = npm / package.folder
    if not folder.exists():
        npm.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            cwd=npm,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (folder / "new").mkdir(parents=True)
        subprocess.run(
            ["tar", "-xzf", npm / f"{package.folder}.tgz", "-C", folder / "new", "--strip-components=1"],
            check=True,
        )
        for path in (folder / "new").iterdir():
            path.rename(folder / path.name)
        (folder / "new").rmdir()
    return json.loads((folder / "icons.json").read_text(encoding="utf-8"))


def render(icons: dict, name: str) -> np.ndarray:
    """Render one icon as RGBA [SPRITE, SPRITE, 4] uint8, cropped to its outline and centered.

    KeyError if the set has no icon of that name.
    """
    if name not in icons["icons"]:
        name = icons.get("aliases", {})[name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="224" height="224" color="black">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=224, height=224)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = SPRITE / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (SPRITE, SPRITE), (255, 255, 255, 0))
    square.paste(image, ((SPRITE - image.width) // 2, (SPRITE - image.height) // 2))
    return np.asarray(square)


def sprites(styles: tuple[str, ...], things: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the drawings by "style/thing", rendered once and kept in the work folder."""
    path = work_folder() / "world" / "sprites.npz"
    wanted = [f"{style}/{thing}" for style in styles for thing in things]
    if path.exists():
        with np.load(path) as kept:
            if set(wanted) <= set(kept.files):
                return {key: kept[key] for key in wanted}
    found = {}
    for style in styles:
        icons = fetch(work_folder() / "npm", PACKAGES[style])
        found |= {f"{style}/{thing}": render(icons, icon) for thing, icon in things.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found)
    return found


if __name__ == "__main__":
    drawings = sprites(("noto", "ink"), THINGS)
    page = Image.new("RGB", (16 * 60, 4 * 60), "white")
    for number, pixels in enumerate(drawings.values()):
        drawing = Image.fromarray(pixels).resize((56, 56))
        page.paste(drawing, ((number % 16) * 60, (number // 16) * 60), drawing)
    page.save(work_folder() / "world" / "things.png")

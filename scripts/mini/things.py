"""Stage 1: the drawings of the things, rendered from npm packages of openly licensed emoji.

    python scripts/mini/things.py          # write src/scalewise/mini/drawings.png

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

from scalewise.mini import DRAWINGS
from scalewise.mini.grammar import STYLES, THINGS
from scalewise.mini.scenes import SPRITE


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
}

ICONS = {
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
"""Icon by thing. At 44 pixels, all of them can be told apart."""


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
    return np.array(square)


def sheet() -> Image.Image:
    """Return all drawings on one sheet: a row of THINGS for every style."""
    page = Image.new("RGBA", (SPRITE * len(THINGS), SPRITE * len(STYLES)), (0, 0, 0, 0))
    for row, style in enumerate(STYLES):
        icons = fetch(work_folder() / "npm", PACKAGES[style])
        for column, thing in enumerate(THINGS):
            pixels = render(icons, ICONS[thing])
            pixels[pixels[..., 3] == 0] = 0  # invisible pixels would only cost space
            page.paste(Image.fromarray(pixels), (SPRITE * column, SPRITE * row))
    return page


if __name__ == "__main__":
    sheet().save(DRAWINGS, optimize=True)

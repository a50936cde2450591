"""A labelled sheet: a row for each folder of images that `evaluate` drew, and one of the real images.

    python scripts/sheet.py "teacher=results/comparison/pictures/teacher" "student=.../scale-wise-4" \\
        --real mini-work/data

Captions stand above the columns and names to the left of the rows. `--real` is the folder that
`scripts/mini/data.py` writes.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LEFT, TOP, SIDE = 4, 132, 52, 128


def chosen_of(count: int, columns: int) -> list[int]:
    """Evenly spaced numbers of images."""
    return [round((i + 0.5) * count / columns) for i in range(columns)]


def real_row(folder: Path, captions: list[str]) -> list[np.ndarray]:
    """The images of some captions, uint8 [128, 128, 3]."""
    texts = [entry["caption"] for entry in json.loads((folder / "captions.json").read_text(encoding="utf-8"))]
    images = np.load(folder / "emoji128.npy", mmap_mode="r")
    return [np.asarray(images[texts.index(caption)]) for caption in captions]


def labelled(rows: dict[str, list[np.ndarray]], captions: list[str]) -> Image.Image:
    """Lay rows of images (uint8 [128, 128, 3]) out under their captions, each behind its name."""
    step, font = SIDE + GAP, ImageFont.load_default(13)
    page = Image.new("RGB", (LEFT + len(captions) * step, TOP + len(rows) * step), "white")
    write = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, 19)[:3])
        write.multiline_text((LEFT + column * step + 2, 2), text, fill="black", font=font, spacing=2)
    for row, (name, images) in enumerate(rows.items()):
        text = "\n".join(textwrap.wrap(name, 17))
        write.multiline_text((4, TOP + row * step + 48), text, fill="black", font=font, spacing=2)
        for column, image in enumerate(images):
            page.paste(Image.fromarray(image), (LEFT + column * step, TOP + row * step))
    return page


def main(folders: list[str], columns: int, *, real: Path | None, out: Path) -> None:
    """Lay out evenly spaced images of every folder; 256 colors are enough for flat art."""
    rows, captions = dict[str, list[np.ndarray]](), list[str]()
    for given in folders:
        name, _, path = given.rpartition("=")
        told = json.loads((Path(path) / "prompts.json").read_text(encoding="utf-8"))["captions"]
        numbers = chosen_of(len(told), columns)
        captions = [told[i] for i in numbers]
        rows[name or Path(path).name] = [
            np.asarray(Image.open(Path(path) / f"{i}.png").convert("RGB")) for i in numbers
        ]
    if real is not None:
        rows = {"real, held out": real_row(real, captions), **rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    labelled(rows, captions).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--real", type=Path, help="the folder of real images and captions")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    main(options.folders, options.columns, real=options.real, out=options.out)

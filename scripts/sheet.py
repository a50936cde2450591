"""A sheet of the same captions by several contenders: a row for each folder of pictures of `evaluate`.

python scripts/sheet.py results/comparison/pictures/teacher results/comparison/pictures/scale-wise-4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from scalewise.pictures import sheet


def main(folders: list[Path], columns: int, out: Path) -> None:
    """Lay out evenly spaced pictures of every folder; 256 colours are enough for flat art."""
    count = len(list(folders[0].glob("*.png")))
    chosen = [round((i + 0.5) * count / columns) for i in range(columns)]
    pictures = [
        np.asarray(Image.open(folder / f"{i}.png").convert("RGB")) for folder in folders for i in chosen
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, columns=columns).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    main(options.folders, options.columns, options.out)

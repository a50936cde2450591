"""The images of the first mini, which `data.py` writes, and their captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from common import work_folder

DENOISER_STYLES = ("noto", "fluent", "fluent-flat")
DENOISER_CATEGORIES_LEFT_OUT = ("people-body", "symbols")


@dataclass(frozen=True)
class Pictures:
    """Images [N, 128, 128, 3] uint8 and one record (caption, text, style, split, ...) per image."""

    pixels: np.ndarray
    records: list[dict]

    def select(self, keep: Callable[[dict], bool]) -> Pictures:
        """Return the images whose record satisfies `keep`."""
        chosen = [i for i, record in enumerate(self.records) if keep(record)]
        return Pictures(self.pixels[chosen], [self.records[i] for i in chosen])

    @property
    def captions(self) -> list[str]:
        return [record["caption"] for record in self.records]


def load_pictures(*, split: str | None = None, denoiser_only: bool = False) -> Pictures:
    """Load the emoji images; `denoiser_only` keeps only the styles and subjects of the denoiser's
    training.
    """
    folder = work_folder() / "data"
    pictures = Pictures(
        np.load(folder / "emoji128.npy"), json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    )
    if split:
        pictures = pictures.select(lambda r: r["split"] == split)
    if denoiser_only:
        pictures = pictures.select(
            lambda r: r["style"] in DENOISER_STYLES and r["category"] not in DENOISER_CATEGORIES_LEFT_OUT
        )
    return pictures

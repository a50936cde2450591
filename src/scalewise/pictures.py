"""Pictures out of the model: pixels as bytes, contact sheets, files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Turn pixels [N, 3, H, W] in [-1, 1] into uint8 [N, H, W, 3]."""
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().permute(0, 2, 3, 1).contiguous().numpy()


def middle_frame(pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as they are, of videos [N, 3, F, H, W] the frame in the middle."""
    return pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]


def sheet(pictures: Sequence[np.ndarray], *, columns: int, gap: int = 4) -> Image.Image:
    """Lay pictures (uint8 [H, W, 3], possibly of different sizes) out on a white page, row by row."""
    height = max(p.shape[0] for p in pictures) + gap
    width = max(p.shape[1] for p in pictures) + gap
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), (gap + (i % columns) * width, gap + (i // columns) * height))
    return page

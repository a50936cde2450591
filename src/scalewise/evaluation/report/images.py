"""Pictures inside the page: pixels as they are, shown at whole multiples of their size."""

from __future__ import annotations

import base64
import io
from math import ceil

import numpy as np
from markupsafe import Markup
from PIL import Image, features

SHOWN, STORED = 256, 512  # the widest a picture is shown and, for sharp displays, stored


def zoom(picture: np.ndarray, smallest: int = 96) -> tuple[int, int]:
    """Width and height in CSS pixels: a whole multiple that reaches `smallest`; large ones are 256 wide."""
    height, width = picture.shape[:2]
    if width > SHOWN:
        return SHOWN, round(height * SHOWN / width)
    times = max(1, ceil(smallest / width))
    return width * times, height * times


def embed(picture: np.ndarray, *, alt: str, smallest: int = 96) -> Markup:
    """An <img> of bytes [H, W, 3]; small pictures keep every pixel, large ones are compressed at 512."""
    image = Image.fromarray(picture)
    exact = image.width <= SHOWN
    if image.width > STORED:
        image = image.resize((STORED, round(image.height * STORED / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    if kind == "webp":
        image.save(data, "WEBP", lossless=exact, quality=90 if exact else 88, method=4)
    else:
        image.save(data, "PNG", optimize=True)
    width, height = zoom(picture, smallest)
    code = base64.b64encode(data.getvalue()).decode()
    style = "pixels" if exact else "photo"
    return Markup(
        '<img class="{}" src="data:image/{};base64,{}" width="{}" height="{}" alt="{}" decoding="async">'
    ).format(style, kind, code, width, height, alt)

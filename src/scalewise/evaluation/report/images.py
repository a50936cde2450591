"""Images embedded in the page; small ones are stored losslessly and shown at integer multiples of their
size.
"""

from __future__ import annotations

import base64
import io
from math import ceil

import numpy as np
from markupsafe import Markup
from PIL import Image, features

SHOWN, STORED = 256, 512  # largest width in the page, and stored (for high-resolution displays)


def zoom(pixels: np.ndarray, smallest: int = 96) -> tuple[int, int]:
    """Return the display size of an image [H, W, 3]: an integer multiple of at least `smallest`, or 256
    wide.
    """
    height, width = pixels.shape[:2]
    if width > SHOWN:
        return SHOWN, round(height * SHOWN / width)
    times = max(1, ceil(smallest / width))
    return width * times, height * times


def embed(pixels: np.ndarray, *, alt: str, smallest: int = 96) -> Markup:
    """Return an <img> of uint8 [H, W, 3]; images over 256 wide are stored with lossy compression, at most 512
    wide.
    """
    image = Image.fromarray(pixels)
    exact = image.width <= SHOWN
    if image.width > STORED:
        image = image.resize((STORED, round(image.height * STORED / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    if kind == "webp":
        image.save(data, "WEBP", lossless=exact, quality=90 if exact else 88, method=4)
    else:
        image.save(data, "PNG", optimize=True)
    width, height = zoom(pixels, smallest)
    code = base64.b64encode(data.getvalue()).decode()
    style = "pixels" if exact else "photo"
    return Markup(
        '<img class="{}" src="data:image/{};base64,{}" width="{}" height="{}" alt="{}" decoding="async">'
    ).format(style, kind, code, width, height, alt)

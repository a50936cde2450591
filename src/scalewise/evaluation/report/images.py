"""Images embedded in the page, as data URLs: small ones losslessly, large ones with lossy compression."""

from __future__ import annotations

import base64
import io

import numpy as np
from markupsafe import Markup
from PIL import Image, features

SHOWN = 192
"""Width of an image in the page."""
EXACT, STORED = 256, 512
"""Largest width that is stored losslessly, and largest width that is stored."""


def embed(pixels: np.ndarray, *, alt: str, width: int = SHOWN) -> Markup:
    """Return an <img> of uint8 [H, W, 3], `width` CSS pixels wide.

    Images over 256 wide are stored with lossy compression, at most 512 wide.
    """
    image = Image.fromarray(pixels)
    exact = image.width <= EXACT
    if image.width > STORED:
        image = image.resize((STORED, round(image.height * STORED / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    if kind == "webp":
        image.save(data, "WEBP", lossless=exact, quality=90 if exact else 88, method=4)
    else:
        image.save(data, "PNG", optimize=True)
    height = round(width * pixels.shape[0] / pixels.shape[1])
    code = base64.b64encode(data.getvalue()).decode()
    return Markup(
        '<img src="data:image/{};base64,{}" width="{}" height="{}" alt="{}" decoding="async">'
    ).format(kind, code, width, height, alt)

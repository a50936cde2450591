"""Images: conversion of pixels to bytes, reading and writing files, contact sheets."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import Tensor

FRAME_MS = 1000 // 16  # duration of a video frame; Wan's videos have 16 frames per second
MAX_PIXELS = 10**9
"""Pixels of the largest image that is read; it takes 3 GB when decoded."""
MAX_PARALLEL_PIXELS = 10**8
"""Larger images are decoded one at a time, even if several threads read images."""

_one_large = threading.Lock()


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Convert pixels [N, 3, (T,) H, W] in [-1, 1] to uint8 [N, (T,) H, W, 3].

    Raises ValueError for NaN and infinity, which would become black.
    """
    refuse_non_finite(pixels)
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().movedim(1, -1).contiguous().numpy()


def refuse_non_finite(samples: Tensor) -> None:
    """Raise ValueError if any sample of a batch [N, ...] (pixels or latents) has NaN or infinity."""
    finite = torch.isfinite(samples.detach()).flatten(1).all(dim=1).cpu()
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(broken)} of {len(finite)} generated samples have NaN or infinity, the first one is number "
            f"{broken[0] + 1}: the model overflows in its dtype or its weights are damaged. Generate in "
            "bfloat16 or float32 (model.dtype), or download or train the weights again."
        )


def middle_frames(images: np.ndarray) -> np.ndarray:
    """Return the middle frames [N, H, W, 3] of videos (uint8 [N, T, H, W, 3]); images are unchanged."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def save_image(image: np.ndarray, path: Path) -> Path:
    """Save an image (uint8 [H, W, 3]) as PNG, or a video (uint8 [T, H, W, 3]) as animated PNG."""
    frames = [Image.fromarray(frame) for frame in (image if image.ndim == 4 else image[None])]
    if len(frames) == 1:
        frames[0].save(path)
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return path


def read_image(path: Path) -> np.ndarray:
    """Read an image file as uint8 [H, W, 3], or an animation as uint8 [T, H, W, 3]."""
    with open_image(path) as image:
        frames = [
            np.asarray(to_rgb(ImageOps.exif_transpose(frame))) for frame in ImageSequence.Iterator(image)
        ]
    return frames[0] if len(frames) == 1 else np.stack(frames)


class ImageTooLarge(ValueError):
    """An image has more than MAX_PIXELS pixels; the message says how many."""


class _PillowLimitDisabled:
    """Context in which Pillow's process-wide limit on pixels is off, until the last thread leaves it."""

    def __init__(self) -> None:
        self.lock, self.threads, self.limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self.lock:
            if not self.threads:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.threads += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.threads -= 1
            if not self.threads:
                Image.MAX_IMAGE_PIXELS = self.limit


_pillow_limit_disabled = _PillowLimitDisabled()


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image of up to MAX_PIXELS pixels; Pillow's own limit would refuse large scans.

    Raises ImageTooLarge for larger ones, before decoding.
    """
    with _pillow_limit_disabled, Image.open(path) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ImageTooLarge(
                f"{path} has {pixels / 1e6:,.0f} megapixels, more than the maximum of "
                f"{MAX_PIXELS / 1e6:,.0f}; save a smaller copy"
            )
        with _one_large if pixels > MAX_PARALLEL_PIXELS else nullcontext():
            yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, over white if transparent; 16-bit channels are scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def middle_frame(pixels: Tensor) -> Tensor:
    """Return the middle frames [N, 3, H, W] of videos [N, 3, T, H, W]; images are unchanged."""
    return pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]


def contact_sheet(
    images: Sequence[np.ndarray], *, columns: int, gap: int = 4, titles: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Arrange images (uint8 [H, W, 3], sizes may differ) row by row on a white page.

    `titles` are written above the columns, `captions` above the rows; both are truncated to fit.
    """
    height = max(p.shape[0] for p in images) + gap
    width = max(p.shape[1] for p in images) + gap
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(max(10, width // 24))
    line = round(font.getbbox("Ag")[3]) + 2 * gap
    top, above = line if titles else 0, line if captions else 0
    page = Image.new("RGB", (columns * width + gap, top + rows * (height + above) + gap), "white")
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * width, gap + top + (i // columns) * (height + above) + above
        page.paste(Image.fromarray(image), (x, y))
    write = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        write.text((gap + i * width, gap), _truncate(title, font, width - gap), fill="black", font=font)
    for i, caption in enumerate(captions):
        corner = (gap, gap + top + i * (height + above))
        write.text(corner, _truncate(caption, font, page.width - 2 * gap), fill="black", font=font)
    return page


def _truncate(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    return next((s for n in range(len(text), 0, -1) if font.getlength(s := text[:n] + "...") <= width), "")

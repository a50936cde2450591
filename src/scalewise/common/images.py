"""Pictures out of the model: pixels as bytes, contact sheets, files."""

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

FRAME_MS = 1000 // 16  # of an animation; Wan's videos have 16 frames a second
LARGEST = 10**9
"""Pixels of the largest image that is read; decoded, it has 3 GB."""
ALONE = 10**8
"""Images of more pixels are decoded one at a time, however many threads read."""

_one_large = threading.Lock()


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Turn pixels [N, 3, H, W] in [-1, 1] into uint8 [N, H, W, 3], videos [N, 3, F, H, W] likewise.

    Raises ValueError for NaN and infinity, which would come out as black.
    """
    refuse_non_finite(pixels)
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().movedim(1, -1).contiguous().numpy()


def refuse_non_finite(samples: Tensor) -> None:
    """Raise ValueError for samples [N, ...] (pixels or latents) of which any holds NaN or infinity."""
    fine = torch.isfinite(samples.detach()).flatten(1).all(dim=1).cpu()
    if not fine.all():
        broken = (~fine).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(broken)} of {len(fine)} samples drawn hold NaN or infinity, the first of them number "
            f"{broken[0] + 1}: the model overflows in its dtype or its weights are damaged. Draw in "
            "bfloat16 or float32 (model.dtype), or fetch or train the weights again."
        )


def stills(images: np.ndarray) -> np.ndarray:
    """Pictures (bytes [N, H, W, 3]) as they are, of videos [N, F, H, W, 3] the frames in the middle."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def save_picture(picture: np.ndarray, path: Path) -> Path:
    """Save bytes [H, W, 3] as PNG, a video [F, H, W, 3] as an animated one."""
    frames = [Image.fromarray(frame) for frame in (picture if picture.ndim == 4 else picture[None])]
    if len(frames) == 1:
        frames[0].save(path)
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return path


def read_picture(path: Path) -> np.ndarray:
    """Read what `save_picture` saved, or any picture: bytes [H, W, 3] or, of an animation, [F, H, W, 3]."""
    with opened(path) as image:
        frames = [
            np.asarray(to_rgb(ImageOps.exif_transpose(frame))) for frame in ImageSequence.Iterator(image)
        ]
    return frames[0] if len(frames) == 1 else np.stack(frames)


class ImageTooLarge(ValueError):
    """An image of more pixels than are read; the message says how many it has."""


class _PillowsLimit:
    """Pillow's own limit, one for the whole process, out of force while any thread is within."""

    def __init__(self) -> None:
        self.lock, self.inside, self.own = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                Image.MAX_IMAGE_PIXELS = self.own


_limit = _PillowsLimit()


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image of up to LARGEST pixels; Pillow by itself takes a large scan for an attack.

    Raises ImageTooLarge for more, before anything is decoded.
    """
    with _limit, Image.open(path) as image:
        pixels = image.width * image.height
        if pixels > LARGEST:
            raise ImageTooLarge(
                f"{path} has {pixels / 1e6:,.0f} megapixels, and no more than {LARGEST / 1e6:,.0f} are read; "
                "save it smaller"
            )
        with _one_large if pixels > ALONE else nullcontext():
            yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; transparency shows white, 16 bits a channel are scaled and not clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def middle_frame(pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as they are, of videos [N, 3, F, H, W] the frame in the middle."""
    return pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]


def sheet(
    pictures: Sequence[np.ndarray], *, columns: int, gap: int = 4, titles: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Lay pictures (uint8 [H, W, 3], possibly of different sizes) out on a white page, row by row.

    `titles` stand above the columns, `captions` above the rows, as much of them as the page is wide.
    """
    height = max(p.shape[0] for p in pictures) + gap
    width = max(p.shape[1] for p in pictures) + gap
    rows = math.ceil(len(pictures) / columns)
    font = ImageFont.load_default(max(10, width // 24))
    line = round(font.getbbox("Ag")[3]) + 2 * gap
    top, above = line if titles else 0, line if captions else 0
    page = Image.new("RGB", (columns * width + gap, top + rows * (height + above) + gap), "white")
    for i, picture in enumerate(pictures):
        x, y = gap + (i % columns) * width, gap + top + (i // columns) * (height + above) + above
        page.paste(Image.fromarray(picture), (x, y))
    write = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        write.text((gap + i * width, gap), _fitting(title, font, width - gap), fill="black", font=font)
    for i, caption in enumerate(captions):
        place = (gap, gap + top + i * (height + above))
        write.text(place, _fitting(caption, font, page.width - 2 * gap), fill="black", font=font)
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as fits into a width in pixels."""
    if font.getlength(text) <= width:
        return text
    return next((s for n in range(len(text), 0, -1) if font.getlength(s := text[:n] + "...") <= width), "")

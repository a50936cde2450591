"""Pictures out of the model: pixels as bytes, contact sheets, files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import Tensor

FRAME_MS = 1000 // 16  # of an animation; Wan's videos have 16 frames a second


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
    with Image.open(path) as opened:
        frames = [
            np.asarray(to_rgb(ImageOps.exif_transpose(frame))) for frame in ImageSequence.Iterator(opened)
        ]
    return frames[0] if len(frames) == 1 else np.stack(frames)


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

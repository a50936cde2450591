"""Folders of captioned images: finding them, sorting them into sizes, reading their pixels.

Nothing is dropped in silence: every image that cannot be used is counted under its reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, features
from torch import Tensor

from scalewise.data.captions import METADATA, CaptionSource
from scalewise.data.shards import DataError
from scalewise.pictures import to_rgb
from scalewise.scales import Scale

BucketMode = Literal["crop", "buckets"]
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Images that people keep beside the others; counted so that nobody wonders where they went.
UNSUPPORTED = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".raw", ".dng"}
if features.check("avif"):
    READABLE.add(".avif")
    UNSUPPORTED.remove(".avif")
# Width : height of the buckets beside the full size's own; between two of them, cropping loses about a tenth.
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)


@dataclass(frozen=True)
class ImageEntry:
    """A usable image: its file, its caption, and its size in pixels as seen (EXIF orientation applied)."""

    path: Path
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Skipped:
    """The images of a folder that cannot be used, by reason, and how many can."""

    used: int
    reasons: dict[str, list[Path]]

    @property
    def counts(self) -> dict[str, int]:
        """How many images were skipped for each reason."""
        return {reason: len(paths) for reason, paths in self.reasons.items()}

    @property
    def summary(self) -> str:
        """One line such as "40 images used, 2 skipped: 1 unreadable (a.png), 1 without a caption (b.png)"."""
        found = f"{self.used} image{'' if self.used == 1 else 's'} used"
        if not self.reasons:
            return f"{found}, none skipped"
        parts = (f"{len(paths)} {reason} ({_name_some(paths)})" for reason, paths in self.reasons.items())
        return f"{found}, {sum(self.counts.values())} skipped: {', '.join(parts)}"


def scan_images(
    folder: Path | str, *, caption_from_name: bool = False, captions: bool = True
) -> tuple[list[ImageEntry], Skipped]:
    """Find every captioned, readable image under `folder`, and count the others by reason.

    Captions come from `<stem>.txt`, else from metadata.jsonl, captions.json or metadata.csv (file_name, and
    text or caption), else, only with caption_from_name, from the file's name; without `captions` none are
    looked for. Each image is decoded once, since a truncated one shows itself only then.

    Raises DataError when the folder is missing or holds no usable image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; correct the path.")
    files = list_files(root)
    source: CaptionSource | None = None
    if captions:
        source = CaptionSource([f for f in files if f.name in METADATA], from_name=caption_from_name)
    images = [f for f in files if f.suffix.lower() in READABLE | UNSUPPORTED]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda path: _inspect(path, source), images))
    entries = [entry for entry in found if isinstance(entry, ImageEntry)]
    reasons: dict[str, list[Path]] = {}
    for path, entry in zip(images, found, strict=True):
        if isinstance(entry, str):
            reasons.setdefault(entry, []).append(path)
    if source and (absent := source.absent()):
        reasons["named in the metadata but not there"] = absent
    skipped = Skipped(len(entries), reasons)
    if not entries:
        needed = (
            " Each needs a caption: <name>.txt beside it, a metadata.jsonl, or set "
            "data.caption_from_name=true."
        )
        raise DataError(f"No usable image in {root}: {skipped.summary}.{needed if captions else ''}")
    return entries, skipped


def list_files(root: Path) -> list[Path]:
    """Images and captions under a folder, hidden ones left out, in a fixed order."""
    wanted = READABLE | UNSUPPORTED | {".txt"}
    files = (p for p in sorted(root.rglob("*")) if p.suffix.lower() in wanted or p.name in METADATA)
    return [
        p
        for p in files
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    ]


def assign_buckets(
    entries: Iterable[ImageEntry], full: Scale, *, patch: int, mode: BucketMode = "crop", least: int = 1
) -> dict[Scale, list[ImageEntry]]:
    """Sort images by the latent size they will have.

    "crop": all get the full size. "buckets": each gets the nearest aspect ratio (by its logarithm) among
    sizes of about the full one's area, divisible by the patch; buckets of fewer than `least` images are
    dissolved, smallest first, and their images go to the next nearest.
    """
    images = list(entries)
    if mode == "crop":
        return {full: images}
    if mode != "buckets":
        raise DataError(f"Unknown bucket mode {mode!r}; use 'crop' or 'buckets'.")
    sizes = bucket_sizes(full, patch)
    while True:
        buckets: dict[Scale, list[ImageEntry]] = {}
        for image in images:
            buckets.setdefault(_nearest(image, sizes), []).append(image)
        smallest = min(buckets, key=lambda size: len(buckets[size]))
        if len(buckets[smallest]) >= least or len(buckets) == 1:
            return dict(sorted(buckets.items()))
        sizes = [size for size in buckets if size != smallest]


def bucket_sizes(full: Scale, patch: int) -> list[Scale]:
    """Latent sizes of about the full one's area at a handful of aspect ratios, itself among them."""
    area = full.height * full.width
    sizes = {_aspect(full): full}
    for ratio in ASPECTS:
        sides = math.sqrt(area / ratio), math.sqrt(area * ratio)
        size = Scale(full.frames, *(patch * max(1, round(side / patch)) for side in sides))
        sizes.setdefault(_aspect(size), size)
    return [sizes[ratio] for ratio in sorted(sizes)]


def load_pixels(entry: ImageEntry, size: tuple[int, int]) -> Tensor:
    """Read an image as [3, H, W] in [-1, 1]: upright, over white, covering (H, W), cropped to its centre."""
    height, width = size
    try:
        with Image.open(entry.path) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow's plugins raise many kinds
        raise DataError(
            f"Cannot read {entry.path} ({error}); restore or remove it and start again."
        ) from error
    scale = max(height / image.height, width / image.width)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    # LANCZOS antialiases; reducing_gap shrinks big photographs by box averages first: quicker and as good.
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _inspect(path: Path, source: CaptionSource | None) -> ImageEntry | str:
    """Return the image's entry, or the reason why it cannot be used."""
    if path.suffix.lower() not in READABLE:
        return f"in the unsupported format {path.suffix.lower()}"
    try:
        width, height = _decoded_size(path)
    except Exception:  # Pillow's plugins raise many kinds for a broken file; the summary names the files
        return "unreadable"
    if source is None:
        return ImageEntry(path, "", width, height)
    try:
        caption = source.caption(path)
    except UnicodeDecodeError:
        return "with a caption that is not UTF-8 text"
    return ImageEntry(path, caption, width, height) if caption else "without a caption"


def _decoded_size(path: Path) -> tuple[int, int]:
    """Width and height as seen; decodes everything, because only that shows a truncated file."""
    with Image.open(path) as image:
        _refuse_float(image)
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        image.draft("RGB", (1, 1))  # JPEG only: decode at an eighth of the size
        image.load()
    return (height, width) if turned else (width, height)


def _refuse_float(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range")


def _aspect(scale: Scale) -> float:
    return scale.width / scale.height


def _nearest(image: ImageEntry, sizes: Sequence[Scale]) -> Scale:
    return min(sizes, key=lambda size: abs(math.log(_aspect(size) * image.height / image.width)))


def _name_some(paths: Sequence[Path], limit: int = 3) -> str:
    names = ", ".join(path.name for path in paths[:limit])
    return names if len(paths) <= limit else f"{names}, ..."

"""Folders of captioned images: finding images, assigning them to sizes, reading their pixels.

No image is skipped silently: images that cannot be used are counted by reason.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from scalewise.common.images import MAX_PIXELS, ImageTooLarge, open_image, to_rgb
from scalewise.data.captions import CaptionSource
from scalewise.data.files import FolderFiles, find_files, join_names
from scalewise.data.shards import DataError
from scalewise.method.scales import Scale

BucketMode = Literal["crop", "buckets"]
# Aspect ratios (width / height) of the buckets in addition to that of the full size. They are close enough
# that cropping to the nearest loses about a tenth of an image's area.
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)


@dataclass(frozen=True)
class ImageEntry:
    """A usable image: file, caption, and size in pixels with the EXIF orientation applied."""

    path: Path
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Skipped:
    """The files of a folder that are not used: images by reason, and sentences about other files."""

    used: int
    reasons: dict[str, list[Path]]
    others: tuple[str, ...] = ()
    """Sentences about files of unsupported types and broken links."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of images skipped for each reason."""
        return {reason: len(paths) for reason, paths in self.reasons.items()}

    @property
    def summary(self) -> str:
        """One line such as "40 images used, 2 skipped: 1 unreadable (a.png), 1 without a caption (b.png)"."""
        found = f"{self.used:,} image{'' if self.used == 1 else 's'} used"
        if not self.reasons:
            return f"{found}, none skipped"
        parts = (f"{len(paths):,} {reason} ({join_names(paths)})" for reason, paths in self.reasons.items())
        return f"{found}, {sum(self.counts.values()):,} skipped: {', '.join(parts)}"

    @property
    def problems(self) -> list[str]:
        """The summary, if any image was skipped."""
        return [self.summary] if self.reasons else []

    def warn(self, folder: Path) -> None:
        """Warn about all skipped files."""
        for sentence in (*self.problems, *self.others):
            warnings.warn(f"{folder}: {sentence}.", stacklevel=3)


def scan_images(
    folder: Path | str, *, caption_from_name: bool = False, captions: bool = True
) -> tuple[list[ImageEntry], Skipped]:
    """Find all captioned, readable images under `folder`, and count the others by reason.

    Captions come from `<stem>.txt` or `<stem>.caption`, else from metadata.jsonl, captions.json,
    metadata.csv or metadata.parquet (columns file_name, and text, caption or prompt), else, only with
    caption_from_name, from the file's name. With captions=False, captions are neither read nor required.
    Links to folders are followed. Every image is decoded once, because only that detects truncated files.

    Raises DataError if the folder is missing or has no usable image.
    """
    root = Path(folder)
    found = list_files(root)
    source = CaptionSource(found, from_name=caption_from_name) if captions else None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        inspected = list(pool.map(lambda path: _inspect(path, source), found.images))
    entries = [entry for entry in inspected if isinstance(entry, ImageEntry)]
    reasons: dict[str, list[Path]] = {}
    for path, entry in zip(found.images, inspected, strict=True):
        if isinstance(entry, str):
            reasons.setdefault(entry, []).append(path)
    reasons |= source.unmatched() if source else {}
    skipped = Skipped(len(entries), reasons, tuple(found.problems))
    if not entries:
        problems = ". ".join([skipped.summary, *skipped.others])
        remedy = ""
        if not found.images:
            remedy = " Put images there, or give another folder."
        elif captions and not caption_from_name:
            remedy = (
                " Every image needs a caption: write it to <name>.txt in the same folder or to a "
                "metadata.jsonl, or set data.caption_from_name=true."
            )
        raise DataError(f"No usable image in {root}: {problems}.{remedy}")
    return entries, skipped


def list_files(root: Path) -> FolderFiles:
    """Return the images, captions and metadata files under a folder; raises DataError if it is missing."""
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; correct the path.")
    return find_files(root)


def assign_buckets(
    entries: Iterable[ImageEntry], full: Scale, *, patch: int, mode: BucketMode = "crop", min_images: int = 1
) -> dict[Scale, list[ImageEntry]]:
    """Group images by the latent size that they will have.

    mode="crop": all images get the full size. mode="buckets": every image gets the size with the nearest
    aspect ratio (by its logarithm) among sizes of about the same area whose sides are divisible by `patch`.
    Buckets with fewer than `min_images` images are removed, smallest first, and their images move to the
    nearest remaining one.
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
        if len(buckets[smallest]) >= min_images or len(buckets) == 1:
            return dict(sorted(buckets.items()))
        sizes = [size for size in buckets if size != smallest]


def describe_buckets(buckets: Mapping[Scale, Sequence[ImageEntry]]) -> str:
    """Format buckets like "2 aspect buckets: 56x74 keeps 7 images and 93% of their area, 64x64 7 and 88%"."""
    parts = list[str]()
    for size, images in buckets.items():
        ratios = [image.width / image.height / _aspect(size) for image in images]
        area = sum(min(ratio, 1 / ratio) for ratio in ratios) / len(ratios)
        line = "{} keeps {:,} image{} and {:.0%} of their area" if not parts else "{} {:,}{} and {:.0%}"
        parts.append(line.format(size, len(images), "" if parts or len(images) == 1 else "s", area))
    return f"{len(buckets)} aspect bucket{'' if len(buckets) == 1 else 's'}: {', '.join(parts)}"


def bucket_warnings(
    buckets: Mapping[Scale, Sequence[ImageEntry]], full: Scale, *, patch: int, min_images: int
) -> list[str]:
    """Return warnings about buckets removed because they are too small, and a full size without images."""
    sizes, before, problems = bucket_sizes(full, patch), dict[Scale, int](), list[str]()
    for image in (image for members in buckets.values() for image in members):
        size = _nearest(image, sizes)
        before[size] = before.get(size, 0) + 1
    gone = {size: count for size, count in sorted(before.items()) if size not in buckets}
    if gone:
        count, shapes = sum(gone.values()), ", ".join(f"{size} ({n:,})" for size, n in gone.items())
        problems.append(
            f"{count:,} image{' is' if count == 1 else 's are'} cropped to the next aspect bucket, because "
            f"{'its' if count == 1 else 'their'} nearest one has fewer images than a batch of "
            f"{min_images:,}: {shapes}"
        )
    if full not in buckets:
        why = f"only {before[full]:,} have its shape" if full in before else "none has its shape"
        problems.append(
            f"no image is trained at the full size {full}, the default size of sampling: {why}. Add such "
            "images, set data.shape=crop, or lower train.batch"
        )
    return problems


def enlargement_warnings(buckets: Mapping[Scale, Sequence[ImageEntry]], factor: int) -> list[str]:
    """Return a warning if images have fewer pixels per side than `factor` times their latent size."""
    small = [
        image.height < size.height * factor or image.width < size.width * factor
        for size, images in buckets.items()
        for image in images
    ]
    warning = f"{sum(small):,} of {len(small):,} images are smaller than the training size and are enlarged"
    return [warning] if any(small) else []


def bucket_sizes(full: Scale, patch: int) -> list[Scale]:
    """Return latent sizes with about the area of `full` at different aspect ratios, including `full`."""
    area = full.height * full.width
    sizes = {_aspect(full): full}
    for ratio in ASPECTS:
        sides = math.sqrt(area / ratio), math.sqrt(area * ratio)
        size = Scale(full.frames, *(patch * max(1, round(side / patch)) for side in sides))
        sizes.setdefault(_aspect(size), size)
    return [sizes[ratio] for ratio in sorted(sizes)]


def load_pixels(entry: ImageEntry, size: tuple[int, int]) -> Tensor:
    """Read an image as pixels [3, H, W] in [-1, 1], resized to cover `size` = (H, W) and center-cropped.

    The EXIF orientation is applied, and transparency is shown over white. Raises DataError if unreadable.
    """
    height, width = size
    try:
        with open_image(entry.path) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow's plugins raise many kinds
        raise DataError(
            f"Cannot read {entry.path} ({error}); restore or remove it and start again."
        ) from error
    scale = max(height / image.height, width / image.width)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    # LANCZOS antialiases; reducing_gap first shrinks large images by box averages: faster, equally good.
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _inspect(path: Path, source: CaptionSource | None) -> ImageEntry | str:
    """Return the entry of an image, or the reason why it cannot be used."""
    try:
        width, height = _decoded_size(path)
    except ImageTooLarge:
        return f"of more than {MAX_PIXELS / 1e6:,.0f} megapixels (save a smaller copy)"
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
    """Return width and height with the orientation applied; decodes the image to detect truncated files."""
    with open_image(path) as image:
        _refuse_float(image)
        width, height = image.size
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        image.draft("RGB", (1, 1))  # JPEG only: decode at an eighth of the size
        image.load()
    return (height, width) if rotated else (width, height)


def _refuse_float(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range")


def _aspect(scale: Scale) -> float:
    return scale.width / scale.height


def _nearest(image: ImageEntry, sizes: Sequence[Scale]) -> Scale:
    return min(sizes, key=lambda size: abs(math.log(_aspect(size) * image.height / image.width)))

"""Existing images for a comparison, matched to prompts by number, by caption or by GenEval's layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from scalewise.common.errors import first_line
from scalewise.common.images import read_image
from scalewise.common.paths import normalize_unicode
from scalewise.data.files import IMAGE_SUFFIXES
from scalewise.data.image_folder import scan_images

PROMPTS_FILE = "prompts.json"
"""File with the captions and seeds of generated images, in their folder."""


class SamplerError(ValueError):
    """A sampler that cannot be parsed or read; the message has the remedy."""


def read_folder(folder: Path, captions: Sequence[str], *, numbers: Sequence[int] | None = None) -> np.ndarray:
    """Read the images of a folder, all or those with the given numbers: uint8 [N, H, W, 3] or [N, T, H, W,
    3].

    Files named 0.png, 1.jpg, ... are matched to prompts by number; others, and those in GenEval's layout
    (00000/samples/0000.png with 00000/metadata.jsonl), by caption. Warns if there are more images than
    prompts. Raises SamplerError if images are missing, damaged or of different sizes, or if numbered images
    of a comparison have other prompts.
    """
    paths = _by_number(folder, len(captions))
    if paths and (folder / PROMPTS_FILE).exists():
        _check_prompts(folder, captions)
    paths = paths or _by_caption(folder, captions)
    chosen = paths if numbers is None else [paths[i] for i in numbers]
    return np.stack(list(_read_images(folder, chosen)))


def _read_images(folder: Path, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield images; raises SamplerError if their sizes differ."""
    first: np.ndarray | None = None
    for path in paths:
        try:
            image = read_image(path)
        except Exception as error:  # Pillow's plugins raise many kinds
            raise SamplerError(f"Cannot read {path} ({first_line(error)}); replace it.") from error
        first = image if first is None else first
        if image.shape != first.shape:
            sizes = " and ".join(f"{i.shape[-2]}x{i.shape[-3]}" for i in (first, image))
            raise SamplerError(f"{folder} has images of {sizes} pixels; resize them to one size.")
        yield image


def _check_prompts(folder: Path, captions: Sequence[str]) -> None:
    try:
        stored = list(json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))["captions"])
    except (ValueError, KeyError, TypeError) as error:
        raise SamplerError(
            f"{folder / PROMPTS_FILE} does not contain the captions and seeds of a comparison; rename it to "
            "match the images by number only."
        ) from error
    for number, (was, wanted) in enumerate(zip_longest(stored[: len(captions)], captions)):
        if was != wanted:
            raise SamplerError(
                f"{folder / f'{number}.png'} was generated for {was!r}, but is to be scored with "
                f"{wanted!r}; use "
                f"the original prompts and --each (see {PROMPTS_FILE} in that folder)."
            )


def _by_number(folder: Path, count: int) -> list[Path]:
    """Return the paths of images 0 .. count - 1, in any readable format; empty if one is missing."""
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or (number := image_number(path)) < 0:
            continue
        if number in numbered:
            raise SamplerError(
                f"{folder} has two images with number {number}, {numbered[number].name} and {path.name}; "
                "remove one."
            )
        numbered[number] = path
    if any(i not in numbered for i in range(count)):
        return []
    _warn_of_extra(folder, len(numbered), count)
    return [numbered[i] for i in range(count)]


def _warn_of_extra(folder: Path, available: int, count: int) -> None:
    if available > count:
        warnings.warn(
            f"{folder} has {available:,} images, but {count:,} are needed: {available - count:,} are "
            "ignored. "
            "Pass all their prompts, or --each with the number of images per prompt, to score all.",
            stacklevel=2,
        )


def image_number(path: Path) -> int:
    """Return 17 for 17.png and 017.jpg; -1 if the name is not a number."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else -1


def _by_caption(folder: Path, captions: Sequence[str]) -> list[Path]:
    found = _geneval_layout(folder)
    if not found:
        for image in scan_images(folder, caption_from_name=True)[0]:
            found.setdefault(normalize_unicode(image.caption), []).append(image.path)
    available, paths = sum(map(len, found.values())), []
    for caption in captions:
        if not found.get(normalize_unicode(caption)):
            raise SamplerError(
                f"{folder} has too few images with the caption {caption!r}; name them 0.png to "
                f"{len(captions) - 1}.png in the order of the prompts, or give them captions."
            )
        paths.append(found[normalize_unicode(caption)].pop(0))
    _warn_of_extra(folder, available, len(paths))
    return paths


def _geneval_layout(folder: Path) -> dict[str, list[Path]]:
    """Return images by prompt from GenEval's layout: NUMBER/samples/*.png with NUMBER/metadata.jsonl."""
    found: dict[str, list[Path]] = {}
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        samples = metadata.parent / "samples"
        if not samples.is_dir():
            continue
        try:
            prompt = str(json.loads(metadata.read_text(encoding="utf-8"))["prompt"]).strip()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SamplerError(
                f'{metadata} does not contain GenEval\'s {{"prompt": ...}} ({first_line(error)}); recreate '
                "it."
            ) from error
        images = (p for p in samples.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and image_number(p) >= 0)
        found.setdefault(normalize_unicode(prompt), []).extend(sorted(images, key=image_number))
    return found

"""Images on disk for a comparison: found by number, by caption or in GenEval's layout."""

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

DRAWN_FOR = "prompts.json"
"""Beside pictures that a comparison kept: the captions and seeds that they were drawn for."""


class ContenderError(ValueError):
    """A contender that cannot take part; the message says what to write instead."""


def read_folder(folder: Path, captions: Sequence[str], *, numbers: Sequence[int] | None = None) -> np.ndarray:
    """Read a folder's images, all or some by number: bytes [N, H, W, 3], or videos [N, F, H, W, 3].

    0.png, 1.jpg, ... are taken by number, those in GenEval's layout (00000/samples/0000.png beside
    00000/metadata.jsonl) and others by caption. Numbered ones that a comparison kept know what they were
    drawn for, and are refused for other prompts. Images beyond the prompts are warned of.
    """
    paths = _by_number(folder, len(captions))
    if paths and (folder / DRAWN_FOR).exists():
        _check_drawn_for(folder, captions)
    paths = paths or _by_caption(folder, captions)
    chosen = paths if numbers is None else [paths[i] for i in numbers]
    return np.stack(list(_pictures(folder, chosen)))


def _pictures(folder: Path, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Pictures of one size."""
    first: np.ndarray | None = None
    for path in paths:
        try:
            picture = read_image(path)
        except Exception as error:  # Pillow's plugins raise many kinds
            raise ContenderError(f"Cannot read {path} ({first_line(error)}); replace it.") from error
        first = picture if first is None else first
        if picture.shape != first.shape:
            sizes = " and ".join(f"{p.shape[-2]}x{p.shape[-3]}" for p in (first, picture))
            raise ContenderError(f"{folder} holds pictures of {sizes} pixels; bring them to one size.")
        yield picture


def _check_drawn_for(folder: Path, captions: Sequence[str]) -> None:
    try:
        told = list(json.loads((folder / DRAWN_FOR).read_text(encoding="utf-8"))["captions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ContenderError(
            f"{folder / DRAWN_FOR} is not what a comparison writes there, captions and seeds; rename it to "
            "have the pictures taken by number."
        ) from error
    for number, (was, wanted) in enumerate(zip_longest(told[: len(captions)], captions)):
        if was != wanted:
            raise ContenderError(
                f"{folder / f'{number}.png'} was drawn for {was!r}, but is to be judged by {wanted!r}; give "
                f"the prompts and --each that it was drawn with (they stand in {DRAWN_FOR} there)."
            )


def _by_number(folder: Path, count: int) -> list[Path]:
    """Paths of 0 .. count - 1, or nothing if one is missing; any readable format, its suffix in any case."""
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or (number := number_of(path)) < 0:
            continue
        if number in numbered:
            raise ContenderError(
                f"{folder} has two images of number {number}, {numbered[number].name} and {path.name}; "
                "remove one."
            )
        numbered[number] = path
    if any(i not in numbered for i in range(count)):
        return []
    _warn_of_more(folder, len(numbered), count)
    return [numbered[i] for i in range(count)]


def _warn_of_more(folder: Path, there: int, count: int) -> None:
    if there > count:
        warnings.warn(
            f"{folder} holds {there:,} images for {count:,} to be judged: {there - count:,} are left out. "
            "Give all their prompts, or --each with the number of images of a prompt, to judge them.",
            stacklevel=2,
        )


def number_of(path: Path) -> int:
    """17 of 17.png or 017.jpg; -1 of other names."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else -1


def _by_caption(folder: Path, captions: Sequence[str]) -> list[Path]:
    found = _geneval_layout(folder)
    if not found:
        for image in scan_images(folder, caption_from_name=True)[0]:
            found.setdefault(normalize_unicode(image.caption), []).append(image.path)
    there, paths = sum(map(len, found.values())), []
    for caption in captions:
        if not found.get(normalize_unicode(caption)):
            raise ContenderError(
                f"{folder} has too few pictures with the caption {caption!r}; name them 0.png to "
                f"{len(captions) - 1}.png in the order of the prompts, or give them captions."
            )
        paths.append(found[normalize_unicode(caption)].pop(0))
    _warn_of_more(folder, there, len(paths))
    return paths


def _geneval_layout(folder: Path) -> dict[str, list[Path]]:
    """Images by prompt of folders NUMBER/samples with NUMBER/metadata.jsonl, GenEval's layout."""
    found: dict[str, list[Path]] = {}
    for told in sorted(folder.glob("*/metadata.jsonl")):
        samples = told.parent / "samples"
        if not samples.is_dir():
            continue
        try:
            prompt = str(json.loads(told.read_text(encoding="utf-8"))["prompt"]).strip()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ContenderError(
                f'{told} does not hold GenEval\'s {{"prompt": ...}} ({first_line(error)}); write it again.'
            ) from error
        images = (p for p in samples.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and number_of(p) >= 0)
        found.setdefault(normalize_unicode(prompt), []).extend(sorted(images, key=number_of))
    return found

"""The files of an image folder: images, captions and metadata, and a count of files that are not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from scalewise.common.paths import normalize_unicode

METADATA_FILES = ("metadata.jsonl", "captions.json", "metadata.csv", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files with the same stem as the image; the first one is preferred."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
if features.check("avif"):
    IMAGE_SUFFIXES.add(".avif")
# Suffixes of files that nobody expects to be read as images; all others are reported as not read.
IGNORED_SUFFIXES = frozenset(
    (".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log",
     ".html", ".xml", ".py", ".sh", ".db", ".lock", ".npy", ".npz", ".pt",
     ".safetensors", ".sha256", ".md5", ".xmp", ".aae", ".thm", ".pp3", ".dop", ".lnk", ".url")
)  # fmt: skip


@dataclass
class FolderFiles:
    """Files under a folder, without hidden ones, in a fixed order."""

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that are not read, by suffix ("" for none), except those with IGNORED_SUFFIXES."""
    broken: list[Path] = field(default_factory=list)
    """Links without a target, and folders that cannot be opened."""

    @property
    def all(self) -> list[Path]:
        """All files that are read."""
        return sorted([*self.images, *self.captions, *self.metadata])

    @property
    def problems(self) -> list[str]:
        """Sentences about files that are not read; empty if there are none."""
        problems = []
        if count := sum(self.unread.values()):
            kinds = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
            named = ", ".join(f"{number:,} {suffix or 'without a suffix'}" for suffix, number in kinds)
            are = "file is" if count == 1 else "files are"
            problems.append(f"{count:,} {are} not read: {named}; convert images to JPEG or PNG")
        if self.broken:
            links = f"{len(self.broken):,} broken link{'s' * (len(self.broken) > 1)}"
            problems.append(f"{links} or folders that cannot be opened ({join_names(self.broken)})")
        return problems


def find_files(root: Path) -> FolderFiles:
    """Find the files under a folder, following links; every folder is read only once."""
    found = FolderFiles()
    for path in _walk(root, {os.path.realpath(root)}, found.broken):
        suffix = path.suffix.lower()
        if path.name in METADATA_FILES:
            found.metadata.append(path)
        elif suffix in IMAGE_SUFFIXES:
            found.images.append(path)
        elif suffix in CAPTION_SUFFIXES:
            found.captions.append(path)
        elif suffix not in IGNORED_SUFFIXES:
            found.unread[suffix] += 1
    return found


def name_key(path: Path | str) -> str:
    """Return the form of a file name used for comparison: absolute, without "..", Unicode-normalized."""
    return normalize_unicode(os.path.abspath(path))


def join_names(paths: list[Path], limit: int = 3) -> str:
    """Join the names of the first few paths."""
    names = ", ".join(path.name for path in paths[:limit])
    return names if len(paths) <= limit else f"{names}, ..."


def _walk(folder: Path, seen: set[str], broken: list[Path]) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        broken.append(folder)
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            # Without this check, a link to a parent would recurse forever, one to a sibling be read twice.
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield from _walk(path, seen, broken)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            broken.append(path)

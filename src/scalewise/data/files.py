"""Which files a folder of images holds: linked folders followed, and what is not read counted by its kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from scalewise.common.paths import normalize_unicode

METADATA = ("metadata.jsonl", "captions.json", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
"""Suffixes of caption files beside images, the first one preferred."""
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
if features.check("avif"):
    READABLE.add(".avif")
# Files that no image is expected in; every other suffix is named when it is not read.
COMPANIONS = frozenset(
    (".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log",
     ".html", ".xml", ".py", ".sh", ".db", ".lock", ".npy", ".npz", ".pt",
     ".safetensors", ".sha256", ".md5", ".xmp", ".aae", ".thm", ".pp3", ".dop", ".lnk", ".url")
)  # fmt: skip


@dataclass
class Found:
    """Files under a folder, hidden ones left out, each folder once and in a fixed order."""

    images: list[Path] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """How many files of each suffix are not read ("" for none), those of COMPANIONS left out."""
    broken: list[Path] = field(default_factory=list)
    """Links that lead nowhere, and folders that may not be opened."""

    @property
    def all(self) -> list[Path]:
        """All files that are read."""
        return sorted([*self.images, *self.sidecars, *self.metadata])

    @property
    def told(self) -> list[str]:
        """Sentences about what is not read; none if all is."""
        told = []
        if count := sum(self.unread.values()):
            kinds = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
            named = ", ".join(f"{number:,} {suffix or 'without a suffix'}" for suffix, number in kinds)
            are = "file is" if count == 1 else "files are"
            told.append(f"{count:,} {are} not read: {named}; convert images to JPEG or PNG")
        if self.broken:
            links = f"{len(self.broken):,} link{'s' * (len(self.broken) > 1)}"
            told.append(f"{links} to nothing, or folders that may not be opened ({name_some(self.broken)})")
        return told


def find_files(root: Path) -> Found:
    """Look through a folder and its folders, linked ones too; one that is met again is not read again."""
    found = Found()
    for path in _walk(root, {os.path.realpath(root)}, found.broken):
        suffix = path.suffix.lower()
        if path.name in METADATA:
            found.metadata.append(path)
        elif suffix in READABLE:
            found.images.append(path)
        elif suffix in SIDECARS:
            found.sidecars.append(path)
        elif suffix not in COMPANIONS:
            found.unread[suffix] += 1
    return found


def name_key(path: Path | str) -> str:
    """What file names are compared by: absolute, without ".." and in one Unicode form."""
    return normalize_unicode(os.path.abspath(path))


def name_some(paths: list[Path], limit: int = 3) -> str:
    """The first few names."""
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
            # A link to a folder above would be read for ever, one to a folder beside twice.
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield from _walk(path, seen, broken)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            broken.append(path)

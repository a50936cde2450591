"""Captions of an image folder: text files beside the images, or one metadata file for many."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalewise.data.shards import DataError

METADATA = ("metadata.jsonl", "captions.json", "metadata.csv")


class CaptionSource:
    """Finds an image's caption: in `<stem>.txt`, else in a metadata file, else (if allowed) in its name."""

    def __init__(self, metadata: list[Path], *, from_name: bool = False) -> None:
        """The metadata files name images relative to their own folder (file_name), with a text or caption."""
        self.from_name = from_name
        self.listed = {path: words for file in metadata for path, words in _read(file) if words}

    def caption(self, image: Path) -> str:
        """Return the caption, on one line, or "" if there is none; UnicodeDecodeError if it is not UTF-8."""
        sidecar = image.with_suffix(".txt")
        words = sidecar.read_text(encoding="utf-8-sig") if sidecar.exists() else ""
        words = words.strip() or self.listed.get(image, "")
        if not words and self.from_name:
            words = image.stem.replace("-", " ").replace("_", " ")
        return " ".join(words.split())

    def absent(self) -> list[Path]:
        """Images that a metadata file names but that are not there."""
        return [path for path in self.listed if not path.exists()]


def _read(file: Path) -> Iterator[tuple[Path, str]]:
    """Yield (image, caption) of a metadata file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    for place, row in _rows(file, text):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise DataError(f"{place} has no file_name; write one row {{file_name, text}} per image.")
        words = row.get("text") or row.get("caption") or ""
        if not isinstance(words, str):
            raise DataError(f"{place} has a caption that is no text, {words!r}; give one string per image.")
        yield file.parent / name, words


def _rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a metadata file of any of the three kinds."""
    if file.suffix == ".csv":
        rows = enumerate(csv.DictReader(io.StringIO(text)), start=1)
        yield from ((f"{file}, row {i},", row) for i, row in rows)
    elif file.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        yield from ((f"{file}, line {i},", _json(f"{file}, line {i},", line)) for i, line in lines)
    else:
        whole = _json(f"{file}", text)
        if isinstance(whole, dict):  # {"image.png": "caption"}
            whole = [{"file_name": name, "text": words} for name, words in whole.items()]
        if not isinstance(whole, list):
            raise DataError(f"{file} must hold {{image: caption}} or a list of {{file_name, text}}.")
        yield from ((f"{file}, entry {i},", row) for i, row in enumerate(whole, start=1))


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is no JSON ({error}); correct it.") from error

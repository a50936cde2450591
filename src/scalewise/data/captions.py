"""Captions of an image folder: text files beside the images, or one metadata file for many."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scalewise.common.paths import expand_home, normalize_unicode
from scalewise.data.files import SIDECARS, Found, name_key
from scalewise.data.shards import DataError

FIELDS = ("text", "caption", "prompt")
"""Columns of a caption, in any case; the first that has one counts."""


class CaptionSource:
    """Finds an image's caption: in a file beside it, else in a metadata file, else (if allowed) in its name.

    Names are compared in one Unicode form (see `name_key`).
    """

    def __init__(self, found: Found, *, from_name: bool = False) -> None:
        """Metadata files name images (file_name) from their own folder on or absolutely, with a caption."""
        self.from_name = from_name
        self.beside = {(name_key(path.with_suffix("")), path.suffix.lower()): path for path in found.sidecars}
        self.images = {key for path in found.images for key in _keys(path)}
        self.listed: dict[str, tuple[Path, str]] = {}
        for file in found.metadata:
            for path, words in _read(file):
                for key in _keys(path) if words else ():
                    self.listed.setdefault(key, (path, words))

    def caption(self, image: Path) -> str:
        """Return the caption, on one line, or "" if there is none; UnicodeDecodeError if it is not UTF-8."""
        stem, words = name_key(image.with_suffix("")), ""
        for suffix in SIDECARS:
            if not words and (file := self.beside.get((stem, suffix))):
                words = file.read_text(encoding="utf-8-sig").strip()
        words = words or next((self.listed[key][1] for key in _keys(image) if key in self.listed), "")
        if not words and self.from_name:
            words = normalize_unicode(image.stem.replace("-", " ").replace("_", " "))
        return " ".join(words.split())

    def unmatched(self) -> dict[str, list[Path]]:
        """Files that a metadata file names but that are no images of the folder, by reason."""
        reasons: dict[str, list[Path]] = {}
        for path in dict.fromkeys(path for path, _ in self.listed.values()):
            if self.images.isdisjoint(_keys(path)):
                how = "outside the folder or of another kind" if path.exists() else "not there"
                reasons.setdefault(f"named in the metadata but {how}", []).append(path)
        return reasons


def _keys(path: Path) -> list[str]:
    """The names that a file is known by: as given, and by where its folder really lies if that is linked."""
    real = os.path.join(os.path.realpath(path.parent), path.name)
    return list(dict.fromkeys([name_key(path), name_key(real)]))


def _read(file: Path) -> Iterator[tuple[Path, str]]:
    """Yield (image, caption) of a metadata file."""
    fields = set[str]()
    for place, row in _rows(file):
        values = {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else {}
        fields |= values.keys()
        name = values.get("file_name")
        if not isinstance(name, str):
            raise DataError(f"{place} has no file_name; write one row {{file_name, text}} per image.")
        words = next((values[field] for field in FIELDS if values.get(field)), "")
        if not isinstance(words, str):
            raise DataError(f"{place} has a caption that is no text, {words!r}; give one string per image.")
        yield file.parent / expand_home(name), words
    if fields and fields.isdisjoint(FIELDS):
        warnings.warn(
            f"{file} has no captions: none of its columns ({', '.join(sorted(fields))}) is called "
            f"{', '.join(FIELDS[:-1])} or {FIELDS[-1]}; rename the right one.",
            stacklevel=2,
        )


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a metadata file of any kind."""
    if file.suffix == ".parquet":
        yield from _numbered(file, "row", _of_parquet(file))
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    if file.suffix == ".csv":
        yield from _numbered(file, "row", csv.DictReader(io.StringIO(text)))
    elif file.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        yield from ((f"{file}, line {i},", _json(f"{file}, line {i},", line)) for i, line in lines)
    else:
        whole = _json(f"{file}", text)
        if isinstance(whole, dict):  # {"image.png": "caption"}
            whole = [{"file_name": name, "text": words} for name, words in whole.items()]
        if not isinstance(whole, list):
            raise DataError(f"{file} must hold {{image: caption}} or a list of {{file_name, text}}.")
        yield from _numbered(file, "entry", whole)


def _numbered(file: Path, what: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{file}, {what} {i},", row) for i, row in enumerate(rows, start=1))


def _of_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet table, of the columns that are of use: others may hold whole images."""
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            useful = [name for name in names if name.strip().lower() in ("file_name", *FIELDS)]
            if not useful:
                raise DataError(
                    f"{file} has no column file_name, only {', '.join(names)}; images inside a table are not "
                    "read: save them as files, and name them in that column."
                )
            for batch in table.iter_batches(columns=useful):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet table ({error}); write it again.") from error


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is no JSON ({error}); correct it.") from error

"""Captions of an image folder: one text file per image, or metadata files for many images."""

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
from scalewise.data.files import CAPTION_SUFFIXES, FolderFiles, name_key
from scalewise.data.shards import DataError

FIELDS = ("text", "caption", "prompt")
"""Names of the caption column, in any case; the first one that is not empty is used."""


class CaptionSource:
    """Finds an image's caption in its own text file, else in a metadata file, else (optionally) in its name.

    Names are compared after Unicode normalization (see `name_key`).
    """

    def __init__(self, found: FolderFiles, *, from_name: bool = False) -> None:
        """Read all metadata files. Their file_name is absolute or relative to the metadata file's folder."""
        self.from_name = from_name
        self.text_files = {
            (name_key(path.with_suffix("")), path.suffix.lower()): path for path in found.captions
        }
        self.images = {key for path in found.images for key in _keys(path)}
        self.in_metadata: dict[str, tuple[Path, str]] = {}
        for file in found.metadata:
            for path, caption in _read(file):
                for key in _keys(path) if caption else ():
                    self.in_metadata.setdefault(key, (path, caption))

    def caption(self, image: Path) -> str:
        """Return an image's caption, on one line, or "" if it has none; UnicodeDecodeError if not UTF-8."""
        stem, caption = name_key(image.with_suffix("")), ""
        for suffix in CAPTION_SUFFIXES:
            if not caption and (file := self.text_files.get((stem, suffix))):
                caption = file.read_text(encoding="utf-8-sig").strip()
        found = (self.in_metadata[key][1] for key in _keys(image) if key in self.in_metadata)
        caption = caption or next(found, "")
        if not caption and self.from_name:
            caption = normalize_unicode(image.stem.replace("-", " ").replace("_", " "))
        return " ".join(caption.split())

    def unmatched(self) -> dict[str, list[Path]]:
        """Return, by reason, the files that metadata names but that are not among the folder's images."""
        reasons: dict[str, list[Path]] = {}
        for path in dict.fromkeys(path for path, _ in self.in_metadata.values()):
            if self.images.isdisjoint(_keys(path)):
                how = "outside the folder or not an image" if path.exists() else "missing"
                reasons.setdefault(f"named in the metadata but {how}", []).append(path)
        return reasons


def _keys(path: Path) -> list[str]:
    """Return the names that identify a file: its path as given, and with links in its folder resolved."""
    real = os.path.join(os.path.realpath(path.parent), path.name)
    return list(dict.fromkeys([name_key(path), name_key(real)]))


def _read(file: Path) -> Iterator[tuple[Path, str]]:
    """Yield (image, caption) of a metadata file."""
    fields = set[str]()
    for location, row in _rows(file):
        values = {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else {}
        fields |= values.keys()
        name = values.get("file_name")
        if not isinstance(name, str):
            raise DataError(f"{location} has no file_name; write one row {{file_name, text}} per image.")
        caption = next((values[field] for field in FIELDS if values.get(field)), "")
        if not isinstance(caption, str):
            raise DataError(
                f"{location} has a caption that is not text, {caption!r}; give one string per image."
            )
        yield file.parent / expand_home(name), caption
    if fields and fields.isdisjoint(FIELDS):
        warnings.warn(
            f"{file} has no captions: none of its columns ({', '.join(sorted(fields))}) is named "
            f"{', '.join(FIELDS[:-1])} or {FIELDS[-1]}; rename the caption column.",
            stacklevel=2,
        )


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location for error messages, row) of a metadata file of any format."""
    if file.suffix == ".parquet":
        yield from _numbered(file, "row", _parquet_rows(file))
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
            whole = [{"file_name": name, "text": caption} for name, caption in whole.items()]
        if not isinstance(whole, list):
            raise DataError(f"{file} must hold {{image: caption}} or a list of {{file_name, text}}.")
        yield from _numbered(file, "entry", whole)


def _numbered(file: Path, what: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{file}, {what} {i},", row) for i, row in enumerate(rows, start=1))


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet table, without other columns, which may hold whole images."""
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            useful = [name for name in names if name.strip().lower() in ("file_name", *FIELDS)]
            if not useful:
                raise DataError(
                    f"{file} has no column file_name, only {', '.join(names)}; images inside a table are not "
                    "read: save them as files and list their names in a column file_name."
                )
            for batch in table.iter_batches(columns=useful):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a Parquet table ({error}); write it again.") from error


def _json(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{location} is not valid JSON ({error}); correct it.") from error

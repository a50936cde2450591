"""Prompt files: a line each, or the lists that benchmarks publish as JSON, JSON lines, CSV and TSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scalewise.common.text_files import TextFileError, read_utf8
from scalewise.data.shards import DataError

FIELDS = ("prompt", "prompts", "caption", "captions", "text")
"""Names of the field or column that holds a prompt, in any case: GenEval, PartiPrompts, DrawBench, MJHQ."""

# Characters that end a line or a page for some programs, though they stand within a line of the file.
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
_OTHERS = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx", ".gz", ".zip")


def read_prompt_file(file: Path) -> list[str]:
    """Read the prompts of a file in its order, each on one line; empty ones are left out.

    `.jsonl`, `.json`, `.csv` and `.tsv` are read as what they are, by a field of FIELDS; every other file has
    a prompt a line. Raises DataError for a file that cannot be read so.
    """
    kind = file.suffix.lower()
    if kind in _OTHERS:
        raise DataError(
            f"The prompt file {file} is of a kind that is not read; give plain text, one prompt a line, or "
            ".jsonl, .json, .csv or .tsv."
        )
    try:
        text = read_utf8(file)
    except TextFileError as error:
        raise DataError(f"The prompt file {error}") from error
    if kind == ".jsonl":
        found = _of_json_lines(file, text)
    elif kind == ".json":
        found = _of_json(file, text)
    elif kind in (".csv", ".tsv"):
        found = _of_table(file, text, "," if kind == ".csv" else "\t")
    else:
        found = _of_lines(file, text)
    prompts = [_BREAKS.sub(" ", prompt).strip() for prompt in found]
    return [prompt for prompt in prompts if prompt]


def _of_lines(file: Path, text: str) -> list[str]:
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    try:
        looks_like_json = isinstance(json.loads(first), dict | list)
    except RecursionError:
        looks_like_json = True
    except ValueError:
        looks_like_json = first.strip() in ("[", "{")
    if looks_like_json:
        raise DataError(f"The prompt file {file} holds JSON; give it a name in .jsonl (or .json).")
    return lines


def _of_json_lines(file: Path, text: str) -> list[str]:
    lines = [(f"{file}, line {i},", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_prompt(place, _json(place, line)) for place, line in lines]


def _of_json(file: Path, text: str) -> list[str]:
    """Prompts of a list, of the one list in an object, of an object of objects with prompts (as MJHQ), or of
    one object that has a prompt itself.
    """
    value = _json(str(file), text)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) > 1:
            raise DataError(f"{file} holds {len(lists)} lists ({', '.join(value)}); give a file with one.")
        if lists:
            value = lists[0]
        elif _field(value) is not None:
            value = [value]
        elif value and all(isinstance(inner, dict) for inner in value.values()):
            value = list(value.values())
        else:
            raise DataError(
                f"{file} holds an object with the keys {_listed(value)}, of which none is one of "
                f"{', '.join(FIELDS)}; give such an object, or a list of prompts."
            )
    if not isinstance(value, list):
        raise DataError(f"{file} must hold a list of prompts, or of objects with a field prompt.")
    return [_prompt(f"{file}, entry {i},", row) for i, row in enumerate(value, 1)]


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{place} nests its JSON too deeply to be read; give a list of prompts.") from error
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); correct it.") from error


def _listed(names: Iterable[Any], most: int = 8) -> str:
    """Names in a sentence, of which the first few are enough."""
    listed = list(map(str, names))
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest if listed else "none"


def _prompt(place: str, row: Any) -> str:
    if isinstance(row, dict):
        field = _field(row)
        if field is None:
            raise DataError(f"{place} has no field {', '.join(FIELDS)}, but {', '.join(map(str, row))}.")
        row = row[field]
    if not isinstance(row, str):
        raise DataError(f"{place} has a prompt that is not text, {row!r}; correct it.")
    return row


def _field(names: Iterable[Any]) -> Any:
    by_lower = {str(name).strip().lower(): name for name in names}
    return next((by_lower[field] for field in FIELDS if field in by_lower), None)


def _of_table(file: Path, text: str, delimiter: str) -> list[str]:
    """Prompts of a table with column names; in TSV a quotation mark may be part of a prompt."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if delimiter != "\t":
            raise DataError(f"{file} is not CSV ({error}); put quotes around prompts with commas.") from error
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE))
    names, *rows = [row for row in rows if row] or [[]]
    field = _field(names)
    if field is None:
        raise DataError(
            f"{file} has no column {', '.join(FIELDS)}, but {', '.join(names) or 'none'}; name the column, "
            "or give plain text with one prompt a line."
        )
    place = names.index(field)
    short = next((i for i, row in enumerate(rows, 2) if len(row) != len(names)), None)
    if short:
        raise DataError(f"{file}, row {short}, has another number of columns than its header; correct it.")
    return [row[place] for row in rows]

"""Prompt files: text with one prompt per line, or the JSON, JSON lines, CSV and TSV files of benchmarks."""

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
"""Names of the prompt field or column, in any case, as in GenEval, PartiPrompts, DrawBench and MJHQ."""

# Control and separator characters that some programs take for line or page ends.
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
_OTHERS = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx", ".gz", ".zip")


def read_prompt_file(file: Path) -> list[str]:
    """Read the prompts of a file in order, each converted to one line, without empty ones.

    `.jsonl`, `.json`, `.csv` and `.tsv` files have prompts in a field or column named in FIELDS; every other
    file has one prompt per line. Raises DataError for files that cannot be read like this.
    """
    kind = file.suffix.lower()
    if kind in _OTHERS:
        raise DataError(
            f"The prompt file {file} has an unsupported format; give plain text with one prompt per line, or "
            ".jsonl, .json, .csv or .tsv."
        )
    try:
        text = read_utf8(file)
    except TextFileError as error:
        raise DataError(f"The prompt file {error}") from error
    if kind == ".jsonl":
        found = _json_lines_prompts(file, text)
    elif kind == ".json":
        found = _json_prompts(file, text)
    elif kind in (".csv", ".tsv"):
        found = _table_prompts(file, text, "," if kind == ".csv" else "\t")
    else:
        found = _text_prompts(file, text)
    prompts = [_BREAKS.sub(" ", prompt).strip() for prompt in found]
    return [prompt for prompt in prompts if prompt]


def _text_prompts(file: Path, text: str) -> list[str]:
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    try:
        looks_like_json = isinstance(json.loads(first), dict | list)
    except RecursionError:
        looks_like_json = True
    except ValueError:
        looks_like_json = first.strip() in ("[", "{")
    if looks_like_json:
        raise DataError(f"The prompt file {file} contains JSON; rename it to end in .jsonl (or .json).")
    return lines


def _json_lines_prompts(file: Path, text: str) -> list[str]:
    lines = [(f"{file}, line {i},", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_prompt(location, _json(location, line)) for location, line in lines]


def _json_prompts(file: Path, text: str) -> list[str]:
    """Return the prompts of a JSON file.

    It has a list, an object with one list, an object of objects with a prompt each (as MJHQ), or one object
    with a prompt.
    """
    value = _json(str(file), text)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) > 1:
            raise DataError(f"{file} has {len(lists)} lists ({', '.join(value)}); give a file with one list.")
        if lists:
            value = lists[0]
        elif _field(value) is not None:
            value = [value]
        elif value and all(isinstance(inner, dict) for inner in value.values()):
            value = list(value.values())
        else:
            raise DataError(
                f"{file} has an object with the keys {_join_some(value)}, but needs one of "
                f"{', '.join(FIELDS)}; add such a key, or give a list of prompts."
            )
    if not isinstance(value, list):
        raise DataError(f"{file} must contain a list of prompts, or of objects with a field prompt.")
    return [_prompt(f"{file}, entry {i},", row) for i, row in enumerate(value, 1)]


def _json(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{location} has JSON nested too deeply; give a list of prompts.") from error
    except ValueError as error:
        raise DataError(f"{location} is not valid JSON ({error}); correct it.") from error


def _join_some(names: Iterable[Any], limit: int = 8) -> str:
    """Join the first names of a list, with the number of others."""
    listed = list(map(str, names))
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest if listed else "none"


def _prompt(location: str, row: Any) -> str:
    if isinstance(row, dict):
        field = _field(row)
        if field is None:
            raise DataError(
                f"{location} has the fields {_join_some(row)}, but needs one of {', '.join(FIELDS)}; add one."
            )
        row = row[field]
    if not isinstance(row, str):
        raise DataError(f"{location} has a prompt that is not text, {row!r}; correct it.")
    return row


def _field(names: Iterable[Any]) -> Any:
    by_lower = {str(name).strip().lower(): name for name in names}
    return next((by_lower[field] for field in FIELDS if field in by_lower), None)


def _table_prompts(file: Path, text: str, delimiter: str) -> list[str]:
    """Return the prompts of a table with a header; in TSV, a quotation mark may be part of a prompt."""
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
            f"{file} has the columns {', '.join(names) or 'none'}, but needs one of {', '.join(FIELDS)}; "
            "rename the prompt column, or give plain text with one prompt per line."
        )
    column = names.index(field)
    wrong = next((i for i, row in enumerate(rows, 2) if len(row) != len(names)), None)
    if wrong:
        raise DataError(f"{file}, row {wrong}, does not have as many columns as the header; correct it.")
    return [row[column] for row in rows]

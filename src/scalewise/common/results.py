"""Results on disk: text and JSON files, each whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from scalewise.common.checkpoint import write_atomically


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all; makes its folder.

    A dataclass is written as its `to_list` or `to_dict` says, or by its fields.
    """
    write_text(path, json.dumps(value, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> object:
    for form in ("to_list", "to_dict"):
        if hasattr(value, form):
            return getattr(value, form)()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no form in JSON")

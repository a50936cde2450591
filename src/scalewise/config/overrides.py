"""Parsing of overrides by the type of their key: strings stay as typed, numbers and lists are parsed."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Sequence
from operator import attrgetter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_CHANGED = " (changed: "
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False,
           "0": False}  # fmt: skip


def field_type(model: type[BaseModel], dotted: str) -> Any:
    """Return the annotation of a dotted key, or None if there is no such key."""
    kind: Any = model
    for part in dotted.split("."):
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if part not in fields:
            return None
        kind = fields[part].annotation
    return kind


def choices_of(kind: Any) -> list[str]:
    """Return the allowed values of a key with a fixed set of choices (booleans, literals, null), else []."""
    if get_origin(kind) in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        found = [choice for part in parts for choice in choices_of(part)]
        return [*found, "null"] if found and len(parts) < len(get_args(kind)) else found
    if get_origin(kind) is Annotated:
        return choices_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return ["true", "false"] if kind is bool else []


def read_value(text: str, kind: Any) -> Any:
    """Parse the text after `key=` for a key of type `kind`.

    A string key takes the text as typed: quotes are kept, and `#`, `123` and `no` are plain text. An optional
    string (`str | None`) is None for `null` or empty text. All other keys accept numbers, `true` and `false`,
    `null`, and YAML lists; the elements of a list of strings stay strings.

    Raises yaml.YAMLError for an invalid list.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in kinds and text.strip() in ("null", ""):
        return None
    if any(_is_text(k) for k in kinds):
        return text
    if bool in kinds:
        return _BOOLEANS.get(text.strip().lower(), text)
    # BaseLoader keeps every scalar a string; YAML's rules would parse 010 as 8 and 1:30 as 90.
    value = yaml.BaseLoader(text).get_single_data()
    if any(_is_text(element) for k in kinds for element in get_args(k)):
        return value
    return [_plain(v) for v in value] if isinstance(value, list) else _plain(value)


def key_of(assignment: str) -> str:
    """Return the dotted key of an override "key=value"."""
    return assignment.partition("=")[0].strip()


def replaced(assignments: Sequence[str], by: Sequence[str]) -> list[str]:
    """Return `assignments` without the keys set in `by`, followed by `by`."""
    keys = {key_of(text) for text in by}
    return [*(text for text in assignments if key_of(text) not in keys), *by]


def about_of(before: Any, after: Any, keys: Iterable[str]) -> str:
    """Return the `about` text of a recipe after overrides: the original, and the changed keys in brackets."""
    text, sign, old = before.about.partition(_CHANGED)
    names = old.removesuffix(")").split(", ") if sign else []
    for key in keys:
        value = attrgetter(key)
        if key != "name" and value(before) != value(after):
            names.append(key)
    return f"{text}{_CHANGED}{', '.join(dict.fromkeys(names))})" if names else text


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind is str or (get_origin(kind) is Literal and all(isinstance(v, str) for v in get_args(kind)))


def _plain(value: Any) -> Any:
    """Convert to a number if possible; anything else is left to validation."""
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    return value


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List all dotted field names of a recipe, for error messages and help."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += field_names(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def explain_fields(
    model: type[BaseModel], prefix: str = "", *, defaults: BaseModel | None = None
) -> list[tuple[str, str, str]]:
    """Return dotted name, default, and description with choices of every field."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        part, value = field.annotation, getattr(defaults, name, field.default)
        if isinstance(part, type) and issubclass(part, BaseModel):
            inside = value if isinstance(value, BaseModel) else None
            rows += explain_fields(part, f"{prefix}{name}.", defaults=inside)
        else:
            shown = "" if value is PydanticUndefined else json.dumps(value)
            choices = ", ".join(choices_of(field.annotation))
            parts = [field.description or "", f"one of {choices}" if choices else ""]
            rows.append((prefix + name, shown, "; ".join(filter(None, parts))))
    return rows


def nearest(word: str, known: Sequence[str]) -> str:
    """Return "did you mean 'x'?" for the nearest known word, or the list of known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:  # the same last part under another group
        close = [k for k in known if k.split(".")[-1] == word.split(".")[-1]][:1]
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."

"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Format a table without a trailing newline; columns after the first `left` are right-aligned."""
    rules = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(map(_line, (head, rules, *rows)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

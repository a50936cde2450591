"""How long work tells how far it is, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Done = Callable[[int], None]
"""Called with the number done so far."""


class Progress(Protocol):
    """Announces work, such as `scalewise.common.console.progress`."""

    def __call__(self, what: str, total: int, /) -> AbstractContextManager[Done]:
        """Enter a piece of work; `total` is the number to do, 0 where it is not known."""


def ignore(_number: int, /) -> None:
    """Report nothing: the default of a parameter `done`."""


def silent(_what: str, _total: int, /) -> AbstractContextManager[Done]:
    """Show nothing: the default of a parameter `progress`."""
    return nullcontext(ignore)

"""Types for reporting the progress of long work, independent of how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

ProgressCallback = Callable[[int], None]
"""Called with the number of items done so far."""


class Progress(Protocol):
    """Starts a progress display, such as `scalewise.common.console.progress`."""

    def __call__(self, what: str, total: int, /) -> AbstractContextManager[ProgressCallback]:
        """Show work named `what` with `total` items (0: unknown); yields the callback to report to."""


def no_progress(_number: int, /) -> None:
    """Ignore progress: the default callback."""


def silent(_what: str, _total: int, /) -> AbstractContextManager[ProgressCallback]:
    """Show no progress: the default of parameters named `progress`."""
    return nullcontext(no_progress)

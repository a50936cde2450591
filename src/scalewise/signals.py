"""The signals that ask a command to end: Ctrl-C, a polite kill, and a terminal that was closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOPPING = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Their names; Windows has no SIGHUP."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end, which is done as for Ctrl-C: what is made is kept."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def exit_code(name: str) -> int:
    """The exit code of a command that a signal ended, as shells give it: 130 for SIGINT (Ctrl-C)."""
    return 128 + signal.Signals[name].value


@contextmanager
def catching(
    handler: Callable[[int, FrameType | None], None], names: Sequence[str] = STOPPING
) -> Iterator[None]:
    """Call `handler` for signals within the block; SIGHUP stays ignored where it is (under nohup).

    Outside of the main thread nothing is caught: signals stay with their owner.
    """
    before = {}
    try:
        for name in names:
            number = signal.Signals[name]
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

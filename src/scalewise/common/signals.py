"""The signals that ask a command to end: Ctrl-C, a polite kill, and a terminal that was closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType

STOPPING = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Their names; Windows has no SIGHUP."""

STOPPED = "Stopped. What was written so far is kept."


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end, which is done as for Ctrl-C: what is made is kept."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def exit_code(name: str) -> int:
    """The exit code of a command that a signal ended, as shells give it: 130 for SIGINT (Ctrl-C)."""
    return 128 + signal.Signals[name].value


_asked: list[str] = []  # names of the signals that asked this process's command to end
_at_work = 0


def ask(name: str) -> None:
    """Note that a signal asked the command to end, for `raise_if_asked`."""
    _asked.append(name)


def forget() -> None:
    """Begin anew: nothing was asked."""
    _asked.clear()


def raise_if_asked() -> None:
    """Raise Stopped if a signal came whose exception did not arrive: a library may have dropped it."""
    if _asked:
        raise Stopped(_asked[0])


@contextmanager
def at_work() -> Iterator[None]:
    """The time in which a command may hold what is not written yet; it asks `raise_if_asked` by itself."""
    global _at_work
    raise_if_asked()
    _at_work += 1
    try:
        yield
    finally:
        _at_work -= 1


def is_at_work() -> bool:
    """Whether something is under way that may hold what is not written yet."""
    return _at_work > 0


def importing(frame: FrameType | None, *, within: CodeType) -> bool:
    """Whether a frame runs inside an import that the function of code `within` began, directly or not.

    An exception there may pass through C++ that cannot take it: it aborts the process (torch's import does).
    """
    while frame is not None and frame.f_code is not within:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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

"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType

STOP_SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Names of the signals that stop a command; Windows has no SIGHUP."""

STOPPED_MESSAGE = "Stopped. What was written so far is kept."


class Stopped(KeyboardInterrupt):
    """A signal requested the command to stop; handled like Ctrl-C, finished results are kept."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def exit_code(name: str) -> int:
    """Return the exit code of a command stopped by a signal, as shells do: 130 for SIGINT (Ctrl-C)."""
    return 128 + signal.Signals[name].value


_requested: list[str] = []  # names of the signals that requested this command to stop
_working = 0  # number of nested `working` blocks


def request_stop(name: str) -> None:
    """Record that a signal requested the command to stop, for `raise_if_stop_requested`."""
    _requested.append(name)


def clear_stop_requests() -> None:
    """Forget all recorded requests."""
    _requested.clear()


def raise_if_stop_requested() -> None:
    """Raise Stopped if a stop was requested: a library may have swallowed the handler's exception."""
    if _requested:
        raise Stopped(_requested[0])


@contextmanager
def working() -> Iterator[None]:
    """Mark a block that may hold unsaved results; raises Stopped on entry if a stop was requested."""
    global _working
    raise_if_stop_requested()
    _working += 1
    try:
        yield
    finally:
        _working -= 1


def is_working() -> bool:
    """Return whether a `working` block, which may hold unsaved results, is active."""
    return _working > 0


def is_importing(frame: FrameType | None, *, within: CodeType) -> bool:
    """Return whether a frame runs inside an import, below the function whose code is `within`.

    Raising an exception there may abort the process: it can pass through C++ code without a handler, as in
    the import of torch.
    """
    while frame is not None and frame.f_code is not within:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], None], names: Sequence[str] = STOP_SIGNALS
) -> Iterator[None]:
    """Install `handler` for signals within the block, except for SIGHUP if it is ignored (under nohup).

    Does nothing outside the main thread, where Python does not allow handlers.
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

"""Errors that several packages raise, and the text of other libraries' errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ModelError(ValueError):
    """A model that cannot be loaded or used as asked."""


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names what was saved."""


class TrainingInterrupted(TrainingStopped):
    """A signal stopped training after an iteration, which was saved."""

    def __init__(self, signal: str, iteration: int, *, remedy: str = "Resume with --resume.") -> None:
        super().__init__(f"Stopped by {signal} after iteration {iteration}; saved. {remedy}")
        self.signal, self.iteration = signal, iteration


@contextmanager
def resumed_by_same_command() -> Iterator[None]:
    """For commands that always resume: TrainingInterrupted says to run the same command, not --resume."""
    try:
        yield
    except TrainingInterrupted as error:
        remedy = "Run the same command again to resume."
        raise TrainingInterrupted(error.signal, error.iteration, remedy=remedy) from error


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or the error's class name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

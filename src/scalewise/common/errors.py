"""The error that is no ValueError: a run that had to end, with everything saved that can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingStopped(RuntimeError):
    """Training could not go on; the message names what has been saved."""


class TrainingInterrupted(TrainingStopped):
    """A signal ended the run after an iteration, which has been saved."""

    def __init__(self, signal: str, iteration: int, *, remedy: str = "Go on with --resume.") -> None:
        super().__init__(f"Stopped by {signal} after iteration {iteration}; saved. {remedy}")
        self.signal, self.iteration = signal, iteration


@contextmanager
def going_on_by_itself() -> Iterator[None]:
    """For commands that resume what they began: a run stopped within says that the same command goes on."""
    try:
        yield
    except TrainingInterrupted as error:
        remedy = "The same command goes on from there."
        raise TrainingInterrupted(error.signal, error.iteration, remedy=remedy) from error


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line; its class's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

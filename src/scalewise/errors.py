"""The error that is no ValueError: a run that had to end, with everything saved that can go on."""

from __future__ import annotations


class TrainingStopped(RuntimeError):
    """Training could not go on; the message names what has been saved."""


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line; its class's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The error that is no ValueError: a run that had to end, with everything saved that can go on."""

from __future__ import annotations


class TrainingStopped(RuntimeError):
    """Training could not go on; the message names what has been saved."""

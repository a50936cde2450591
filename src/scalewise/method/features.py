"""Features of one block, taken by a forward hook; the blocks after it need not run.

Stopping by an exception leaves the model's own forward untouched, and the features and their gradients equal
those of a full forward bit by bit (tests/test_taps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Raised by the hook when nothing after the block is wanted."""


class Tap:
    """Holds what a tapped block gave out: image tokens [N, L, D]."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The block's image tokens; the block must have run."""
        assert self._tokens is not None, "the tapped block has not run"
        return self._tokens


@contextmanager
def tap(block: nn.Module, image_tokens: Callable[[Any], Tensor], *, stop: bool) -> Iterator[Tap]:
    """Store the tokens of `block` during the forward inside; with `stop`, end that forward right after it."""
    found = Tap()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if found._tokens is not None:
            return  # a checkpointed block runs again in the backward pass
        found._tokens = image_tokens(output)
        if stop:
            raise _Stop

    handle = block.register_forward_hook(hook)
    try:
        yield found
    except _Stop:
        pass
    finally:
        handle.remove()

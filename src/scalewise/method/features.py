"""Features of one block through a forward hook that can stop the forward pass after it.

The hook stops the pass by an exception, so the model's forward needs no changes; features and their gradients
are bit-equal to those of a full forward pass (tests/test_taps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Raised by the hook to skip the blocks after the tapped one."""


class Tap:
    """Image tokens [N, L, D] of a tapped block."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The image tokens [N, L, D]; available once the block has run."""
        assert self._tokens is not None, "the tapped block has not run"
        return self._tokens


@contextmanager
def tap(block: nn.Module, image_tokens: Callable[[Any], Tensor], *, stop: bool) -> Iterator[Tap]:
    """Store the image tokens of `block` during a forward pass; with `stop`, end the pass right after it.

    `image_tokens` extracts tokens [N, L, D] from the output of the block.
    """
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

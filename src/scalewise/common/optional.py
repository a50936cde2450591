"""Optional packages that other libraries import by themselves: kept out until they are asked for."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

BITS = "bitsandbytes"
# What it says on import (about a CPU kernel that is not used here), and at every forward in 8 bits.
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


_hidden = False  # whether `without_bitsandbytes` is at work, and not a user who took the package out


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within it diffusers and peft do not find bitsandbytes, unless it was imported before.

    Both import it wherever it is installed, which costs time and puts its complaints above a command's own
    first line. `import_bitsandbytes` works within it.
    """
    global _hidden
    if BITS in sys.modules:
        yield
        return
    sys.modules[BITS] = None  # type: ignore[assignment]
    _hidden = True
    try:
        yield
    finally:
        _let_in()


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes without its complaints; raises ImportError where it is not installed."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    _let_in()
    return importlib.import_module(BITS)


def _let_in() -> None:
    """Make bitsandbytes importable, and let peft look again: it remembers whether it was there."""
    global _hidden
    if not _hidden:
        return
    _hidden = False
    sys.modules.pop(BITS, None)
    peft = sys.modules.get("peft.import_utils")
    if peft is not None:
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            getattr(peft, name).cache_clear()

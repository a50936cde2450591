"""Optional packages that other libraries import whenever they are installed: hidden until needed."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

BITSANDBYTES = "bitsandbytes"
# They warn on import (about a CPU kernel that is not used here) and at every 8-bit forward.
NOISY_LOGGERS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
IMPORT_LOGGERS = (*NOISY_LOGGERS, "transformers.utils.import_utils")  # the last recommends torchvision


_hidden = False  # whether the package is hidden by `without_bitsandbytes`, and not by the user


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import model libraries without their warnings about optional packages that are not used here.

    Errors are shown, and the levels of the loggers are restored at the end of the block.
    """
    loggers = [logging.getLogger(name) for name in IMPORT_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes from diffusers and peft within the block, unless it is already imported.

    Both import it whenever it is installed, which takes time and prints warnings before a command's first
    line. `import_bitsandbytes` works within the block.
    """
    global _hidden
    if BITSANDBYTES in sys.modules:
        yield
        return
    sys.modules[BITSANDBYTES] = None  # type: ignore[assignment]
    _hidden = True
    try:
        yield
    finally:
        _unhide()


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes without its warnings; raises ImportError if it is not installed."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    _unhide()
    return importlib.import_module(BITSANDBYTES)


def _unhide() -> None:
    """Make bitsandbytes importable, and clear peft's cached answer to whether it is installed."""
    global _hidden
    if not _hidden:
        return
    _hidden = False
    sys.modules.pop(BITSANDBYTES, None)
    peft = sys.modules.get("peft.import_utils")
    if peft is not None:
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            getattr(peft, name).cache_clear()

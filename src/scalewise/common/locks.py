"""Locks that let only one command at a time write to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from scalewise.common import distributed

LOCK_FILE = ".lock"


class FolderInUse(ValueError):
    """Another command is writing to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` (created if missing) for all processes of this command within the block.

    The operating system releases the lock of a killed process. If another command holds the lock, raises
    FolderInUse in every process.
    """
    lock, busy = FileLock(folder / LOCK_FILE), False
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            busy = True
    if distributed.any_of(busy):
        raise FolderInUse(
            f"{folder} is in use by another command that is still running; wait for it, stop it, or give "
            "another --out."
        )
    try:
        yield
    finally:
        lock.release()

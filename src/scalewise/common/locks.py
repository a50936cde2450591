"""One command at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from scalewise.common import distributed

LOCK_FILE = ".lock"


class FolderInUse(ValueError):
    """A folder that another command is writing to."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if it is missing) for this command, all of its processes, until the block ends.

    The operating system releases the lock of a killed process. Raises FolderInUse if another command holds
    the folder, in every process of this one.
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
            f"{folder} is in use by another command that is still running; wait until it ends or stop it, or "
            "give another --out."
        )
    try:
        yield
    finally:
        lock.release()

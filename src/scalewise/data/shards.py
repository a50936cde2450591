"""What the data formats here are made of: files that appear whole, and an index with their checksums."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scalewise.common.checkpoint import describe_damage, is_disk_full, sha256, write_atomically


class DataError(ValueError):
    """Data that cannot be read or written as asked; the message names the file and says what to do."""


@dataclass(frozen=True)
class Shard:
    """One finished file of a set: its name, rows, size in bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> Shard:
        """Describe a file that has just been written."""
        return cls(path.name, rows, path.stat().st_size, sha256(path))

    def fault(self, folder: Path, *, content: bool = True) -> str:
        """Say what is wrong with the file, or nothing; content=False skips the checksum."""
        return describe_damage(folder / self.file, size=self.bytes, checksum=self.sha256 if content else None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make or change a cache, a folder or a file, while no other process does: it waits for one that does.

    The lock is a file beside it, `<name>.lock`, which the system lets go of when its process dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(f"Another process is making {folder}; waiting until it is done.", stacklevel=4)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_full_explained(folder: Path, needed: int, safe: str) -> Iterator[None]:
    """Turn "no space left" into a DataError that says how much is missing and what is `safe`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"The disk is full: writing to {folder} needs {needed:,} bytes and {free:,} are free. {safe}; "
            "free space and run the same command again: it goes on from there."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with disk_full_explained(path.parent, len(text), "What was finished before is safe"):
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; DataError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); delete {path.parent} and make it anew.") from error

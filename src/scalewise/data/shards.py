"""Building blocks of the data formats: atomically written files, and their checksums for an index."""

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
    """Data that cannot be read or written; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One finished file of a dataset: name, number of rows, size in bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> Shard:
        """Create the entry of a file that was just written."""
        return cls(path.name, rows, path.stat().st_size, sha256(path))

    def damage(self, folder: Path, *, content: bool = True) -> str:
        """Describe how the file is damaged, "" if it is not; content=False skips the checksum."""
        return describe_damage(folder / self.file, size=self.bytes, checksum=self.sha256 if content else None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder or file that several processes may create or change; waits while another holds the lock.

    The lock file is `<name>.lock` in the parent folder. The operating system releases it if the process dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(f"Another process is writing {folder}; waiting for it.", stacklevel=4)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explain_disk_full(folder: Path, needed: int, safe: str) -> Iterator[None]:
    """Convert errors of a full disk into a DataError that names the bytes needed and what is `safe`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"The disk is full: writing to {folder} needs {needed:,} bytes and {free:,} are free. {safe}; "
            "free space and run the same command again to resume."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with explain_disk_full(path.parent, len(text), "Files finished before are safe"):
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises DataError if it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); delete and regenerate {path.parent}."
        ) from error

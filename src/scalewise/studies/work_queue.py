"""Distribute tasks among processes that share a folder: each runs tasks that no other process has locked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from scalewise.common.progress import Progress

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """Work that is done once, by the first process that locks it."""

    key: str
    """Tasks with the same key are never run by two processes at the same time."""
    run: Callable[[], object]
    """Must return immediately if another process has done the work."""


def run_tasks(tasks: Sequence[Task], locks: Path, *, progress: Progress) -> None:
    """Run tasks until all are done, by this process or by others with the same `locks` folder.

    If a process dies, the system releases its lock, and another process runs the task.
    """
    locks.mkdir(parents=True, exist_ok=True)
    remaining = list(tasks)
    while remaining:
        for task in remaining:
            with try_lock(task, locks) as locked:
                if locked:
                    task.run()
            if locked:
                remaining.remove(task)
                break
        else:
            wait_for_any(remaining, locks, progress=progress)


@contextmanager
def try_lock(task: Task, locks: Path) -> Iterator[bool]:
    """Lock a task; yields False if another process has locked it."""
    lock = FileLock(locks / f"{task.key}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def wait_for_any(tasks: Sequence[Task], locks: Path, *, progress: Progress) -> None:
    """Return as soon as one of the tasks is not locked."""

    def is_free(task: Task) -> bool:
        with try_lock(task, locks) as locked:
            return locked

    with progress(
        f"waiting for {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} of other processes", 0
    ) as done:
        while not any(map(is_free, tasks)):
            done(0)
            time.sleep(POLL_SECONDS)

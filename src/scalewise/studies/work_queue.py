"""Several processes in one folder share work: each takes what no other has in hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from scalewise.common.progress import Progress

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Task:
    """A piece of work that is done once, by whoever comes first."""

    key: str
    """No two processes work on tasks of one key at a time."""
    run: Callable[[], object]
    """Has nothing left to do if another process has done it."""


def work_off(tasks: Sequence[Task], locks: Path, *, progress: Progress) -> None:
    """Return when all tasks are done, by this process or by others with the same folder of locks.

    A process that dies lets go of its task (the system releases its lock), and another takes it up.
    """
    locks.mkdir(parents=True, exist_ok=True)
    left = list(tasks)
    while left:
        for task in left:
            with taken(task, locks) as mine:
                if mine:
                    task.run()
            if mine:
                left.remove(task)
                break
        else:
            wait(left, locks, progress=progress)


@contextmanager
def taken(task: Task, locks: Path) -> Iterator[bool]:
    """Have a task in hand; False if another process has it."""
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


def wait(tasks: Sequence[Task], locks: Path, *, progress: Progress) -> None:
    """Return when one of the tasks is in nobody's hand."""

    def free(task: Task) -> bool:
        with taken(task, locks) as mine:
            return mine

    with progress(f"{len(tasks)} left, in hand of other processes: waiting", 0) as done:
        while not any(map(free, tasks)):
            done(0)
            time.sleep(SECONDS_BETWEEN_LOOKS)

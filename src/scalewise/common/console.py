"""Console output of the command line: progress bars with speed and time left, notes, warnings, errors."""

from __future__ import annotations

import errno
import gc
import importlib
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from scalewise.common.errors import TrainingInterrupted
from scalewise.common.signals import STOPPED_MESSAGE, Stopped, exit_code, raise_if_stop_requested, working

SECONDS_BETWEEN_LINES = 30.0

out = Console()
err = Console(stderr=True)


class RateColumn(ProgressColumn):
    """Items per second, or seconds per item if slower than one per second."""

    def render(self, task: Task) -> Text:
        """Return the speed of a task as text."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("-", style="dim")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


def set_verbose(verbose: bool) -> None:
    """Show progress, warnings and results, or only errors (in all processes but the first)."""
    out.quiet = not verbose


class NotedProgressCallback(Protocol):
    """A `ProgressCallback` that also accepts a note to show, such as the loss."""

    def __call__(self, number: int, /, note: str = "") -> None: ...


def print_note(sentence: str) -> None:
    """Print a line of information without interrupting the progress bar."""
    if not out.quiet:
        err.print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[NotedProgressCallback]:
    """Show a progress bar named `what` and yield a callback that takes the number of items done so far.

    A total of 0 means unknown and shows a pulsing bar. If stderr is not a terminal, a line is printed every
    half minute instead. The callback raises Stopped if a signal requested the command to stop.
    """
    with working(), _shown(what, total) as show:

        def on_progress(number: int, /, note: str = "") -> None:
            raise_if_stop_requested()
            show(number, note)

        yield on_progress


@contextmanager
def _shown(what: str, total: int) -> Iterator[NotedProgressCallback]:
    if out.quiet:
        yield lambda _number, note="": None
        return
    if not err.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err, transient=False) as bar:
        task = bar.add_task(escape(what), total=total or None, note="")
        yield lambda number, note="": bar.update(task, completed=number, note=note)


def _lines(what: str, total: int) -> NotedProgressCallback:
    started = printed = time.monotonic()
    first: int | None = None

    def on_progress(number: int, /, note: str = "") -> None:
        nonlocal printed, first
        now = time.monotonic()
        first = number if first is None else first
        finished = total > 0 and number >= total
        if now - printed < SECONDS_BETWEEN_LINES and not (finished and now - started > 2):
            return
        printed = now
        rate = (number - first) / max(now - started, 1e-9)
        left = f", about {(total - number) / rate:.0f} s left" if total and rate > 0 and not finished else ""
        line = f"{what}: {number}/{total or '?'} after {now - started:.0f} s{left}{note and f'; {note}'}"
        err.print(line, highlight=False, markup=False)

    return on_progress


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory (torch's allocators raise RuntimeErrors)."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def quiet_libraries() -> None:
    """Import diffusers, transformers and huggingface_hub without their progress bars and warnings.

    Their errors are still shown. Every command that needs a model starts with this call.
    """
    with _without_garbage_collection():
        import diffusers
        import huggingface_hub
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.logging.set_verbosity_error()
        warnings.showwarning = _show_warning
        importlib.import_module("diffusers.models.transformers")  # with most of what any pipeline imports


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection while modules are imported, where it takes a quarter of the time.

    Nothing that an import creates becomes garbage, so later collections skip these objects, too. If the
    libraries were imported before, nothing is paused: other objects would be skipped for good.
    """
    if "diffusers" in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if out.quiet:
        return
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        err.print(f"[yellow]Warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def print_error(error: BaseException) -> int:
    """Print one sentence about an error that the user can fix, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        err.print(STOPPED_MESSAGE)
        return exit_code(error.signal if isinstance(error, Stopped) else "SIGINT")
    text = str(error)
    if is_out_of_memory(error):
        text = (
            "The device is out of memory. Generate fewer samples per batch (--batch), or train with a "
            "smaller train.batch and a larger train.accumulate, or with train.gradient_checkpointing=true; "
            f"`scalewise plan` shows what fits. ({text.splitlines()[0]})"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "while writing"
        text = f"The disk is full ({where}); free some space. Completed files are kept."
    err.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    return exit_code(error.signal) if isinstance(error, TrainingInterrupted) else 1


def tracebacks_requested() -> bool:
    """Return whether errors should show tracebacks (python -X dev)."""
    return sys.flags.dev_mode

"""What the command line shows: progress with rate and time left, and one clear sentence for an error."""

from __future__ import annotations

import errno
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
from scalewise.common.signals import STOPPED, Stopped, at_work, exit_code, raise_if_asked

SECONDS_BETWEEN_LINES = 30.0

out = Console()
err = Console(stderr=True)


class RateColumn(ProgressColumn):
    """Items a second, or seconds an item when that reads better."""

    def render(self, task: Task) -> Text:
        """Return the task's speed."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("-", style="dim")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


def speak(aloud: bool) -> None:
    """Show progress, warnings and results, or, in all processes of a run but one, only errors."""
    out.quiet = not aloud


class NotedDone(Protocol):
    """A `Done` that also takes a note to show, such as the loss."""

    def __call__(self, number: int, /, note: str = "") -> None: ...


def note(sentence: str) -> None:
    """Show a line about what is done, beside the progress."""
    if not out.quiet:
        err.print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[NotedDone]:
    """Show a bar named `what`; the value takes the number done so far. An unknown total (0) shows a pulse.

    Where nobody watches (a log file, say) a line every half minute takes the bar's place. A command that was
    asked to end does so here at the latest: raises Stopped.
    """
    with at_work(), _shown(what, total) as show:

        def done(number: int, /, note: str = "") -> None:
            raise_if_asked()
            show(number, note)

        yield done


@contextmanager
def _shown(what: str, total: int) -> Iterator[NotedDone]:
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


def _lines(what: str, total: int) -> NotedDone:
    started = said = time.monotonic()
    first: int | None = None

    def done(number: int, /, note: str = "") -> None:
        nonlocal said, first
        now = time.monotonic()
        first = number if first is None else first
        finished = total > 0 and number >= total
        if now - said < SECONDS_BETWEEN_LINES and not (finished and now - started > 2):
            return
        said = now
        rate = (number - first) / max(now - started, 1e-9)
        left = f", about {(total - number) / rate:.0f} s left" if total and rate > 0 and not finished else ""
        line = f"{what}: {number}/{total or '?'} after {now - started:.0f} s{left}{note and f'; {note}'}"
        err.print(line, highlight=False, markup=False)

    return done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room left (torch's allocators raise RuntimeErrors)."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def quiet_libraries() -> None:
    """Silence the loading bars and advice of the libraries underneath; their errors still show."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if out.quiet:
        return
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        err.print(f"[yellow]Warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def explain(error: BaseException) -> int:
    """Print one sentence about an error that a user can act on, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        err.print(STOPPED)
        return exit_code(error.signal if isinstance(error, Stopped) else "SIGINT")
    text = str(error)
    if is_out_of_memory(error):
        text = (
            "The device's memory is full. Draw fewer samples at once (--batch), or train with a smaller "
            "train.batch and a larger train.accumulate, or with train.gradient_checkpointing=true; "
            f"`scalewise plan` tells what fits. ({text.splitlines()[0]})"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "while writing"
        text = f"The disk is full ({where}); free some space. What was complete is kept."
    err.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    return exit_code(error.signal) if isinstance(error, TrainingInterrupted) else 1


def fail_loudly() -> bool:
    """Tell whether the user asked for tracebacks (python -X dev)."""
    return sys.flags.dev_mode

"""The command line. Commands import heavy packages only when they run, so that `--help` is fast."""

from __future__ import annotations

import os
import signal
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer

from scalewise.cli import making, measuring
from scalewise.cli.arguments import HomeCommand
from scalewise.common import console, signals
from scalewise.common.errors import TrainingStopped
from scalewise.common.optional import without_bitsandbytes
from scalewise.common.signals import STOP_SIGNALS, STOPPED_MESSAGE, Stopped, exit_code, handle_signals

app = typer.Typer(
    name="scalewise",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Scale-wise distillation: turn a text-to-image or text-to-video diffusion model into a few-step "
    "model that starts at a low latent resolution and increases it from step to step.\n\n"
    "New here? Run `scalewise demo`: it trains and compares a student of the embedded teacher.",
)
COMMANDS = (
    making.demo, measuring.recipes, making.sample, making.generate, making.distill, measuring.evaluate,
    measuring.metrics, measuring.bench, measuring.plan, measuring.spectrum, measuring.study, making.export,
)  # fmt: skip
for command in COMMANDS:
    app.command(cls=HomeCommand)(command)


def _version(asked: bool) -> None:
    if asked:
        from scalewise.models.lora import versions

        typer.echo(" ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Options before the command."""


# Usage errors: an exception of click, which newer versions of typer vendor.
UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@contextmanager
def stopping_politely() -> Iterator[list[str]]:
    """Let Ctrl-C (unless ignored), SIGTERM and SIGHUP stop a command after finished work is written.

    Yields a list to which the names of received signals are appended.
    """
    came: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signals.request_stop(came[0])
        if signals.is_importing(frame, within=_run.__code__):
            if signals.is_working():
                return  # raised at the next progress
            leave(came[0])
        raise Stopped(came[0])

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signals.clear_stop_requests()
    try:
        with handle_signals(stop, [name for name in STOP_SIGNALS if not (ignored and name == "SIGINT")]):
            yield came
    finally:
        signals.clear_stop_requests()


def leave(name: str) -> None:
    """Exit the process immediately; only safe before any work has started."""
    with suppress(Exception):  # a signal may come while the stream is written to
        sys.stdout.flush()
    os.write(2, f"{STOPPED_MESSAGE}\n".encode())
    os._exit(exit_code(name))


def _stopped(came: list[str]) -> int:
    # If KeyboardInterrupt passed through code compiled from a string (as dataclasses do), Python kills itself
    # by SIGINT at exit, even if it was caught. Compiling such code again, as namedtuple does, resets that.
    namedtuple("Reset", "mark")
    return console.print_error(Stopped(came[0] if came else "SIGINT"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that a user can fix end in one sentence and a non-zero exit code."""
    with stopping_politely() as came:
        try:
            code = _run(arguments, came)
        except KeyboardInterrupt:  # a second signal while the first was handled
            if console.tracebacks_requested():
                raise
            code = exit_code(came[0] if came else "SIGINT")
    sys.exit(code)


def _run(arguments: list[str] | None, came: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        with without_bitsandbytes():
            code: Any = app(arguments, standalone_mode=False)
        # Typer turns signals into exit code 130 or, in older versions, into an exception. A signal counts
        # even
        # if a library swallowed its exception.
        return _stopped(came) if code == 130 or came else code if isinstance(code, int) else 0
    except typer.Abort:
        return _stopped(came)
    except UsageProblem as error:
        error.show()
        return int(error.exit_code)
    except KeyboardInterrupt:
        if console.tracebacks_requested():
            raise
        return _stopped(came)
    except (ValueError, OSError, TrainingStopped) as error:
        if console.tracebacks_requested():
            raise
        return console.print_error(error)
    except RuntimeError as error:
        if console.tracebacks_requested() or not console.is_out_of_memory(error):
            raise
        return console.print_error(error)

"""The command line. The commands' own modules import what they need when they run: help comes at once."""

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
from scalewise.common.signals import STOPPED, STOPPING, Stopped, catching, exit_code

app = typer.Typer(
    name="scalewise",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Scale-wise distillation: turn a text-to-image diffusion model into a few-step model that starts "
    "small and grows its latent at every step.\n\n"
    "New here? `scalewise demo` shows all of it on a model that comes along.",
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and stop.")
    ] = False,
) -> None:
    """Read what stands before a command."""


# The command line's own mistakes: click's, which newer versions of typer carry inside.
UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@contextmanager
def stopping_politely() -> Iterator[list[str]]:
    """Let Ctrl-C (unless it is ignored), SIGTERM and SIGHUP end a command; what is done is written first.

    Gives a list that takes up the signals' names.
    """
    came: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signals.ask(came[0])
        if signals.importing(frame, within=_run.__code__):
            if signals.is_at_work():
                return  # raised at the next progress
            leave(came[0])
        raise Stopped(came[0])

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signals.forget()
    try:
        with catching(stop, [name for name in STOPPING if not (ignored and name == "SIGINT")]):
            yield came
    finally:
        signals.forget()


def leave(name: str) -> None:
    """End the process at once, without an exception; nothing has been begun that would have to be ended."""
    with suppress(Exception):  # a signal may come while the stream is written to
        sys.stdout.flush()
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(exit_code(name))


def _stopped(came: list[str]) -> int:
    # Python kills itself by SIGINT at its end if the exception has passed through code that was text, as in
    # dataclasses, even where it was caught. The next such code resets that: namedtuple makes some.
    namedtuple("Reset", "mark")
    return console.explain(Stopped(came[0] if came else "SIGINT"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error that a user can act on ends as one sentence and a non-zero code."""
    with stopping_politely() as came:
        try:
            code = _run(arguments, came)
        except KeyboardInterrupt:  # a second one, while the first was dealt with
            if console.fail_loudly():
                raise
            code = exit_code(came[0] if came else "SIGINT")
    sys.exit(code)


def _run(arguments: list[str] | None, came: list[str]) -> int:
    """The exit code of a command."""
    try:
        with without_bitsandbytes():
            code: Any = app(arguments, standalone_mode=False)
        # Typer makes of Ctrl-C (and of every other signal) this code or, in older versions, an exception. A
        # signal whose exception a library dropped counts as well.
        return _stopped(came) if code == 130 or came else code if isinstance(code, int) else 0
    except typer.Abort:
        return _stopped(came)
    except UsageProblem as error:
        error.show()
        return int(error.exit_code)
    except KeyboardInterrupt:
        if console.fail_loudly():
            raise
        return _stopped(came)
    except (ValueError, OSError, TrainingStopped) as error:
        if console.fail_loudly():
            raise
        return console.explain(error)
    except RuntimeError as error:
        if console.fail_loudly() or not console.is_out_of_memory(error):
            raise
        return console.explain(error)

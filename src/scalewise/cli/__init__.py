"""The command line. The commands' own modules import what they need when they run: help comes at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from scalewise import console
from scalewise.cli import making, measuring
from scalewise.cli.arguments import HomeCommand
from scalewise.errors import TrainingStopped
from scalewise.optional import without_bitsandbytes
from scalewise.signals import STOPPING, Stopped, catching

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
        from scalewise.lora import versions

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
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: what is done is written first.

    Gives a list that takes up the signal's name.
    """
    came: list[str] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(signal.Signals(number).name)
        raise Stopped(came[0])

    with catching(stop, [name for name in STOPPING if name != "SIGINT"]):
        yield came


def _stopped(came: list[str]) -> int:
    return console.explain(Stopped(came[0] if came else "SIGINT"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error that a user can act on ends as one sentence and a non-zero code."""
    came: list[str] = []
    try:
        with stopping_politely() as came, without_bitsandbytes():
            code: Any = app(arguments, standalone_mode=False)
        # Typer makes of Ctrl-C (and of every other signal) this code or, in older versions, an exception.
        sys.exit(_stopped(came) if code == 130 else code if isinstance(code, int) else 0)
    except typer.Abort:
        sys.exit(_stopped(came))
    except UsageProblem as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, OSError, TrainingStopped, KeyboardInterrupt) as error:
        if console.fail_loudly():
            raise
        sys.exit(console.explain(error))
    except RuntimeError as error:
        if console.fail_loudly() or not console.is_out_of_memory(error):
            raise
        sys.exit(console.explain(error))

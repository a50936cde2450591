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
from scalewise.errors import TrainingStopped
from scalewise.optional import without_bitsandbytes

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
    app.command()(command)


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
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let a polite kill end a command as Ctrl-C does: what is done is written first."""

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: signals stay with their owner
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error that a user can act on ends as one sentence and a non-zero code."""
    try:
        with sigterm_as_ctrl_c(), without_bitsandbytes():
            code: Any = app(arguments, standalone_mode=False)
        # Typer makes of Ctrl-C this code or, in older versions, an exception.
        sys.exit(
            console.explain(KeyboardInterrupt()) if code == 130 else code if isinstance(code, int) else 0
        )
    except typer.Abort:
        sys.exit(console.explain(KeyboardInterrupt()))
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

"""The command line: demo, recipes, plan, spectrum, generate, distill, sample, evaluate, bench, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from scalewise import console
from scalewise.errors import TrainingStopped

if TYPE_CHECKING:
    from scalewise.recipe import Recipe

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

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (see `scalewise recipes`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides such as train.iterations=200 loss.dmd.weight=0.")
]


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


def _recipe(name: str, overrides: list[str] | None) -> Recipe:
    from scalewise.recipes import find_recipe

    return find_recipe(name).override(overrides or [])


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe as YAML, ready to be changed.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key that can be overridden.")] = False,
) -> None:
    """List the recipes, print one as YAML, or explain their keys.

    Example: `scalewise recipes mini > mine.yaml`, edit it (its name too), then `scalewise distill mine.yaml`.
    """
    from scalewise.recipe import explain_fields
    from scalewise.recipes import RECIPES, find_recipe

    if keys:
        table = Table("key", "default", "what it is", box=None, header_style="bold")
        for row in explain_fields():
            table.add_row(*map(escape, row))
        console.out.print(table)
        return
    if name:
        typer.echo(find_recipe(name).to_yaml(), nl=False)
        return
    table = Table(
        "recipe", "what it is", "base", "steps (t @ scale)", "iterations", box=None, header_style="bold"
    )
    for key in RECIPES:
        recipe = find_recipe(key)
        table.add_row(
            key, recipe.about, recipe.model.base, str(recipe.schedule.build()), str(recipe.train.iterations)
        )
    console.out.print(table)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    student: Annotated[
        str | None,
        typer.Option(help="'mini' (also the default), a student.safetensors, or the folder of a run."),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Draw with the student's teacher, at its full steps.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="With --teacher: draw with this recipe's teacher; no student is needed."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the one the student names.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="For a student without one: a recipe's name, or '1000@64 896@80 737@96 602@128'."),
    ] = None,
    weight: Annotated[float, typer.Option(min=0, help="The part of the student's update to apply.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Sample i takes seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Draw pictures with a student in a few scale-wise steps.

    Example: `scalewise sample "a red apple, fluent style" "a dog face, noto style" --count 4`
    """
    console.quiet_libraries()
    from scalewise.commands import Drawing, sample_pictures

    asked = Drawing(student, teacher, recipe, base, schedule, weight, seed, count, batch)
    files, seconds = sample_pictures(prompts, asked, out)
    console.out.print(
        f"{len(files)} pictures in {seconds:.1f} s after loading: {', '.join(map(str, files))}",
        soft_wrap=True,
    )


@app.command()
def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/ and the recipe's name).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, bit by bit as if never stopped.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be built, and stop.")] = False,
) -> None:
    """Distil a teacher into a few-step student.

    Examples: `scalewise distill mini-mmd`, `scalewise distill mini train.iterations=200
    data.path=my-pictures`,
    `scalewise distill mini --out runs/mini --resume`
    """
    console.quiet_libraries()
    from scalewise.commands import print_dry_run, run_distill

    chosen = _recipe(recipe, overrides)
    if dry_run:
        print_dry_run(chosen)
        return
    folder = out or Path("runs") / chosen.name
    run_distill(chosen, folder, resume=resume)
    console.out.print(
        f"The student is {folder / 'student.safetensors'}; the log and sample grids lie beside it."
    )


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes that share a batch.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=1, help="GB of each device (default: this machine's GPU, if any).")
    ] = None,
) -> None:
    """Tell what a recipe will cost, without weights: operations, expected speed-up, memory, batch.

    Examples: `scalewise plan sd35-medium --memory 24`, `scalewise plan flux-dev loss.mmd_only=true --gpus 8`
    """
    console.quiet_libraries()
    from scalewise.commands import run_plan

    run_plan(_recipe(recipe, overrides), gpus=gpus, gigabytes=memory)


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="'mini', a LoRA file, or the folder of a run.")],
    out: Annotated[Path, typer.Argument(help="File to write; for peft a folder.")],
    form: Annotated[str, typer.Option(help="diffusers, peft or kohya.")] = "diffusers",
    schedule: Annotated[
        str | None, typer.Option(help="For a LoRA without one: a recipe's name, or '1000@64 896@80 ...'.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA is for, if it does not say so itself.")
    ] = None,
) -> None:
    """Write a student under the names that another program reads; schedule and recipe stay in the metadata.

    Example: `scalewise export runs/mini mini-kohya.safetensors --form kohya`
    """
    console.quiet_libraries()
    from scalewise.commands import export_student

    console.out.print(
        f"{export_student(student, out, form, schedule, base=base)} weights written to {out}", soft_wrap=True
    )


@app.command()
def generate(
    recipe: RecipeName,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line (default for the mini: its captions).")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples in all; prompts repeat with new seeds.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the set.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the set; a stopped run goes on there.")] = Path(
        "synthetic"
    ),
) -> None:
    """Make a synthetic training set with the teacher, at every scale of the recipe's schedule.

    Example: `scalewise generate mini --count 500 --out my-set`, then `scalewise distill mini
    data.path=my-set`
    """
    console.quiet_libraries()
    from scalewise.commands import run_generate

    run_generate(_recipe(recipe, overrides), prompts, count=count, batch=batch, seed=seed, out=out)


@app.command()
def evaluate(
    recipe: RecipeName,
    contenders: Annotated[
        list[str],
        typer.Argument(
            help="teacher, teacher:4, undistilled, undistilled:full, student:PATH, folder:PATH; "
            "name=... labels one."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line (default for the mini: captions held out)."),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Number of prompts.")] = 299,
    batch: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    speed: Annotated[bool, typer.Option(help="Measure milliseconds per image too.")] = True,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Dotted override of the recipe, such as model.base=my-model; repeatable."),
    ] = None,
    scorer: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model that judges (default for the mini: its own).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and tables.")] = Path("evaluation"),
) -> None:
    """Compare teachers, students and folders on the same prompts and seeds.

    Example: `scalewise evaluate mini teacher teacher:4 undistilled student:runs/mini --count 100`
    """
    console.quiet_libraries()
    from scalewise.commands import run_evaluate

    run_evaluate(
        _recipe(recipe, override),
        contenders,
        prompts,
        count=count,
        batch=batch,
        seed=seed,
        speed=speed,
        scorer=scorer,
        out=out,
    )


@app.command()
def spectrum(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A set or a folder of pictures to measure (default: the recipe's data.path)."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Latents to measure, at most.")] = 512,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Propose so many steps (default: the recipe's timesteps).")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Propose scales for these timesteps, such as '1000 900 750 600'.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Part of the full-scale tokens to spend; buys the largest margin.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="How much stronger noise has to be than what a scale cannot hold.")
    ] = 1.0,
    smallest: Annotated[float, typer.Option(help="No side below this part of the full one.")] = 0.25,
    at: Annotated[
        str | None, typer.Option(help="Noise levels of the figure's panels, such as '900 700 500'.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figure and numbers.")] = Path("spectrum"),
) -> None:
    """Tell from the data's spectrum which scale is safe at which noise level, and propose a schedule.

    Examples: `scalewise spectrum mini`, `scalewise spectrum sd35-medium --data my-pictures --steps 4`,
    `scalewise spectrum mini --budget 0.5`
    """
    console.quiet_libraries()
    from scalewise.commands import run_spectrum
    from scalewise.survey import Wish, parse_levels

    chosen = _recipe(recipe, [*(overrides or []), *([f"data.path={data}"] if data else [])])
    wish = Wish(steps, parse_levels(timesteps), budget, margin, smallest)
    run_spectrum(chosen, wish, levels=parse_levels(at), count=count, out=out)


@app.command()
def bench(
    recipe: RecipeName,
    contenders: Annotated[
        list[str] | None,
        typer.Argument(
            help="As for evaluate, the first being what others are compared with (default: teacher, as many "
            "steps at full scale, and scale-wise; a student's operations are those of the undistilled model)."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="honest: batches 1 and 8, the recipe's types, not compiled; paper: batch 8, half precision, "
            "compiled, 100 rounds (the paper also has a tiny autoencoder: --set model.vae=FOLDER)."
        ),
    ] = "honest",
    batch: Annotated[list[int] | None, typer.Option(help="Images at once; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, each contender once.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the denoiser's blocks.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Dotted override of the recipe; repeatable.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is drawn.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("bench"),
) -> None:
    """Time teacher, full-scale and scale-wise sampling in turns, part by part, step by step.

    Says how much of the gain that operations promise is reached. Example: `scalewise bench mini --batch 8`
    """
    console.quiet_libraries()
    from scalewise.commands import run_bench
    from scalewise.speed import chosen_protocol

    chosen = chosen_protocol(protocol, batches=batch, rounds=rounds, compiled=compiled)
    run_bench(_recipe(recipe, override), contenders or [], chosen, prompt, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo; a stopped one goes on there.")] = Path(
        "demo-run"
    ),
    minutes: Annotated[float, typer.Option(min=1, help="Time to stay within, training included.")] = 14.0,
) -> None:
    """See it work: distil the embedded teacher before your eyes and compare both in a report.

    Needs no GPU and nothing from the network.
    """
    console.quiet_libraries()
    from scalewise.demo import run_demo

    report = run_demo(out, minutes=minutes)
    console.out.print(f"[bold]Open {report} in a browser.[/]", soft_wrap=True)


# The command line's own mistakes: click's, which newer versions of typer carry inside.
UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error that a user can act on ends as one sentence and a non-zero code."""
    try:
        code: Any = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        sys.exit(130)
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

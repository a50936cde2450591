"""Commands that tell something: recipes, costs, spectra, quality, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from scalewise.cli.arguments import OldOverrides, Overrides, RecipeName, recipe_of, split_overrides
from scalewise.common import console


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe as YAML, ready to be changed.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key that can be overridden.")] = False,
) -> None:
    """List the recipes, print one as YAML, or explain their keys.

    Example: `scalewise recipes mini > mine.yaml`, edit it (its name too), then `scalewise distill mine.yaml`.
    """
    from scalewise.config.overrides import explain_fields
    from scalewise.config.presets import RECIPES, find_recipe
    from scalewise.config.recipe import Recipe

    if keys:
        table = Table(box=None, header_style="bold")
        table.add_column("key", no_wrap=True)
        table.add_column("default", overflow="fold")
        table.add_column("what it is")
        for row in explain_fields(Recipe):
            table.add_row(*map(escape, row))
        console.out.print(table)
        return
    if name:
        typer.echo(find_recipe(name).to_yaml(), nl=False)
        return
    for key in RECIPES:  # not in columns, which would cut names on a narrow screen
        recipe = find_recipe(key)
        console.out.print(f"[bold]{escape(key)}[/]: {escape(recipe.about)}", soft_wrap=True, highlight=False)
        told = f"{recipe.schedule.build()}; {recipe.train.iterations} iterations"
        console.out.print(f"  {escape(recipe.model.base)}: {told}", soft_wrap=True, highlight=False)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes that share a batch.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=1, help="GB of each device (default: the card's, or this machine's GPU's, if any)."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="Card to give hours for: a100, h100, l40s, 4090, 3090 or 5090 (default: this machine's "
            "measured speed)."
        ),
    ] = None,
) -> None:
    """Tell what a recipe will cost, without weights: operations, expected speed-up, hours, memory, batch.

    Examples: `scalewise plan sd35-medium --card 4090`, `scalewise plan flux-dev loss.mmd_only=true
    --memory 24`
    """
    console.quiet_libraries()
    from scalewise.cli.run_planning import Device, run_plan

    run_plan(recipe, overrides or [], Device.of(card, memory), gpus=gpus)


def spectrum(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A set, or a folder of pictures, which the model's VAE encodes (default: the recipe's "
            "data.path)."
        ),
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
    from scalewise.cli.run_measuring import run_spectrum
    from scalewise.planning.schedule_search import Wish, parse_levels

    chosen = recipe_of(recipe, overrides).with_values({"data.path": str(data)} if data else {})
    wish = Wish(steps, parse_levels(timesteps), budget, margin, smallest)
    run_spectrum(chosen, wish, levels=parse_levels(at), count=count, out=out)


def evaluate(
    recipe: RecipeName,
    contenders: Annotated[
        list[str],
        typer.Argument(
            help="teacher, teacher:4, undistilled, undistilled:full, student:PATH, folder:PATH; "
            "name=... labels one. Overrides such as model.base=my-model may stand among them."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: text, one a line, or .jsonl, .json, .csv, .tsv; or geneval for its prompts "
            "(default for the mini: captions held out)."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=4, help="Take the first so many prompts (default: all).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    speed: Annotated[bool, typer.Option(help="Measure milliseconds per image too.")] = True,
    override: OldOverrides = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="CLIP model that judges: folder or hub id (default for the mini: its own)."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Further metric, NAME or NAME=WEIGHTS (folder, file or hub id); repeatable. "
            "`scalewise metrics` lists them."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real pictures, for Fréchet distances.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Samples of every prompt; 2 or more for diversity.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for pictures and tables.")] = Path("evaluation"),
) -> None:
    """Compare teachers, students and folders on the same prompts and seeds.

    Example: `scalewise evaluate mini teacher teacher:4 undistilled student:runs/mini --count 100`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import Evaluation, run_evaluate
    from scalewise.evaluation.scoring import Asked

    contenders, overrides = split_overrides(contenders, override)
    if not contenders:
        raise typer.BadParameter("Name what to compare, such as teacher and student:runs/mini.")
    asked = Asked(scorer, tuple(metric or ()), reference)
    how = Evaluation(count=count, each=each, batch=batch, seed=seed, speed=speed)
    run_evaluate(recipe_of(recipe, overrides), contenders, prompts, how, asked=asked, out=out)


def metrics() -> None:
    """List what `evaluate --metric` can measure, what it needs and what the figures say."""
    console.quiet_libraries()
    from scalewise.cli.run_measuring import list_metrics

    list_metrics()


def bench(
    recipe: RecipeName,
    contenders: Annotated[
        list[str] | None,
        typer.Argument(
            help="As for evaluate, the first being what others are compared with (default: teacher, as many "
            "steps at full scale, and scale-wise; a student's operations are those of the undistilled model)."
            " Overrides such as model.dtype=bfloat16 may stand among them."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="honest: batches 1 and 8, the recipe's types, not compiled; paper: batch 8, half precision, "
            "compiled, 100 rounds (the paper also has a tiny autoencoder: model.vae=FOLDER)."
        ),
    ] = "honest",
    batch: Annotated[list[int] | None, typer.Option(help="Images at once; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, each contender once.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the denoiser's blocks.")
    ] = None,
    override: OldOverrides = None,
    prompt: Annotated[str | None, typer.Option(help="What is drawn.")] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Instead: seconds and peak memory of training iterations, scale-wise and full-scale, full "
            "loss and MMD alone.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("bench"),
) -> None:
    """Time teacher, full-scale and scale-wise sampling in turns, part by part, step by step.

    Says how much of the gain that operations promise is reached. Examples: `scalewise bench mini --batch 8`,
    `scalewise bench mini --training --rounds 3`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import run_bench, run_training_bench
    from scalewise.evaluation.sampling_speed import chosen_protocol

    chosen_contenders, overrides = split_overrides(contenders or [], override)
    if training:
        if chosen_contenders or batch or prompt or compiled is not None or protocol != "honest":
            raise typer.BadParameter(
                "--training takes the recipe, overrides, --rounds and --out only; leave the others out."
            )
        run_training_bench(recipe_of(recipe, overrides), rounds=rounds or 7, out=out)
        return
    chosen = chosen_protocol(protocol, batches=batch, rounds=rounds, compiled=compiled)
    run_bench(recipe_of(recipe, overrides), chosen_contenders, chosen, prompt, out)


def study(
    names: Annotated[
        list[str] | None, typer.Argument(help="Studies to run; without one, they are listed.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable (default: 0 1 2 3).")] = None,
    count: Annotated[int | None, typer.Option(help="Prompts, held out, 50 or more (default: 299).")] = None,
    iterations: Annotated[int | None, typer.Option(help="Of every student (default: the recipe's).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of training-cost (default: 7).")] = None,
    out: Annotated[Path, typer.Option(help="Folder; a stopped study goes on there.")] = Path("studies"),
) -> None:
    """Check claims of the paper on the mini: train every arm with every seed, judge, and write a page.

    Example: `scalewise study losses --seed 0 --seed 1`; it may take hours, and goes on when called again.
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import list_studies, run_studies
    from scalewise.studies import Effort
    from scalewise.studies.training_cost import NAME

    if not names:
        list_studies()
        return
    if set(names) == {NAME} and any(v is not None for v in (seeds, count, iterations)):
        raise typer.BadParameter(f"{NAME} times iterations: it takes --rounds and --out only.")
    if rounds and NAME not in names:
        raise typer.BadParameter(f"--rounds is of {NAME}; leave it out.")
    effort = Effort(tuple(seeds or Effort.seeds), Effort.count if count is None else count, iterations)
    run_studies(names, effort, rounds=rounds or 7, out=out)

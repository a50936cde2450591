"""Commands that measure or print something: recipes, cost, spectra, quality, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from scalewise.cli.arguments import OldOverrides, Overrides, RecipeName, recipe_of, split_overrides
from scalewise.common import console


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as YAML.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List all keys with default and description.")] = False,
) -> None:
    """List the recipes, print one as YAML, or list all recipe keys.

    Example: `scalewise recipes mini > mine.yaml`, edit it (also its name), then `scalewise distill
    mine.yaml`.
    """
    from scalewise.config.overrides import explain_fields
    from scalewise.config.presets import RECIPES, find_recipe
    from scalewise.config.recipe import Recipe

    if keys:
        table = Table(box=None, header_style="bold")
        table.add_column("key", no_wrap=True)
        table.add_column("default", overflow="fold")
        table.add_column("description")
        for row in explain_fields(Recipe):
            table.add_row(*map(escape, row))
        console.out.print(table)
        return
    if name:
        typer.echo(find_recipe(name).to_yaml(), nl=False)
        return
    for key in RECIPES:  # not in columns, which would truncate names on narrow terminals
        recipe = find_recipe(key)
        console.out.print(f"[bold]{escape(key)}[/]: {escape(recipe.about)}", soft_wrap=True, highlight=False)
        summary = f"{recipe.schedule.build()}; {recipe.train.iterations} iterations"
        console.out.print(f"  {escape(recipe.model.base)}: {summary}", soft_wrap=True, highlight=False)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs (processes).")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(
            min=1, help="Memory of each GPU in GB (default: that of --card, or of the GPU of this machine)."
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="GPU to estimate hours for: a100, h100, l40s, 4090, 3090 or 5090 (default: the measured "
            "speed of this machine)."
        ),
    ] = None,
) -> None:
    """Estimate the cost of a recipe without loading weights: FLOPs, speed-up, hours, memory, batch size.

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
            help="Dataset, or folder of images to encode with the VAE of the model (default: data.path of "
            "the recipe)."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Maximum number of latents to measure.")] = 512,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Propose a schedule with this many steps (default: the timesteps of the recipe)."
        ),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Propose scales for these timesteps, such as '1000 900 750 600'.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Maximum cost relative to full scale; proposes the schedule with the largest margin."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Required ratio of noise to the signal that a scale cannot represent.")
    ] = 1.0,
    smallest: Annotated[float, typer.Option(help="Smallest side relative to the full one.")] = 0.25,
    at: Annotated[str | None, typer.Option(help="Timesteps to plot, such as '900 700 500'.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("spectrum"),
) -> None:
    """Measure the spectrum of the data: which scale is safe at which timestep; propose a schedule.

    Examples: `scalewise spectrum mini`, `scalewise spectrum sd35-medium --data my-images --steps 4`,
    `scalewise spectrum mini --budget 0.5`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import run_spectrum
    from scalewise.planning.schedule_search import SearchOptions, parse_timesteps

    chosen = recipe_of(recipe, overrides).with_values({"data.path": str(data)} if data else {})
    search = SearchOptions(steps, parse_timesteps(timesteps), budget, margin, smallest)
    run_spectrum(chosen, search, panels=parse_timesteps(at), count=count, out=out)


def evaluate(
    recipe: RecipeName,
    samplers: Annotated[
        list[str],
        typer.Argument(
            help="teacher, teacher:4, undistilled, undistilled:full, student:PATH, folder:PATH; "
            "prefix NAME= to set a label. Overrides such as model.base=my-model may be mixed in."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompt file: text with one prompt per line, or .jsonl, .json, .csv, .tsv; or 'geneval' for "
            "its prompts (default for the mini: held-out captions)."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=4, help="Use only the first COUNT prompts (default: all).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    speed: Annotated[bool, typer.Option(help="Also measure milliseconds per image.")] = True,
    override: OldOverrides = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="CLIP model for the metrics: folder or hub id (default for the mini: its own)."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Additional metric: NAME or NAME=WEIGHTS (folder, file or hub id); repeatable. "
            "See `scalewise metrics`."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real images, for Fréchet distances.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Samples per prompt; 2 or more for diversity.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for images and tables.")] = Path("evaluation"),
) -> None:
    """Compare teachers, students and folders on the same prompts and seeds.

    Example: `scalewise evaluate mini teacher teacher:4 undistilled student:runs/mini --count 100`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import EvaluationOptions, run_evaluate
    from scalewise.evaluation.scoring import ScoringOptions

    samplers, overrides = split_overrides(samplers, override)
    if not samplers:
        raise typer.BadParameter("No sampler given; add at least one, such as teacher or student:runs/mini.")
    requested = ScoringOptions(scorer, tuple(metric or ()), reference)
    options = EvaluationOptions(count=count, each=each, batch=batch, seed=seed, speed=speed)
    run_evaluate(recipe_of(recipe, overrides), samplers, prompts, options, scoring=requested, out=out)


def metrics() -> None:
    """List the metrics of `evaluate --metric`: what they need and what they mean."""
    console.quiet_libraries()
    from scalewise.cli.run_measuring import list_metrics

    list_metrics()


def bench(
    recipe: RecipeName,
    samplers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Samplers as for evaluate; speed-ups are relative to the first (default: teacher, and "
            "few-step at full scale and scale-wise with the undistilled model, which costs the same as a "
            "student). Overrides such as model.dtype=bfloat16 may be mixed in."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="honest: batch 1 and 8, dtype of the recipe, not compiled; paper: batch 8, half precision, "
            "compiled, 100 rounds (the paper also uses a tiny VAE: model.vae=FOLDER)."
        ),
    ] = "honest",
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; each times every sampler once.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks of the denoiser.")
    ] = None,
    override: OldOverrides = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of all images.")] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Benchmark training instead: time and peak memory per iteration, scale-wise and full-scale, "
            "full loss and MMD alone.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("bench"),
) -> None:
    """Benchmark sampling of teacher, full-scale and scale-wise models: text encoders, each step, VAE.

    Also reports the measured speed-up relative to the one expected from FLOPs. Examples:
    `scalewise bench mini --batch 8`, `scalewise bench mini --training --rounds 3`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import run_bench, run_training_bench
    from scalewise.evaluation.sampling_speed import build_protocol

    chosen_samplers, overrides = split_overrides(samplers or [], override)
    if training:
        if chosen_samplers or batch or prompt or compiled is not None or protocol != "honest":
            raise typer.BadParameter(
                "--training only accepts the recipe, overrides, --rounds and --out; remove the other "
                "arguments."
            )
        run_training_bench(recipe_of(recipe, overrides), rounds=rounds or 7, out=out)
        return
    chosen = build_protocol(protocol, batches=batch, rounds=rounds, compiled=compiled)
    run_bench(recipe_of(recipe, overrides), chosen_samplers, chosen, prompt, out)


def study(
    names: Annotated[list[str] | None, typer.Argument(help="Studies to run; none lists them.")] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Training seed; repeatable (default: 0 1 2 3).")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of held-out prompts, 50 or more (default: 299).")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Training iterations of each student (default: those of the recipe).")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timing rounds of training-cost (default: 7).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder; an interrupted study resumes there.")] = Path(
        "studies"
    ),
) -> None:
    """Check claims of the paper on the mini: train each variant with each seed, evaluate, write a page.

    Takes hours; resumes when called again. Example: `scalewise study losses --seed 0 --seed 1`
    """
    console.quiet_libraries()
    from scalewise.cli.run_measuring import list_studies, run_studies
    from scalewise.studies import StudySettings
    from scalewise.studies.training_cost import NAME

    if not names:
        list_studies()
        return
    if set(names) == {NAME} and any(v is not None for v in (seeds, count, iterations)):
        raise typer.BadParameter(f"{NAME} only accepts --rounds and --out; remove the other options.")
    if rounds and NAME not in names:
        raise typer.BadParameter(f"--rounds only applies to {NAME}; remove it.")
    settings = StudySettings(
        tuple(seeds or StudySettings.seeds), StudySettings.count if count is None else count, iterations
    )
    run_studies(names, settings, rounds=rounds or 7, out=out)

"""Commands that make something: a demo, a set, a student, pictures, a file for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalewise.cli.arguments import Overrides, RecipeName, model_overrides, recipe_of
from scalewise.common import console


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
    from scalewise.cli.demo import run_demo

    report = run_demo(out, minutes=minutes)
    console.out.print(f"[bold]Open {report} in a browser.[/]", soft_wrap=True)


def generate(
    recipe: RecipeName,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: text, one a line, or .jsonl, .json, .csv, .tsv "
            "(default for the mini: its captions)."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples in all; prompts repeat with new seeds.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the set.")] = 0,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="Keep latents at this scale too, for other schedules; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the set; a stopped run goes on there.")] = Path(
        "synthetic"
    ),
) -> None:
    """Make a synthetic training set with the teacher, at every scale of the recipe's schedule.

    Example: `scalewise generate mini --count 500 --out my-set`, then `scalewise distill mini
    data.path=my-set`
    """
    console.quiet_libraries()
    from scalewise.cli.run_making import run_generate
    from scalewise.method.scales import Scale

    also = [Scale.parse(text) for text in scale or ()]
    chosen, typed = recipe_of(recipe, overrides), [recipe, *(overrides or ())]
    run_generate(chosen, prompts, count=count, batch=batch, seed=seed, also=also, out=out, typed=typed)


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
    from scalewise.cli.inputs import run_folder
    from scalewise.cli.run_making import print_dry_run, run_distill

    chosen = recipe_of(recipe, overrides)
    folder = out or run_folder(chosen)
    if dry_run:
        print_dry_run(chosen)
        return
    run_distill(chosen, folder, resume=resume)


def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(
            help="One or more prompts. Overrides of how the model is loaded, such as "
            "model.offload=components, may stand among them."
        ),
    ],
    student: Annotated[
        str | None,
        typer.Option(
            help="'mini' (also the default), a student.safetensors, the folder of a run or of its checkpoint."
        ),
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
    from scalewise.cli.run_making import Drawing, sample_pictures

    texts, overrides = model_overrides(prompts)
    asked = Drawing(student, teacher, recipe, base, schedule, weight, seed, count, batch, overrides)
    files, seconds = sample_pictures(texts, asked, out)
    console.out.print(
        f"{len(files)} {'picture' if len(files) == 1 else 'pictures'} in {seconds:.1f} s after loading: "
        f"{', '.join(map(str, files))}",
        soft_wrap=True,
    )


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
    from scalewise.cli.run_making import export_student

    console.out.print(
        f"{export_student(student, out, form, schedule, base=base)} weights written to {out}", soft_wrap=True
    )

"""Commands that create something: demo, dataset, student, images, exported file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from scalewise.cli.arguments import Overrides, RecipeName, model_overrides, recipe_of
from scalewise.common import console


def demo(
    out: Annotated[Path, typer.Option(help="Output folder; an interrupted demo resumes there.")] = Path(
        "demo-run"
    ),
    minutes: Annotated[float, typer.Option(min=1, help="Time limit in minutes, including training.")] = 14.0,
) -> None:
    """Distill the embedded teacher and compare student and teacher in an HTML report.

    Needs no GPU and no network.
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
            help="Prompt file: text with one prompt per line, or .jsonl, .json, .csv, .tsv "
            "(default for the mini: its captions)."
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Total number of samples; prompts repeat with new seeds.")
    ] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the dataset.")] = 0,
    store: Annotated[
        str,
        typer.Option(
            help="How latents are stored: float16, or int8, which takes half the disk and rounds them to 8 "
            "bits per value."
        ),
    ] = "float16",
    scale: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the dataset; an interrupted run resumes there.")
    ] = Path("synthetic"),
) -> None:
    """Generate a training dataset with the teacher.

    It stores the samples at full scale; `distill` derives the smaller scales of its schedule on first use.

    Example: `scalewise generate mini --count 500 --out my-set`, then `scalewise distill mini
    data.path=my-set`
    """
    console.quiet_libraries()
    from scalewise.cli.run_making import read_storage, run_generate

    if scale:
        raise ValueError(
            f"--scale {scale[0]} is no longer needed: datasets store the full scale only, and every other "
            "scale is derived from it on first use. Remove --scale."
        )
    chosen, arguments = recipe_of(recipe, overrides), [recipe, *(overrides or ())]
    run_generate(
        chosen, prompts, count=count, batch=batch, seed=seed, out=out, dtype=read_storage(store),
        arguments=arguments,
    )  # fmt: skip


def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/NAME-OF-RECIPE).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint (bit-exact).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and exit.")
    ] = False,
) -> None:
    """Distill a teacher into a few-step student.

    Examples: `scalewise distill mini-mmd`, `scalewise distill mini train.iterations=200
    data.path=my-images`, `scalewise distill mini --out runs/mini --resume`
    """
    console.quiet_libraries()
    from scalewise.cli.inputs import default_run_folder
    from scalewise.cli.run_making import print_dry_run, run_distill

    chosen = recipe_of(recipe, overrides)
    folder = out or default_run_folder(chosen)
    if dry_run:
        print_dry_run(chosen)
        return
    run_distill(chosen, folder, resume=resume)


def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(
            help="One or more prompts. Overrides of model keys, such as model.offload=components, may be "
            "mixed in."
        ),
    ],
    student: Annotated[
        str | None,
        typer.Option(help="'mini' (default), a student.safetensors, or the folder of a run or checkpoint."),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Sample with the teacher of the student, with all its steps.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="Only with --teacher: recipe whose teacher to use; needs no student."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model to use instead of the one recorded in the student.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Schedule of a student without one: name of a recipe, or '1000@64 896@80 737@96 602@128'."
        ),
    ] = None,
    weight: Annotated[float, typer.Option(min=0, help="LoRA weight of the student (1 = full).")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; sample i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Generate images with a student in a few scale-wise steps.

    Example: `scalewise sample "a red apple, fluent style" "a dog face, noto style" --count 4`
    """
    console.quiet_libraries()
    from scalewise.cli.run_making import SampleOptions, sample_images

    texts, overrides = model_overrides(prompts)
    options = SampleOptions(student, teacher, recipe, base, schedule, weight, seed, count, batch, overrides)
    files, seconds = sample_images(texts, options, out)
    console.out.print(
        f"{len(files)} {'image' if len(files) == 1 else 'images'} in {seconds:.1f} s after loading: "
        f"{', '.join(map(str, files))}",
        soft_wrap=True,
    )
    if student in (None, "mini") and not (teacher or base):
        again = shlex.join(["scalewise", "sample", texts[0], "--teacher"])
        console.out.print(
            f"Next: {again}, or scalewise demo to train such a student", soft_wrap=True, markup=False,
            highlight=False,
        )  # fmt: skip


def export(
    student: Annotated[str, typer.Argument(help="'mini', a LoRA file, or the folder of a run.")],
    out: Annotated[Path, typer.Argument(help="File to write (for peft: folder).")],
    form: Annotated[str, typer.Option(help="Format: diffusers, peft or kohya (ComfyUI).")] = "diffusers",
    schedule: Annotated[
        str | None,
        typer.Option(help="Schedule of a LoRA without one: name of a recipe, or '1000@64 896@80 ...'."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model of a LoRA that does not record it.")] = None,
) -> None:
    """Export a student in the LoRA format of another program; schedule and recipe stay in the metadata.

    Example: `scalewise export runs/mini mini-kohya.safetensors --form kohya`
    """
    console.quiet_libraries()
    from scalewise.cli.run_making import export_student

    console.out.print(
        f"{export_student(student, out, form, schedule, base=base)} weights written to {out}", soft_wrap=True
    )

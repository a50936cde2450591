"""Implementation of the commands that create something; their options are declared in `making`."""

from __future__ import annotations

import itertools
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.table import Table
from torch import Tensor

from scalewise import mini
from scalewise.cli.inputs import check_dataset_folder, check_out, make_folder, read_prompts
from scalewise.common import console, distributed
from scalewise.common.images import save_image, to_bytes
from scalewise.config.overrides import replaced
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data.header import SetHeader
from scalewise.data.storage import STORAGE_TYPES, StorageType
from scalewise.data.synthetic import generate
from scalewise.evaluation.evaluate import warn_of_truncation_once
from scalewise.evaluation.samplers import SamplerSpec, count_passes, encode, enter, parse_sampler
from scalewise.method.distill import Numbers
from scalewise.models import ALL_PARTS, ModelError, lora_keys
from scalewise.models.lora import Student, load_student, write_student
from scalewise.models.meta import build_meta_model
from scalewise.pipelines import read_schedule
from scalewise.training import setup
from scalewise.training.run import distill


@dataclass(frozen=True)
class SampleOptions:
    """Options of `scalewise sample`."""

    student: str | None = None
    teacher: bool = False
    recipe: str | None = None
    """Recipe whose teacher to use, instead of the teacher of a student."""
    base: str | None = None
    schedule: str | None = None
    weight: float = 1.0
    seed: int = 0
    count: int = 1
    batch: int = 8
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe used to load the model, such as model.offload=components."""


def sample_images(prompts: list[str], options: SampleOptions, out: Path) -> tuple[list[Path], float]:
    """Generate and save `count` images per prompt; returns the files and the seconds spent after loading."""
    make_folder(out)
    spec, recipe, student = _resolve_sampler(options)
    model = setup.load(recipe.override(options.overrides), ALL_PARTS)
    assert spec.schedule is not None
    model.check_schedule(spec.schedule)
    texts = [p for p in prompts for _ in range(options.count)]
    seeds = [options.seed + i for i in range(len(texts))]
    files, started = list[Path](), time.perf_counter()
    uncond = encode(model, spec, [spec.negative_prompt])
    passes = count_passes(model, spec)
    with (
        warn_of_truncation_once(model, spec, texts),
        # The training precision may be slow on this device, and another one gives nearly the same images.
        enter(model, spec, precision="auto", student=student, weight=options.weight) as sampler,
        console.progress("sampling", passes * -(-len(texts) // options.batch)) as done,
    ):
        for batch, start in enumerate(range(0, len(texts), options.batch)):
            rows = slice(start, start + options.batch)

            def on_step(i: int, _x0: Tensor, *, before: int = batch * passes) -> None:
                done(before + i + 1)

            cond = encode(model, spec, texts[rows])
            x0 = sampler(cond, uncond, seeds[rows], on_step=on_step)
            for text, seed, sample in zip(texts[rows], seeds[rows], model.decode(x0), strict=True):
                name = "".join(c if c.isalnum() else "-" for c in text.lower())[:60].strip("-") or "untitled"
                files.append(save_sample(sample, out / f"{name}-{seed}"))
    return files, time.perf_counter() - started


def _resolve_sampler(options: SampleOptions) -> tuple[SamplerSpec, Recipe, Student | None]:
    """Return the sampler, the recipe of its model, and the student if it is one."""
    if options.teacher and options.schedule:
        raise RecipeError(
            "--schedule only applies to students, not to the teacher; remove --schedule or --teacher."
        )
    if options.recipe:
        if not options.teacher:
            raise RecipeError(
                "--recipe only applies to the teacher; add --teacher, or use --student instead."
            )
        recipe = find_recipe(options.recipe).with_values({"model.base": options.base} if options.base else {})
        return parse_sampler("teacher", recipe), recipe, None
    if options.student is None and options.base and not mini.is_named(options.base):
        raise RecipeError(
            f"No student for {options.base} was given; add --student, or --teacher and --recipe for the "
            "teacher of a recipe."
        )
    path = mini.resolve(options.student or "mini", mini.STUDENT)
    student = load_student(path, schedule=read_schedule(options.schedule) if options.schedule else None)
    base = options.base or student.base
    if not base:
        raise RecipeError(f"{path} does not record its base model; give it with --base.")
    recipe = _student_recipe(student, base)
    if options.teacher:
        return parse_sampler("teacher", recipe), recipe, None
    spec = SamplerSpec(
        "student", "student", len(student.schedule), schedule=student.schedule, path=Path(path)
    )
    return spec, recipe, student


def _student_recipe(student: Student, base: str) -> Recipe:
    """Return the recipe of a student, or a recipe with its base and schedule if the file contains none."""
    if student.recipe:
        return Recipe.from_mapping(student.recipe, origin="the student's recipe").with_values(
            {"model.base": base}
        )
    schedule = {"timesteps": student.schedule.timesteps, "scales": [str(s) for s in student.schedule.scales]}
    # Other base models are large: use bfloat16 on a GPU, as they are published.
    model = {"base": base, "dtype": "bfloat16" if distributed.device().type == "cuda" else "float32"}
    return Recipe.from_mapping({"name": "foreign", "model": model, "schedule": schedule})


def save_sample(sample: Tensor, stem: Path) -> Path:
    """Save an image [3, H, W] as PNG, or a video [3, T, H, W] as animated PNG; returns the file."""
    return save_image(to_bytes(sample[None])[0], free_path(stem.with_name(stem.name + ".png")))


def free_path(path: Path) -> Path:
    """Return the path, with -2, -3, ... appended to its name if the file exists: images are not
    overwritten.
    """
    names = (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(2))
    return next(p for p in itertools.chain([path], map(path.with_name, names)) if not p.exists())


def export_student(
    student: str, out: Path, form: str, schedule: str | None, *, base: str | None = None
) -> int:
    """Write a student in another LoRA format and return the number of weights.

    The layers are checked against the configuration of the base, which is also needed to read kohya names.
    """
    kind, given_schedule = lora_keys.read_form(form), read_schedule(schedule) if schedule else None
    if kind != "peft" and (out.is_dir() or out.suffix != ".safetensors"):
        raise RecipeError(f"{out} must end in .safetensors; rename it, or use --form peft to write a folder.")
    loaded = load_student(mini.resolve(student, mini.STUDENT), schedule=given_schedule)
    loaded = _match_base(replace(loaded, base=base or loaded.base), student)
    write_student(out, loaded, form=kind)
    return len(loaded.tensors)


def _match_base(student: Student, name: str) -> Student:
    """Return the student with the layer names of its base; warns if the base is unknown or not available."""
    has_paths = all(lora_keys.is_path(key) for key in student.tensors)
    if not student.base:
        if not has_paths:
            raise RecipeError(
                f"{name} uses kohya layer names, which need the base model; give it with --base."
            )
        warnings.warn(
            f"{name} does not record its base model, so its layers were not checked; give --base.",
            stacklevel=2,
        )
        return student
    try:
        denoiser = build_meta_model(mini.resolve(student.base, mini.TEACHER)).denoiser
    except ModelError as error:
        if not has_paths:
            raise
        warnings.warn(f"The layers of {name} were not checked against its base: {error}", stacklevel=2)
        return student
    return student.match_to(denoiser)


def run_distill(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """Train a student with a progress bar that shows the losses."""
    check_out(out)
    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    console.err.print(f"{recipe.name}: {recipe.about}; {recipe.train.iterations} iterations")
    run_with_progress(distill(recipe, out, console.progress, resume=resume), recipe.train.iterations)
    report_run(recipe, out)
    distributed.shutdown()


def report_run(recipe: Recipe, out: Path) -> None:
    """Print the files of a finished run and the command to sample with its student."""
    sheets = sorted((out / "samples").glob("*.png"))
    shown = f", previews: {sheets[-1]}" if sheets else ""
    prompt = next(iter(recipe.train.sample_prompts), "a cat")
    print_line = partial(console.out.print, markup=False, soft_wrap=True, highlight=False)
    print_line(f"The student is {out / 'student.safetensors'}; losses: {out / 'log.jsonl'}{shown}")
    print_line(f"Next: {shlex.join(['scalewise', 'sample', prompt, '--student', str(out)])}")


def run_with_progress(rows: Iterator[Numbers], total: int) -> None:
    """Run a training to its end with a progress bar; the first row contains the first iteration."""
    first = int(next(rows)["iteration"])
    with console.progress("distilling", total) as done:
        done(first)
        for row in rows:
            done(int(row["iteration"]), format_losses(row))


def format_losses(row: Numbers) -> str:
    """Format the losses of an iteration, such as "mmd 0.0123, dmd 0.45"."""
    return ", ".join(f"{name} {row[name]:.3g}" for name in ("mmd", "dmd", "gan") if name in row)


def print_dry_run(recipe: Recipe) -> None:
    """Print what a run would train, with its sizes and memory."""
    facts = setup.dry_run(recipe)
    table = Table("step", "t", "scale", "tokens", box=None, header_style="bold")
    for i, (t, scale, tokens) in enumerate(facts["steps"]):
        table.add_row(str(i + 1), f"{t:g}", scale, str(tokens))
    console.out.print(table)
    share = facts["tokens"] / facts["full_tokens"]
    console.out.print(
        f"tokens per sample: {facts['tokens']:,} of {facts['full_tokens']:,} at full scale ({share:.0%})"
    )
    console.out.print(f"frozen base: {facts['base_parameters']:,} parameters, stored once")
    for role, count in facts["trainable"].items():
        console.out.print(f"trainable ({role}): {count:,} parameters")
    memory = ", ".join(f"{name} {size:,.1f} MB" for name, size in facts["megabytes"].items())
    console.out.print(f"memory without activations: {memory}")
    effective = recipe.train.batch * recipe.train.accumulate * distributed.world()
    console.out.print(
        f"{recipe.train.iterations} iterations of {effective} samples per update; dry run, nothing was "
        "trained"
    )


def run_generate(
    recipe: Recipe,
    prompts: Path | None,
    *,
    count: int,
    batch: int,
    seed: int,
    out: Path,
    dtype: StorageType = "float16",
    arguments: Sequence[str] = (),
) -> None:
    """Generate a synthetic dataset, or resume an interrupted one.

    `arguments` are the recipe (name or file) and its overrides as given on the command line, used to print
    the next command; by default the name of the recipe.
    """
    check_dataset_folder(out)
    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    texts = read_prompts(prompts, recipe.model.base, "train")
    teacher = setup.teacher(recipe)
    setup.check_recipe(recipe, teacher)
    with console.progress("generating", count) as done:
        counts = generate(teacher, recipe, texts, out, count=count, batch=batch, seed=seed, dtype=dtype)
        for finished in counts:
            done(finished)
    if distributed.is_main():
        _report_dataset(out, arguments or [recipe.name], count=count)
    distributed.shutdown()


def read_storage(text: str) -> StorageType:
    """Return the storage type of `--store`; RecipeError if it is unknown."""
    for known in STORAGE_TYPES:
        if text == known:
            return known
    raise RecipeError(f"--store {text!r} is unknown; choose one of {', '.join(STORAGE_TYPES)}.")


def _report_dataset(out: Path, arguments: Sequence[str], *, count: int) -> None:
    """Print the size of a finished dataset, and whether it is larger than requested."""
    header = SetHeader.read(out)
    print_line = partial(console.out.print, markup=False, soft_wrap=True)
    stored = ", ".join(map(str, header.scales))
    print_line(f"{header.rows} samples in {out}, stored at {stored}; other scales are derived on first use")
    if header.rows > count:
        print_line(
            f"The dataset already had more than --count {count} samples: none was generated or removed, and "
            f"training uses all {header.rows}. For a smaller dataset use another --out."
        )
    recipe, *overrides = arguments
    words = ["scalewise", "distill", recipe, *replaced(overrides, [f"data.path={out}"])]
    print_line(f"Next: {shlex.join(words)}", highlight=False)

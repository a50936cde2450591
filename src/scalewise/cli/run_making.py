"""What the commands do that make something, with progress; the command line only reads options."""

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
from scalewise.cli.inputs import check_out, check_set_folder, folder_for, read_prompts
from scalewise.common import console, distributed
from scalewise.common.images import save_image, to_bytes
from scalewise.config.overrides import replaced
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data.header import SetHeader
from scalewise.data.synthetic import generate
from scalewise.evaluation.evaluate import warned_once
from scalewise.evaluation.samplers import SamplerSpec, count_passes, encode, enter, parse_sampler
from scalewise.method.distill import Numbers
from scalewise.method.scales import Scale
from scalewise.models import ALL_PARTS, ModelError, lora_keys
from scalewise.models.lora import Student, load_student, write_student
from scalewise.models.meta import skeleton
from scalewise.pipelines import read_schedule
from scalewise.training import setup
from scalewise.training.run import distill


@dataclass(frozen=True)
class Drawing:
    """What `scalewise sample` was asked for."""

    student: str | None = None
    teacher: bool = False
    recipe: str | None = None
    """Whose teacher draws, in place of a student's."""
    base: str | None = None
    schedule: str | None = None
    weight: float = 1.0
    seed: int = 0
    count: int = 1
    batch: int = 8
    overrides: tuple[str, ...] = ()
    """Of the recipe that the model is loaded by, such as model.offload=components."""


def sample_pictures(prompts: list[str], asked: Drawing, out: Path) -> tuple[list[Path], float]:
    """Draw each prompt `count` times and save it; returns the files and the seconds after loading."""
    folder_for(out)
    contender, recipe, student = _who_draws(asked)
    model = setup.load(recipe.override(asked.overrides), ALL_PARTS)
    assert contender.schedule is not None
    model.check_schedule(contender.schedule)
    texts = [p for p in prompts for _ in range(asked.count)]
    seeds = [asked.seed + i for i in range(len(texts))]
    files, started = list[Path](), time.perf_counter()
    uncond = encode(model, contender, [contender.negative_prompt])
    passes = count_passes(model, contender)
    with (
        warned_once(model, contender, texts),
        # What the student was trained in may be slow here, and another precision draws nearly the same.
        enter(model, contender, precision="auto", student=student, weight=asked.weight) as sampler,
        console.progress("drawing", passes * -(-len(texts) // asked.batch)) as done,
    ):
        for number, start in enumerate(range(0, len(texts), asked.batch)):
            part = slice(start, start + asked.batch)

            def on_step(i: int, _x0: Tensor, *, before: int = number * passes) -> None:
                done(before + i + 1)

            cond = encode(model, contender, texts[part])
            x0 = sampler(cond, uncond, seeds[part], on_step=on_step)
            for text, own, sample in zip(texts[part], seeds[part], model.decode(x0), strict=True):
                name = "".join(c if c.isalnum() else "-" for c in text.lower())[:60].strip("-") or "untitled"
                files.append(save_sample(sample, out / f"{name}-{own}"))
    return files, time.perf_counter() - started


def _who_draws(asked: Drawing) -> tuple[SamplerSpec, Recipe, Student | None]:
    """The contender, the recipe of its model, and the student if there is one."""
    if asked.teacher and asked.schedule:
        raise RecipeError("--schedule is a student's; the teacher has its own steps. Leave one of them out.")
    if asked.recipe:
        if not asked.teacher:
            raise RecipeError("--recipe tells whose teacher draws; add --teacher, or name a student.")
        recipe = find_recipe(asked.recipe).with_values({"model.base": asked.base} if asked.base else {})
        return parse_sampler("teacher", recipe), recipe, None
    if asked.student is None and asked.base and not mini.is_named(asked.base):
        raise RecipeError(
            f"Name a student of {asked.base} with --student, or a recipe of its teacher with --teacher "
            "--recipe."
        )
    path = mini.resolve(asked.student or "mini", mini.STUDENT)
    student = load_student(path, schedule=read_schedule(asked.schedule) if asked.schedule else None)
    base = asked.base or student.base
    if not base:
        raise RecipeError(f"{path} does not say which model it is for; give its base with --base.")
    recipe = _recipe_of(student, base)
    if asked.teacher:
        return parse_sampler("teacher", recipe), recipe, None
    contender = SamplerSpec(
        "student", "student", len(student.schedule), schedule=student.schedule, path=Path(path)
    )
    return contender, recipe, student


def _recipe_of(student: Student, base: str) -> Recipe:
    """The student's recipe, or for a file of others one that names base and schedule."""
    if student.recipe:
        return Recipe.from_mapping(student.recipe, origin="the student's recipe").with_values(
            {"model.base": base}
        )
    schedule = {"timesteps": student.schedule.timesteps, "scales": [str(s) for s in student.schedule.scales]}
    # Bases of others are large: on a GPU in half precision, as they are published.
    model = {"base": base, "dtype": "bfloat16" if distributed.device().type == "cuda" else "float32"}
    return Recipe.from_mapping({"name": "foreign", "model": model, "schedule": schedule})


def save_sample(sample: Tensor, stem: Path) -> Path:
    """Save pixels [3, H, W] as PNG, a video [3, F, H, W] as an animated one."""
    return save_image(to_bytes(sample[None])[0], free_path(stem.with_name(stem.name + ".png")))


def free_path(path: Path) -> Path:
    """The path itself, or with the first of -2, -3, ... that is not taken: pictures are not overwritten."""
    names = (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(2))
    return next(p for p in itertools.chain([path], map(path.with_name, names)) if not p.exists())


def export_student(
    student: str, out: Path, form: str, schedule: str | None, *, base: str | None = None
) -> int:
    """Write a student under another convention's names; returns the number of weights.

    It is checked against the base's configuration, which also tells the paths in names of kohya's kind.
    """
    kind, given = lora_keys.read_form(form), read_schedule(schedule) if schedule else None
    if kind != "peft" and (out.is_dir() or out.suffix != ".safetensors"):
        raise RecipeError(f"{out} is no name of a .safetensors file; give one (for --form peft a folder).")
    found = load_student(mini.resolve(student, mini.STUDENT), schedule=given)
    found = _checked(replace(found, base=base or found.base), student)
    write_student(out, found, form=kind)
    return len(found.tensors)


def _checked(found: Student, student: str) -> Student:
    """The student with the layer names of its base, into which it has to fit; warns where none is known."""
    named = all(lora_keys.is_path(name) for name in found.tensors)
    if not found.base:
        if not named:
            raise RecipeError(f"{student} names layers as kohya does; say of which model with --base.")
        warnings.warn(
            f"{student} names no base, so it was not checked against one; give --base.", stacklevel=2
        )
        return found
    try:
        denoiser = skeleton(mini.resolve(found.base, mini.TEACHER)).denoiser
    except ModelError as error:
        if not named:
            raise
        warnings.warn(f"{student} was not checked against its base: {error}", stacklevel=2)
        return found
    return found.matched(denoiser)


def run_distill(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """Train with a progress bar that shows the losses."""
    check_out(out)
    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    console.err.print(f"{recipe.name}: {recipe.about}; {recipe.train.iterations} iterations")
    follow(distill(recipe, out, console.progress, resume=resume), recipe.train.iterations)
    report_run(recipe, out)
    distributed.shutdown()


def report_run(recipe: Recipe, out: Path) -> None:
    """Print what a finished run's folder holds, and the command that draws with its student."""
    sheets = sorted((out / "samples").glob("*.png"))
    shown = f", previews: {sheets[-1]}" if sheets else ""
    prompt = next(iter(recipe.train.sample_prompts), "a cat")
    say = partial(console.out.print, markup=False, soft_wrap=True, highlight=False)
    say(f"The student is {out / 'student.safetensors'}; losses: {out / 'log.jsonl'}{shown}")
    say(f"Next: {shlex.join(['scalewise', 'sample', prompt, '--student', str(out)])}")


def follow(rows: Iterator[Numbers], total: int) -> None:
    """Run a distillation to its end and show how far it is; the first row says where it starts."""
    first = int(next(rows)["iteration"])
    with console.progress("distilling", total) as done:
        done(first)
        for row in rows:
            done(int(row["iteration"]), losses_of(row))


def losses_of(row: Numbers) -> str:
    """The losses of an iteration, for the eye: "mmd 0.0123, dmd 0.45"."""
    return ", ".join(f"{name} {row[name]:.3g}" for name in ("mmd", "dmd", "gan") if name in row)


def print_dry_run(recipe: Recipe) -> None:
    """Show what a run would build."""
    facts = setup.dry_run(recipe)
    table = Table("step", "t", "scale", "tokens", box=None, header_style="bold")
    for i, (t, scale, tokens) in enumerate(facts["steps"]):
        table.add_row(str(i + 1), f"{t:g}", scale, str(tokens))
    console.out.print(table)
    share = facts["tokens"] / facts["full_tokens"]
    console.out.print(
        f"tokens per sample: {facts['tokens']:,} of {facts['full_tokens']:,} at full scale ({share:.0%})"
    )
    console.out.print(f"frozen base: {facts['base_parameters']:,} parameters, held once")
    for role, count in facts["trainable"].items():
        console.out.print(f"trainable ({role}): {count:,} parameters")
    memory = ", ".join(f"{name} {size:,.1f} MB" for name, size in facts["megabytes"].items())
    console.out.print(f"memory held besides activations: {memory}")
    effective = recipe.train.batch * recipe.train.accumulate * distributed.world()
    console.out.print(
        f"{recipe.train.iterations} iterations of {effective} samples per update; nothing was trained"
    )


def run_generate(
    recipe: Recipe,
    prompts: Path | None,
    *,
    count: int,
    batch: int,
    seed: int,
    also: Sequence[Scale],
    out: Path,
    typed: Sequence[str] = (),
) -> None:
    """Make a synthetic set; goes on where a stopped one ended.

    `typed`: the recipe's name or file and its overrides, for the command that comes next; without them the
    recipe's name.
    """
    check_set_folder(out)
    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    texts = read_prompts(prompts, recipe.model.base, "train")
    teacher = setup.teacher(recipe)
    setup.check_recipe(recipe, teacher)
    with console.progress("generating", count) as done:
        drawing = generate(
            teacher, recipe, texts, out, count=count, batch=batch, seed=seed, extra_scales=also
        )
        for number in drawing:
            done(number)
    if distributed.is_main():
        _report_set(out, typed or [recipe.name], count=count)
    distributed.shutdown()


def _report_set(out: Path, typed: Sequence[str], *, count: int) -> None:
    """Print what a finished set holds, and that it is more than was asked for if it is."""
    header = SetHeader.read(out)
    say = partial(console.out.print, markup=False, soft_wrap=True)
    say(f"{header.rows} samples at {len(header.scales)} scales in {out}")
    if header.rows > count:
        say(
            f"That is more than --count {count}: they were there before, none was drawn or removed, and "
            f"training reads all {header.rows}. For a smaller set give another --out."
        )
    recipe, *overrides = typed
    words = ["scalewise", "distill", recipe, *replaced(overrides, [f"data.path={out}"])]
    say(f"Next: {shlex.join(words)}", highlight=False)

"""What the commands do, with progress; the command line itself only reads options."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.table import Table
from torch import Tensor

from scalewise import build, console, mini, parallel
from scalewise.contenders import enter, parse_contender
from scalewise.distill import Numbers
from scalewise.lora import load_student
from scalewise.models import ALL_PARTS
from scalewise.pictures import to_bytes
from scalewise.recipe import Recipe, RecipeError
from scalewise.runs import distill
from scalewise.sampling import last
from scalewise.teacher import generate


def sample_pictures(
    prompts: list[str],
    *,
    student: str,
    teacher: bool,
    base: str | None,
    seed: int,
    count: int,
    out: Path,
) -> tuple[list[Path], float]:
    """Draw each prompt `count` times and save it; returns the files and the seconds after loading."""
    from PIL import Image

    path = mini.resolve(student, mini.STUDENT)
    recipe = Recipe.from_mapping(load_student(path).recipe, origin="the student's recipe")
    if base:
        recipe = recipe.override([f"model.base={base}"])
    contender = parse_contender("teacher" if teacher else f"student:{path}", recipe)
    model = build.load(recipe, ALL_PARTS)
    texts = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for i in range(len(texts))]
    started = time.perf_counter()
    cond, uncond = model.encode_prompts(texts), model.encode_prompts([contender.negative_prompt])
    with (
        # What the student was trained in may be slow here; any precision draws the same picture.
        enter(model, contender, precision="auto") as sampler,
        console.progress("drawing", contender.steps) as done,
    ):
        latents = last(counted(sampler(cond, uncond, seeds), done))
    pictures = to_bytes(model.decode(latents))
    seconds = time.perf_counter() - started
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for text, own, picture in zip(texts, seeds, pictures, strict=True):
        name = "".join(c if c.isalnum() else "-" for c in text.lower())[:60].strip("-")
        files.append(out / f"{name}-{own}.png")
        Image.fromarray(picture).save(files[-1])
    return files, seconds


def counted(steps: Iterator[tuple[int, Tensor]], done: Callable[[int], None]) -> Iterator[tuple[int, Tensor]]:
    """Pass a sampler's steps through and report each."""
    for i, x0 in steps:
        done(i + 1)
        yield i, x0


def run_distill(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """Train with a progress bar that shows the losses."""
    parallel.init_from_env()
    console.err.print(f"{recipe.name}: {recipe.about}; {recipe.train.iterations} iterations")
    follow(distill(recipe, out, console.progress, resume=resume), recipe.train.iterations)
    parallel.shutdown()


def follow(rows: Iterator[Numbers], total: int) -> None:
    """Run a distillation to its end and show how far it is; the first row says where it starts."""
    first = int(next(rows)["iteration"])
    with console.progress("distilling", total) as done:
        done(first)
        for row in rows:
            done(int(row["iteration"]))


def print_dry_run(recipe: Recipe) -> None:
    """Show what a run would build."""
    facts = build.dry_run(recipe)
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
    effective = recipe.train.batch * recipe.train.accumulate * parallel.world()
    console.out.print(
        f"{recipe.train.iterations} iterations of {effective} samples per update; nothing was trained"
    )


def read_prompts(file: Path | None, base: str, split: str) -> list[str]:
    """Prompts from a file, or the mini's own captions."""
    if file is None:
        if base != "mini":
            raise RecipeError(
                "Give --prompts FILE with one prompt a line; only the mini brings captions along."
            )
        return mini.captions(split)
    if not file.exists():
        raise RecipeError(f"There is no prompt file {file}.")
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise RecipeError(f"The prompt file {file} holds no prompt; write one a line.")
    return prompts


def run_generate(
    recipe: Recipe, prompts: Path | None, *, count: int, batch: int, seed: int, out: Path
) -> None:
    """Make a synthetic set; goes on where a stopped one ended."""
    texts = read_prompts(prompts, recipe.model.base, "train")
    backbone = build.teacher_backbone(recipe)
    build.check(recipe, backbone.model)
    with console.progress("generating", count) as done:
        for number in generate(backbone, recipe, texts, out, count=count, batch=batch, seed=seed):
            done(number)
    console.out.print(f"{count} samples at {len(set(recipe.schedule.scales))} scales in {out}")


def run_evaluate(
    recipe: Recipe,
    contenders: list[str],
    prompts: Path | None,
    *,
    count: int,
    batch: int,
    seed: int,
    speed: bool,
    scorer: Path | None,
    out: Path,
) -> None:
    """Draw and score every contender on the same prompts and seeds."""
    from scalewise import study

    texts = read_prompts(prompts, recipe.model.base, "test")[:count]
    outcome = study.compare(
        recipe,
        contenders,
        texts,
        console.progress,
        batch=batch,
        seed=seed,
        speed=speed,
        scorer=scorer,
        out=out,
    )
    console.out.print(outcome.markdown, highlight=False, soft_wrap=True)

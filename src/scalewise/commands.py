"""What the commands do, with progress; the command line itself only reads options."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from scalewise import bench, build, console, keys, mini, parallel
from scalewise.contenders import Contender, enter, parse_contender
from scalewise.distill import Numbers
from scalewise.lora import Student, load_student, write_student
from scalewise.models import ALL_PARTS
from scalewise.models.skeleton import skeleton
from scalewise.pictures import to_bytes
from scalewise.pipelines import read_schedule
from scalewise.plan import GB, Plan, make_plan, scales_to_count
from scalewise.recipe import Recipe, RecipeError
from scalewise.recipes import find_recipe
from scalewise.runs import distill
from scalewise.scales import ScaleSchedule
from scalewise.speed import Protocol, measure_speed
from scalewise.survey import Wish, survey
from scalewise.teacher import generate


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


def sample_pictures(prompts: list[str], asked: Drawing, out: Path) -> tuple[list[Path], float]:
    """Draw each prompt `count` times and save it; returns the files and the seconds after loading."""
    contender, recipe, student = _who_draws(asked)
    model = build.load(recipe, ALL_PARTS)
    assert contender.schedule is not None
    model.check_schedule(contender.schedule)
    texts = [p for p in prompts for _ in range(asked.count)]
    seeds = [asked.seed + i for i in range(len(texts))]
    out.mkdir(parents=True, exist_ok=True)
    files, started = list[Path](), time.perf_counter()
    uncond = model.encode_prompts([contender.negative_prompt])
    total = contender.steps * -(-len(texts) // asked.batch)
    with (
        # What the student was trained in may be slow here, and another precision draws nearly the same.
        enter(model, contender, precision="auto", student=student, weight=asked.weight) as sampler,
        console.progress("drawing", total) as done,
    ):
        for number, start in enumerate(range(0, len(texts), asked.batch)):
            part = slice(start, start + asked.batch)
            for step, x0 in sampler(model.encode_prompts(texts[part]), uncond, seeds[part]):  # noqa: B007
                done(number * contender.steps + step + 1)
            for text, own, sample in zip(texts[part], seeds[part], model.decode(x0), strict=True):
                name = "".join(c if c.isalnum() else "-" for c in text.lower())[:60].strip("-")
                files.append(save_sample(sample, out / f"{name}-{own}"))
    return files, time.perf_counter() - started


def _who_draws(asked: Drawing) -> tuple[Contender, Recipe, Student | None]:
    """The contender, the recipe of its model, and the student if there is one."""
    if asked.teacher and asked.schedule:
        raise RecipeError("--schedule is a student's; the teacher has its own steps. Leave one of them out.")
    if asked.recipe:
        if not asked.teacher:
            raise RecipeError("--recipe tells whose teacher draws; add --teacher, or name a student.")
        recipe = find_recipe(asked.recipe).override([f"model.base={asked.base}"] if asked.base else [])
        return parse_contender("teacher", recipe), recipe, None
    if asked.student is None and asked.base not in (None, "mini"):
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
        return parse_contender("teacher", recipe), recipe, None
    contender = Contender(
        "student", "student", len(student.schedule), schedule=student.schedule, path=Path(path)
    )
    return contender, recipe, student


def _recipe_of(student: Student, base: str) -> Recipe:
    """The student's recipe, or for a file of others one that names base and schedule."""
    if student.recipe:
        return Recipe.from_mapping(student.recipe, origin="the student's recipe").override(
            [f"model.base={base}"]
        )
    schedule = {"timesteps": student.schedule.timesteps, "scales": [str(s) for s in student.schedule.scales]}
    # Bases of others are large: on a GPU in half precision, as they are published.
    model = {"base": base, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    return Recipe.from_mapping({"name": "foreign", "model": model, "schedule": schedule})


def save_sample(sample: Tensor, stem: Path) -> Path:
    """Save pixels [3, H, W] as PNG, a video [3, F, H, W] as an animated one."""
    frames = to_bytes(sample.unsqueeze(0) if sample.ndim == 3 else sample.transpose(0, 1))
    pictures = [Image.fromarray(frame) for frame in frames]
    path = stem.with_name(stem.name + ".png")
    if len(pictures) == 1:
        pictures[0].save(path)
    else:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // 16, loop=0)
    return path


def export_student(
    student: str, out: Path, form: str, schedule: str | None, *, base: str | None = None
) -> int:
    """Write a student under another convention's names; returns the number of weights.

    Names of kohya's kind hold paths that only the base's layers can tell, so its configuration is asked for.
    """
    kind, given = keys.read_form(form), read_schedule(schedule) if schedule else None
    if kind != "peft" and (out.is_dir() or out.suffix != ".safetensors"):
        raise RecipeError(f"{out} is no name of a .safetensors file; give one (for --form peft a folder).")
    found = load_student(mini.resolve(student, mini.STUDENT), schedule=given)
    found = replace(found, base=base or found.base)
    if not all(keys.is_path(name) for name in found.tensors):
        if not found.base:
            raise RecipeError(f"{student} names layers as kohya does; say of which model with --base.")
        found = found.matched(skeleton(mini.resolve(found.base, mini.TEACHER)).denoiser)
    write_student(out, found, form=kind)
    return len(found.tensors)


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


def run_plan(recipe: Recipe, *, gpus: int, gigabytes: float | None) -> None:
    """Count what a recipe costs and print it."""
    with console.progress("counting operations", len(scales_to_count(recipe))) as done:
        plan = make_plan(recipe, done)
    table = Table("step", "t", "scale", "tokens", "TFLOPs", box=None, header_style="bold")
    for i, (step, forward) in enumerate(zip(recipe.schedule.build(), plan.steps, strict=True)):
        tokens, flops = f"{forward.tokens:,}", f"{forward.flops / 1e12:,.3g}"
        table.add_row(str(i + 1), f"{step.t:g}", str(step.scale), tokens, flops)
    console.out.print(table)
    say = partial(console.out.print, soft_wrap=True)
    say(f"\nA sample, denoiser alone: student {plan.scale_wise / 1e12:,.3g} TFLOPs, as many steps at full "
        f"scale {plan.full_scale / 1e12:,.3g}, the teacher's {plan.teacher_forwards} forwards "
        f"{plan.teacher / 1e12:,.3g}")  # fmt: skip
    paper = [f" (the paper measured {found:.1f}x)" if found else "" for found in plan.paper_speed_up]
    say(f"Expected: {plan.teacher / plan.scale_wise:.1f}x faster than the teacher{paper[0]}, "
        f"{plan.full_scale / plan.scale_wise:.2f}x than full scale{paper[1]}")  # fmt: skip
    say(f"An iteration and sample: {plan.iteration / 1e12:,.3g} TFLOPs; full scale "
        f"{plan.iteration_full / plan.iteration:.2f}x as much, MMD alone "
        f"{plan.iteration / plan.iteration_mmd:.1f} times less")  # fmt: skip
    say(f"LoRA: {plan.lora_parameters:,} parameters a role; denoiser {plan.parameters['denoiser']:,}, "
        f"VAE {plan.parameters['vae']:,}, text encoders {plan.parameters['text']:,}")  # fmt: skip
    say(f"On disk for 1,000 samples of as many prompts: latents {1000 * plan.sample_bytes / GB:,.3g} GB, "
        f"embeddings of the prompts {1000 * plan.prompt_bytes / GB:,.3g} GB (in the cache)")  # fmt: skip
    _print_memory(plan, gpus=gpus, gigabytes=gigabytes)


def _print_memory(plan: Plan, *, gpus: int, gigabytes: float | None) -> None:
    memory, train = plan.memory, plan.recipe.train
    rows = {
        f"frozen base ({plan.recipe.model.dtype})": memory.base,
        "adapters": memory.adapters,
        "gradients and optimizer": memory.optimizer,
        "activations of a sample": memory.activations,
        "the same, checkpointed": memory.checkpointed,
    }
    table = Table("held on each device", "GB", box=None, header_style="bold")
    for name, size in rows.items():
        table.add_row(name, f"{size / GB:,.3g}")
    for part, size in memory.not_held.items():
        table.add_row(f"{part}: while data is prepared only", f"({size / GB:,.3g})")
    console.out.print(table)
    batch = train.batch * train.accumulate * gpus
    console.out.print(f"a batch of {train.batch} on each of {gpus} processes: {batch} samples an update")
    if gigabytes is None and torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / GB
    if gigabytes is None:
        console.out.print("Give --memory GB to learn which batch fits into a device.")
        return
    for checkpointing in (False, True):
        fits = memory.batch_that_fits(gigabytes * GB, checkpointing=checkpointing)
        how = "with" if checkpointing else "without"
        console.out.print(f"{how} gradient checkpointing, {gigabytes:g} GB hold a batch of {fits}")
    advice = plan.advice(gigabytes * GB, train.batch)
    console.out.print(
        f"The recipe's batch does not fit; switch on: {'; '.join(advice)}" if advice else "The recipe fits."
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
    from scalewise import comparison

    texts = read_prompts(prompts, recipe.model.base, "test")[:count]
    outcome = comparison.compare(
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


def short(schedule: ScaleSchedule) -> str:
    """A schedule for the eye: timesteps without decimals."""
    return " ".join(f"{step.t:.0f}@{step.scale}" for step in schedule)


def run_spectrum(recipe: Recipe, wish: Wish, *, levels: tuple[float, ...], count: int, out: Path) -> None:
    """Survey the latents of a recipe's data; print tables, write figure and numbers."""
    from scalewise.report.spectra import draw_survey

    found = survey(recipe, wish, count=count, progress=console.progress)
    say = partial(console.out.print, soft_wrap=True)
    falls = ", ".join(f"f^-{s.exponent():.2f} in {axis}" for axis, s in found.axes.items())
    say(f"{found.latents} latents of {found.spectra.full}; their power falls about as {falls}")
    for axis, scales in found.options.items():
        safe = ((s, found.spectra.safe_from(s, found.noise)) for s in scales if s != found.spectra.full)
        parts = (f"{s} from t = {t:.0f}" if t is not None else f"{s} never" for s, t in safe)
        say(f"Safe in {axis}: {', '.join(parts)}")
    table = Table("", "schedule", "tokens", "TFLOPs", "margins", box=None, header_style="bold")
    for judged in found.schedules:
        hidden = " ".join(f"{m:.3g}" for m in judged.margins) or "-"
        tokens, flops = f"{judged.tokens:,}", f"{judged.flops / 1e12:,.3g}"
        table.add_row(
            judged.name, short(judged.schedule), f"{tokens} ({judged.token_part:.0%})",
            f"{flops} ({judged.flop_part:.0%})", hidden,
        )  # fmt: skip
    console.out.print(table)
    say("In brackets: of as many steps at full scale. A margin is how much stronger noise is, at a step's t, "
        "than the strongest detail that the latent enlarged for it lacks; below 1 is not safe.")  # fmt: skip
    for judged in found.schedules:
        for sentence in judged.advice:
            say(f"[yellow]{judged.name}:[/] {sentence}")
    proposed = found.schedules[-1].schedule
    timesteps, scales = (", ".join(map(str, v)) for v in (proposed.timesteps, proposed.scales))
    say(f"To train with the proposal: 'schedule.timesteps=[{timesteps}]' 'schedule.scales=[{scales}]'")
    out.mkdir(parents=True, exist_ok=True)
    (out / "spectrum.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    figure = draw_survey(found, levels or proposed.timesteps[1:] or proposed.timesteps, out / "spectrum.png")
    say(f"The figure is {figure}; the numbers lie beside it.")


def run_bench(
    recipe: Recipe, contenders: list[str], protocol: Protocol, prompt: str | None, out: Path
) -> None:
    """Time the contenders in turns and print what came out beside what the operations promise."""
    if prompt is None:
        prompt = read_prompts(None, recipe.model.base, "test")[0] if recipe.model.base == "mini" else "a cat"
    found = measure_speed(recipe, contenders, protocol, caption=prompt, progress=console.progress)
    found.save(out)
    table = Table("", "batch", "text, ms", "denoiser, ms", "vae, ms", "total, ms", "faster", box=None,
                  header_style="bold")  # fmt: skip
    for timing in found.timings:
        parts = [bench.format_ms(timing.parts[p].median) for p in ("text", "denoiser", "vae", bench.TOTAL)]
        faster = bench.format_ratio(timing.speedup.get(bench.TOTAL))
        table.add_row(timing.name, str(timing.batch), *parts, faster)
    console.out.print(table)
    for g in found.gains:
        console.out.print(
            f"batch {g.batch}, denoiser: {g.name} {bench.format_ratio(g.measured)} faster than {g.over}, of "
            f"{g.expected:.3g}x by operations: {g.reached.median:.0%} reached",
            soft_wrap=True,
        )
    console.out.print(f"Milliseconds per image, medians of {found.protocol.rounds} rounds. All in {out}")


def list_studies() -> None:
    """Print the studies there are."""
    from scalewise.studies import STUDIES

    table = Table("study", "what it checks", "paper", "students", box=None, header_style="bold")
    for study in STUDIES.values():
        trained = len({arm.overrides for arm in study.arms if not arm.contender and not arm.start})
        table.add_row(study.name, study.title, study.source, f"{trained} a seed")
    console.out.print(table)


def run_studies(names: list[str], *, seeds: list[int], count: int, iterations: int | None, out: Path) -> None:
    """Run studies one after the other; each ends with its verdicts and a page."""
    from scalewise.studies import STUDIES, Effort, run_study, write_page

    if unknown := [name for name in names if name not in STUDIES]:
        raise RecipeError(f"There is no study {unknown[0]!r}; there are {', '.join(STUDIES)}.")
    effort = Effort(tuple(seeds), count, iterations)
    for name in names:
        outcome = run_study(STUDIES[name], out, effort, progress=console.progress)
        for claim in outcome.study.claims:
            console.out.print(f"{name}: {claim.text}: [bold]{outcome.verdict(claim.text)}[/]", soft_wrap=True)
        console.out.print(f"The page is {write_page(outcome, out)}", soft_wrap=True)

"""Implementation of the commands that measure or print; their options are declared in `measuring`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from scalewise.cli.inputs import check_out, evaluation_prompts, make_folder, read_prompts
from scalewise.common import console, distributed
from scalewise.common.results import write_json
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.evaluation.sampling_speed import Protocol, measure_speed
from scalewise.evaluation.scoring import ScoringOptions
from scalewise.evaluation.timing import TOTAL, format_ms, format_ratio
from scalewise.method.scales import Scale, ScaleSchedule
from scalewise.metrics import EXTRAS, SCORER_METRICS
from scalewise.planning.schedule_search import SearchOptions, measure_spectrum
from scalewise.studies import StudySettings

MIN_STUDY_PROMPTS = 50


@dataclass(frozen=True)
class EvaluationOptions:
    """Sampling options of `scalewise evaluate`."""

    count: int | None
    """Number of prompts (default: all)."""
    each: int = 1
    """Samples per prompt."""
    batch: int = 16
    seed: int = 0
    speed: bool = True


def run_evaluate(
    recipe: Recipe, samplers: list[str], prompts: Path | None, options: EvaluationOptions, *,
    scoring: ScoringOptions, out: Path,
) -> None:  # fmt: skip
    """Generate images with every sampler for the same prompts and seeds, evaluate them, print the metrics."""
    from scalewise.evaluation import compare

    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    texts = evaluation_prompts(prompts, recipe.model.base, options.count)
    check_out(out)
    outcome = compare.compare(
        recipe,
        samplers,
        texts,
        console.progress,
        each=options.each,
        batch=options.batch,
        seed=options.seed,
        speed=options.speed,
        scoring=scoring,
        out=out,
    )
    if distributed.is_main():
        print_line = partial(console.out.print, highlight=False, soft_wrap=True, markup=False)
        print_line(outcome.markdown)
        print_line(f"Images: {out / 'pictures'}; metrics: {out / 'figures.json'} and {out / 'figures.md'}")
    distributed.shutdown()


def list_metrics() -> None:
    """Print all metrics."""
    groups = [("(always computed, with the scorer)", "", SCORER_METRICS)]
    for extra in EXTRAS.values():
        weights = "none" if extra.source is None else extra.source or "given by NAME=WEIGHTS"
        groups.append((extra.name, f"; weights: {weights}", extra.metrics))
    print_line = partial(console.out.print, soft_wrap=True, highlight=False)
    for name, source, metrics in groups:  # not in columns, which would truncate ids on narrow terminals
        print_line(f"[bold]{escape(name)}[/]{escape(source)}")
        for metric in metrics:
            print_line(f"  {escape(metric.title)}: {escape(metric.about)}")


def size_along(axis: str, scale: Scale) -> str:
    """Format the size of a scale along an axis: "8x8" in space, "3 frames" in time."""
    if axis == "space":
        return f"{scale.height}x{scale.width}"
    return f"{scale.frames} frame{'s' if scale.frames > 1 else ''}"


def format_rounded(schedule: ScaleSchedule) -> str:
    """Format a schedule with rounded timesteps."""
    return " ".join(f"{step.t:.0f}@{step.scale}" for step in schedule)


def run_spectrum(
    recipe: Recipe, search: SearchOptions, *, panels: tuple[float, ...], count: int, out: Path
) -> None:
    """Measure the spectrum of a recipe's data; print tables, write a figure and the values."""
    from scalewise.planning.figure import plot_spectrum

    check_out(out)
    found = measure_spectrum(recipe, search, count=count, progress=console.progress)
    print_line = partial(console.out.print, soft_wrap=True)
    falls = ", ".join(f"f^{-s.exponent():.2f} in {axis}" for axis, s in found.axes.items())
    print_line(f"{found.latents} latents of {found.spectra.full}; power decreases approximately as {falls}")
    for axis, scales in found.axis_scales.items():
        named = partial(size_along, axis)
        safe = ((named(s), found.safe_from(s)) for s in scales if s != found.spectra.full)
        parts = (f"{s} from t = {t:.0f}" if t is not None else f"{s} never" for s, t in safe)
        print_line(f"Safe in {axis}, margin {search.margin:g}: {', '.join(parts)}")
    table = Table("", "schedule", "tokens", "TFLOPs", "margins", box=None, header_style="bold")
    for rated in found.schedules:
        hidden = " ".join(f"{m:.3g}" for m in rated.margins) or "-"
        tokens, flops = f"{rated.tokens:,}", f"{rated.flops / 1e12:,.3g}"
        table.add_row(
            rated.name, format_rounded(rated.schedule), f"{tokens} ({rated.token_part:.0%})",
            f"{flops} ({rated.flop_part:.0%})", hidden,
        )  # fmt: skip
    console.out.print(table)
    print_line(
        "In brackets: relative to the same number of steps at full scale. Margin: ratio of the noise at the "
        "timestep of a step to the strongest signal missing in its upscaled input; below 1 is unsafe."
    )
    for rated in found.schedules:
        for sentence in rated.advice:
            print_line(f"[yellow]{rated.name}:[/] {sentence}")
    proposed = found.schedules[-1].schedule
    listed = [", ".join(map(str, v)) for v in (proposed.timesteps, proposed.scales)]
    change = f"'schedule.timesteps=[{listed[0]}]' 'schedule.scales=[{listed[1]}]'"
    if recipe.schedule.full_scale:
        change += " schedule.full_scale=false"
    print_line(f"To train with the proposal: {change}")
    if proposed.scales != found.schedules[0].schedule.scales:
        print_line(
            "A synthetic dataset only contains the scales of its recipe: first run `scalewise generate` with "
            "the same overrides."
        )
    make_folder(out)
    write_json(out / "spectrum.json", found)
    figure = plot_spectrum(
        found, panels or proposed.timesteps[1:] or proposed.timesteps, out / "spectrum.png"
    )
    print_line(f"Figure: {escape(str(figure))}; numbers in the same folder.")


def run_bench(recipe: Recipe, samplers: list[str], protocol: Protocol, prompt: str | None, out: Path) -> None:
    """Benchmark samplers; print their times, and measured speed-ups relative to those expected from FLOPs."""
    if prompt is None:
        prompt = read_prompts(None, recipe.model.base, "test")[0] if recipe.model.is_mini else "a cat"
    check_out(out)
    found = measure_speed(recipe, samplers, protocol, caption=prompt, progress=console.progress)
    found.save(out)
    table = Table("", "batch", "text, ms", "denoiser, ms", "vae, ms", "total, ms", "faster", box=None,
                  header_style="bold")  # fmt: skip
    for timing in found.timings:
        parts = [format_ms(timing.parts[p].value) for p in ("text", "denoiser", "vae", TOTAL)]
        faster = format_ratio(timing.speedup.get(TOTAL))
        table.add_row(escape(timing.name), str(timing.batch), *parts, faster)
    console.out.print(table)
    print_line = partial(console.out.print, soft_wrap=True, markup=False)
    for g in found.gains:
        print_line(
            f"batch {g.batch}, denoiser: {g.name} is {format_ratio(g.measured)} faster than {g.over}; "
            f"expected from FLOPs: {g.expected:.3g}x, reached: {g.reached.value:.0%}"
        )
    print_line(f"Milliseconds per image; {found.summary} Results: {out}")


def run_training_bench(recipe: Recipe, *, rounds: int, out: Path) -> None:
    """Measure time and peak memory of training iterations."""
    from scalewise.evaluation.training_cost import measure_training

    check_out(out)
    cost = measure_training(recipe, rounds=rounds, progress=console.progress)
    cost.save(out)
    console.out.print(cost.markdown, highlight=False, soft_wrap=True, markup=False)
    console.out.print(f"Results: {out}", markup=False)


def list_studies() -> None:
    """Print all studies."""
    from scalewise.studies import STUDIES, training_cost

    table = Table(box=None, header_style="bold")
    for heading in ("study", "what it checks", "paper", "students"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "study")
    for study in STUDIES.values():
        students = len({v.overrides for v in study.variants if v.name in study.trained})
        table.add_row(study.name, study.title, study.source, f"{students} per seed")
    table.add_row(training_cost.NAME, training_cost.TITLE, training_cost.SOURCE, "-")
    console.out.print(table)


def run_studies(names: list[str], settings: StudySettings, *, rounds: int, out: Path) -> None:
    """Run studies one after the other; print the verdicts of each and write its page."""
    from scalewise.studies import STUDIES, check_count, run_study, training_cost, write_page

    known = [*STUDIES, training_cost.NAME]
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"Unknown study {unknown[0]!r}; available: {', '.join(known)}.")
    names = list(dict.fromkeys(names))
    if settings.count < MIN_STUDY_PROMPTS:
        raise RecipeError(
            f"{settings.count} prompts are too few to compare students; use --count {MIN_STUDY_PROMPTS} or "
            "more."
        )
    for name in names:
        if name != training_cost.NAME:
            check_count(STUDIES[name], settings.count)
    make_folder(out)
    for name in names:
        if name == training_cost.NAME:
            for text, verdict in training_cost.run_training_cost(
                out, rounds=rounds, progress=console.progress
            ).items():
                console.out.print(f"{name}: {text}: [bold]{verdict}[/]", soft_wrap=True)
            console.out.print(f"Page: {out / name}.md", soft_wrap=True, markup=False)
            continue
        outcome = run_study(STUDIES[name], out, settings, progress=console.progress)
        for claim in outcome.study.claims:
            console.out.print(f"{name}: {claim.text}: [bold]{outcome.verdict(claim.text)}[/]", soft_wrap=True)
        console.out.print(f"Page: {write_page(outcome, out)}", soft_wrap=True, markup=False)

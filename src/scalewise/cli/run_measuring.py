"""What the commands do that tell something: count, judge, time, and print."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from scalewise.cli.inputs import check_out, folder_for, prompts_to_judge, read_prompts
from scalewise.common import console, distributed
from scalewise.common.results import write_json
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.evaluation.sampling_speed import Protocol, measure_speed
from scalewise.evaluation.scoring import ScoringOptions
from scalewise.evaluation.timing import TOTAL, format_ms, format_ratio
from scalewise.method.scales import Scale, ScaleSchedule
from scalewise.metrics import EXTRAS, OWN
from scalewise.planning.schedule_search import SearchOptions, measure_spectrum
from scalewise.studies import Effort

FEWEST_PROMPTS = 50  # of a study


@dataclass(frozen=True)
class Evaluation:
    """How much is drawn, and how."""

    count: int | None
    """Prompts; None = all there are."""
    each: int = 1
    """Samples of every prompt."""
    batch: int = 16
    seed: int = 0
    speed: bool = True


def run_evaluate(
    recipe: Recipe,
    contenders: list[str],
    prompts: Path | None,
    how: Evaluation,
    *,
    scoring: ScoringOptions,
    out: Path,
) -> None:  # fmt: skip
    """Draw and score every contender on the same prompts and seeds."""
    from scalewise.evaluation import compare

    distributed.init_from_env()
    console.set_verbose(distributed.is_main())
    texts = prompts_to_judge(prompts, recipe.model.base, how.count)
    check_out(out)
    outcome = compare.compare(
        recipe,
        contenders,
        texts,
        console.progress,
        each=how.each,
        batch=how.batch,
        seed=how.seed,
        speed=how.speed,
        scoring=scoring,
        out=out,
    )
    if distributed.is_main():
        say = partial(console.out.print, highlight=False, soft_wrap=True, markup=False)
        say(outcome.markdown)
        say(f"The images are in {out / 'pictures'}, the metrics in {out / 'figures.json'} and .md beside it.")
    distributed.shutdown()


def list_metrics() -> None:
    """Print the metrics there are."""
    own = [("(the scorer's)", "", OWN)]
    for extra in EXTRAS.values():
        weights = "none" if extra.source is None else extra.source or "to be named"
        own.append((extra.name, f"; weights: {weights}", extra.metrics))
    say = partial(console.out.print, soft_wrap=True, highlight=False)
    for name, told, metrics in own:  # not in columns, which would cut ids on a narrow screen
        say(f"[bold]{escape(name)}[/]{escape(told)}")
        for metric in metrics:
            say(f"  {escape(metric.title)}: {escape(metric.about)}")


def size_along(axis: str, scale: Scale) -> str:
    """A scale by what differs along an axis."""
    if axis == "space":
        return f"{scale.height}x{scale.width}"
    return f"{scale.frames} frame{'s' if scale.frames > 1 else ''}"


def short(schedule: ScaleSchedule) -> str:
    """Format a schedule with rounded timesteps."""
    return " ".join(f"{step.t:.0f}@{step.scale}" for step in schedule)


def run_spectrum(
    recipe: Recipe, search: SearchOptions, *, panels: tuple[float, ...], count: int, out: Path
) -> None:
    """Measure the spectrum of the data of a recipe; print tables, write figure and numbers."""
    from scalewise.planning.figure import plot_spectrum

    check_out(out)
    found = measure_spectrum(recipe, search, count=count, progress=console.progress)
    say = partial(console.out.print, soft_wrap=True)
    falls = ", ".join(f"f^{-s.exponent():.2f} in {axis}" for axis, s in found.axes.items())
    say(f"{found.latents} latents of {found.spectra.full}; power decreases approximately as {falls}")
    for axis, scales in found.axis_scales.items():
        named = partial(size_along, axis)
        safe = ((named(s), found.safe_from(s)) for s in scales if s != found.spectra.full)
        parts = (f"{s} from t = {t:.0f}" if t is not None else f"{s} never" for s, t in safe)
        say(f"Safe in {axis}, margin {search.margin:g}: {', '.join(parts)}")
    table = Table("", "schedule", "tokens", "TFLOPs", "margins", box=None, header_style="bold")
    for rated in found.schedules:
        hidden = " ".join(f"{m:.3g}" for m in rated.margins) or "-"
        tokens, flops = f"{rated.tokens:,}", f"{rated.flops / 1e12:,.3g}"
        table.add_row(
            rated.name, short(rated.schedule), f"{tokens} ({rated.token_part:.0%})",
            f"{flops} ({rated.flop_part:.0%})", hidden,
        )  # fmt: skip
    console.out.print(table)
    say(
        "In brackets: relative to the same number of steps at full scale. Margin: ratio of the noise at the "
        "timestep of a step to the strongest signal missing in its upscaled input; below 1 is unsafe."
    )
    for rated in found.schedules:
        for sentence in rated.advice:
            say(f"[yellow]{rated.name}:[/] {sentence}")
    proposed = found.schedules[-1].schedule
    listed = [", ".join(map(str, v)) for v in (proposed.timesteps, proposed.scales)]
    change = f"'schedule.timesteps=[{listed[0]}]' 'schedule.scales=[{listed[1]}]'"
    if recipe.schedule.full_scale:
        change += " schedule.full_scale=false"
    say(f"To train with the proposal: {change}")
    if proposed.scales != found.schedules[0].schedule.scales:
        say("A synthetic dataset only contains the scales of its recipe: first run `scalewise generate` with "
            "the same overrides.")  # fmt: skip
    folder_for(out)
    write_json(out / "spectrum.json", found)
    figure = plot_spectrum(
        found, panels or proposed.timesteps[1:] or proposed.timesteps, out / "spectrum.png"
    )
    say(f"Figure: {escape(str(figure))}; numbers in the same folder.")


def run_bench(
    recipe: Recipe, contenders: list[str], protocol: Protocol, prompt: str | None, out: Path
) -> None:
    """Time the contenders in turns and print what came out beside what the operations promise."""
    if prompt is None:
        prompt = read_prompts(None, recipe.model.base, "test")[0] if recipe.model.is_mini else "a cat"
    check_out(out)
    found = measure_speed(recipe, contenders, protocol, caption=prompt, progress=console.progress)
    found.save(out)
    table = Table("", "batch", "text, ms", "denoiser, ms", "vae, ms", "total, ms", "faster", box=None,
                  header_style="bold")  # fmt: skip
    for timing in found.timings:
        parts = [format_ms(timing.parts[p].value) for p in ("text", "denoiser", "vae", TOTAL)]
        faster = format_ratio(timing.speedup.get(TOTAL))
        table.add_row(escape(timing.name), str(timing.batch), *parts, faster)
    console.out.print(table)
    say = partial(console.out.print, soft_wrap=True, markup=False)
    for g in found.gains:
        say(f"batch {g.batch}, denoiser: {g.name} {format_ratio(g.measured)} faster than {g.over}, of "
            f"{g.expected:.3g}x by operations: {g.reached.value:.0%} reached")  # fmt: skip
    say(f"Milliseconds per image; {found.summary} All in {out}")


def run_training_bench(recipe: Recipe, *, rounds: int, out: Path) -> None:
    """Time and weigh training iterations."""
    from scalewise.evaluation.training_cost import measure_training

    check_out(out)
    cost = measure_training(recipe, rounds=rounds, progress=console.progress)
    cost.save(out)
    console.out.print(cost.markdown, highlight=False, soft_wrap=True, markup=False)
    console.out.print(f"All in {out}", markup=False)


def list_studies() -> None:
    """Print the studies there are."""
    from scalewise.studies import STUDIES, training_cost

    table = Table(box=None, header_style="bold")
    for heading in ("study", "what it checks", "paper", "students"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "study")
    for study in STUDIES.values():
        trained = len({arm.overrides for arm in study.arms if not arm.contender and not arm.start})
        table.add_row(study.name, study.title, study.source, f"{trained} a seed")
    table.add_row(training_cost.NAME, training_cost.TITLE, training_cost.SOURCE, "-")
    console.out.print(table)


def run_studies(names: list[str], effort: Effort, *, rounds: int, out: Path) -> None:
    """Run studies one after the other; each ends with its verdicts and a page."""
    from scalewise.studies import STUDIES, refuse_count, run_study, training_cost, write_page

    known = [*STUDIES, training_cost.NAME]
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"There is no study {unknown[0]!r}; there are {', '.join(known)}.")
    names = list(dict.fromkeys(names))
    if effort.count < FEWEST_PROMPTS:
        raise RecipeError(
            f"{effort.count} prompts tell students too badly apart; give --count {FEWEST_PROMPTS} or more."
        )
    for name in names:
        if name != training_cost.NAME:
            refuse_count(STUDIES[name], effort.count)
    folder_for(out)
    for name in names:
        if name == training_cost.NAME:
            for text, verdict in training_cost.run_cost(
                out, rounds=rounds, progress=console.progress
            ).items():
                console.out.print(f"{name}: {text}: [bold]{verdict}[/]", soft_wrap=True)
            console.out.print(f"The page is {out / name}.md", soft_wrap=True, markup=False)
            continue
        outcome = run_study(STUDIES[name], out, effort, progress=console.progress)
        for claim in outcome.study.claims:
            console.out.print(f"{name}: {claim.text}: [bold]{outcome.verdict(claim.text)}[/]", soft_wrap=True)
        console.out.print(f"The page is {write_page(outcome, out)}", soft_wrap=True, markup=False)

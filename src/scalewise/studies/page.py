"""Page of a study: claims with verdicts, metrics by variant, a plot, and the differences from the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scalewise.common import markdown
from scalewise.common.checkpoint import write_atomically
from scalewise.common.results import write_json, write_text
from scalewise.data.shards import exclusive
from scalewise.metrics import METRICS, Interval
from scalewise.studies.base import Claim, Finding
from scalewise.studies.run import Outcome

METHOD = (
    "Metrics are means over seeds; every seed has its own images for all prompts. Intervals of metrics are "
    "over prompts. A gain is how much better the first variant is than the second. Its 95% interval is over "
    "prompts and, where students are trained, also over trainings: the squares of two half-widths are added, "
    "t(prompts - 1) times the standard error over prompts and t(seeds - 1) times the standard error over "
    "seeds. In each metric, a claim is reproduced if the whole interval supports it, not reproduced if the "
    "whole interval supports the opposite, and undecided otherwise. If the metrics disagree, the claim is "
    "undecided. There is no correction for the number of claims."
)
TOLERANCE = (
    " Where a variant may lose something, the interval that decides is that of the margin, which is the gain "
    "plus the allowed loss (both are uncertain). The claim is undecided if the two variants that define "
    "the allowed loss may be equal."
)
TOKENS = (
    "Tokens: image tokens processed by the denoiser per image, summed over all steps; guidance counts twice."
    "\n"
)
COLOR = "#2b6cb0"


def write_page(outcome: Outcome, folder: Path) -> Path:
    """Write <study>.json, .md and .png into a folder, one process at a time; return the path of the page."""
    name = outcome.study.name
    with exclusive(folder / "locks" / name):
        write_json(folder / f"{name}.json", outcome)
        write_atomically(folder / f"{name}.png", partial(plot, outcome))
        write_text(folder / f"{name}.md", format_page(outcome))
    return folder / f"{name}.md"


def format_page(outcome: Outcome) -> str:
    """Return the page in markdown."""
    study, settings = outcome.study, outcome.settings
    seeds = " ".join(f"--seed {seed}" for seed in settings.seeds)
    iterations = f" --iterations {settings.iterations}" if settings.iterations is not None else ""
    parts = [
        f"# {study.title}\n\nPaper: {study.source}.\n",
        f"    scalewise study {study.name} {seeds} --count {settings.count}{iterations}\n",
        claims_table(outcome),
        metrics_table(outcome),
        f"![metrics by variant]({study.name}.png)\n",
        *([TOKENS] if outcome.tokens else []),
        f"Prompts: {settings.count}; seeds: {len(settings.seeds)}, {seeds_note(outcome)}. "
        f"{METHOD}{TOLERANCE if any(c.reference for c in study.claims) else ''}\n",
        f"## Differences from the paper\n{study.differences}{iterations_note(outcome)}\n",
    ]
    return "\n".join(parts)


def iterations_note(outcome: Outcome) -> str:
    """Return a sentence on the number of iterations if it is not that of the recipe."""
    iterations = outcome.settings.iterations
    if iterations is None or outcome.study.starts_from_data:
        return ""
    return f" The students of this page were trained for {iterations} iterations, unlike those of the recipe."


def seeds_note(outcome: Outcome) -> str:
    """Describe what a seed changes."""
    if outcome.study.starts_from_data:
        return "each with its own noise (nothing is trained)"
    return "each with its own training and noise"


def claims_table(outcome: Outcome) -> str:
    """Return a table of claims with verdicts and the gain in each metric."""
    metrics = [METRICS[name] for name in outcome.study.metrics]
    rows = []
    for claim in outcome.study.claims:
        findings = [f for f in outcome.findings if f.claim == claim]
        cells = [gain_cell(next(f for f in findings if f.metric == m.name)) for m in metrics]
        rows.append(
            [f"{claim.text} ({format_comparison(claim)})", f"**{outcome.verdict(claim.text)}**", *cells]
        )
    head = ["claim", "verdict", *(f"gain, {m.title}" for m in metrics)]
    return markdown.table(head, rows, left=len(head)) + "\n"


def format_comparison(claim: Claim) -> str:
    """Return the compared variants and, for "as good", the allowed loss."""
    text = f"{claim.variant} against {claim.other}"
    if claim.reference:
        one, other = claim.reference
        text += f"; may lose {claim.tolerance:.0%} of the difference between {one} and {other}"
    return text


def gain_cell(finding: Finding) -> str:
    """Format a finding, such as "0.0121 [0.0042, 0.0200]; seeds 0.0101 0.0141: reproduced"."""
    show = partial(METRICS[finding.metric].show, finer=1)
    seeds = " ".join(show(value) for value in finding.gain.by_seed)
    allowed = ""
    if finding.reference_gain and finding.margin:
        allowed = ", allowed loss unknown"
        if finding.reference_gain.interval.low > 0:
            margin = finding.margin.interval.show(show)
            allowed = f"; allowed {show(-finding.allowed_loss)}, margin {margin}"
    return f"{finding.gain.interval.show(show)}; seeds {seeds}{allowed}: {finding.verdict}"


def metrics_table(outcome: Outcome) -> str:
    """Return a table of all metrics by variant."""
    stored = next(iter(outcome.values.values()))  # older studies do not have all metrics
    metrics = [METRICS[name] for name in outcome.study.all_metrics if name in stored]
    head = ["variant", *(m.heading for m in metrics), *["tokens"] * bool(outcome.tokens)]
    rows = []
    for variant, values in outcome.values.items():
        cells = [values[m.name].show(m.show) for m in metrics]
        if variant in outcome.tokens:
            cells.append(f"{outcome.tokens[variant]:,}")
        rows.append([variant, *cells])
    return markdown.table(head, rows) + "\n"


def plot(outcome: Outcome, path: Path) -> None:
    """Plot one panel per metric, with one row per variant."""
    variants, panels = list(outcome.values), {}
    for name in outcome.study.all_metrics:
        title = f"{METRICS[name].title}, {METRICS[name].better} is better"
        panels[title] = [outcome.values[variant][name] for variant in variants]
    plot_panels(variants, panels, path)


def plot_panels(rows: Sequence[str], panels: Mapping[str, Sequence[Interval]], path: Path) -> None:
    """Plot panels with shared rows side by side; values are points with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels) + 1.6, 0.42 * len(rows) + 1.1), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, intervals) in zip(axes, panels.items(), strict=True):
        _panel(axis, intervals)
        axis.set_title(title, fontsize=10)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    FigureCanvasAgg(figure).print_png(path)


def _panel(panel: Any, intervals: Sequence[Interval]) -> None:
    for row, interval in enumerate(intervals):
        panel.plot([interval.low, interval.high], [row, row], color=COLOR, linewidth=2)
        panel.plot(interval.value, row, "o", color=COLOR)
    panel.grid(axis="x", alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)

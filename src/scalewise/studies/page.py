"""A study's page: claims with verdicts, figures by arm, a plot, and what differs from the paper."""

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

HOW_JUDGED = (
    "A figure is the mean over seeds, each with images of its own for all prompts; its interval is over "
    "prompts. A gain is by how much the first arm is better than the second. Its interval holds 95 % over "
    "prompts and, where students are trained, over trainings: the squares of its half widths, t(prompts - 1) "
    "times the standard error over prompts and t(seeds - 1) times that over seeds, add up. A claim is "
    "reproduced in a figure if the whole interval says so, not reproduced if all of it says the opposite; it "
    "is decided if all figures say the same. Claims are judged one by one, without allowing for their number."
)
YARDSTICK = (
    " Where an arm may lose something, the interval that decides is that of the gain above what is allowed, "
    "both uncertain; nothing is decided if the two arms that set the measure cannot be told apart."
)
TOKENS = "Tokens: what goes through the denoiser for a picture, in all steps, twice under guidance.\n"
COLOUR = "#2b6cb0"


def write_page(outcome: Outcome, folder: Path) -> Path:
    """Write <study>.json, .md and .png into a folder, by one process at a time; return the page."""
    name = outcome.study.name
    with exclusive(folder / "locks" / name):
        write_json(folder / f"{name}.json", outcome)
        write_atomically(folder / f"{name}.png", partial(plot, outcome))
        write_text(folder / f"{name}.md", page(outcome))
    return folder / f"{name}.md"


def page(outcome: Outcome) -> str:
    """The page in markdown."""
    study, effort = outcome.study, outcome.effort
    seeds = " ".join(f"--seed {seed}" for seed in effort.seeds)
    trained = f" --iterations {effort.iterations}" if effort.iterations is not None else ""
    parts = [
        f"# {study.title}\n\nPaper: {study.source}.\n",
        f"    scalewise study {study.name} {seeds} --count {effort.count}{trained}\n",
        claims_table(outcome),
        figures_table(outcome),
        f"![figures by arm]({study.name}.png)\n",
        *([TOKENS] if outcome.tokens else []),
        f"Seeds: {len(effort.seeds)}, {seeds_of(outcome)}; prompts: "
        f"{effort.count}. {HOW_JUDGED}{YARDSTICK if any(c.yardstick for c in study.claims) else ''}\n",
        f"## What differs from the paper\n{study.differs}{fewer(outcome)}\n",
    ]
    return "\n".join(parts)


def fewer(outcome: Outcome) -> str:
    """What is to say of students that were not trained as the recipe says."""
    iterations = outcome.effort.iterations
    if iterations is None or outcome.study.continues:
        return ""
    return f" Students of this page were trained for {iterations} iterations, not as many as the recipe has."


def seeds_of(outcome: Outcome) -> str:
    """What a seed decides."""
    if outcome.study.continues:
        return "each of the noise; nothing is trained"
    return "each of a student and of its noise"


def claims_table(outcome: Outcome) -> str:
    """Every claim with its verdict, and the gain in every figure."""
    metrics = [METRICS[name] for name in outcome.study.metrics]
    rows = []
    for claim in outcome.study.claims:
        own = [f for f in outcome.findings if f.claim == claim]
        cells = [gain_cell(next(f for f in own if f.metric == m.name)) for m in metrics]
        rows.append([f"{claim.text} ({terms(claim)})", f"**{outcome.verdict(claim.text)}**", *cells])
    head = ["claim", "verdict", *(f"gain, {m.title}" for m in metrics)]
    return markdown.table(head, rows, left=len(head)) + "\n"


def terms(claim: Claim) -> str:
    """Which arms are compared, and what "as good" allows."""
    terms = f"{claim.arm} against {claim.other}"
    if claim.yardstick:
        terms += f"; may lose {claim.tolerance:.0%} of what lies between {' and '.join(claim.yardstick)}"
    return terms


def gain_cell(finding: Finding) -> str:
    """Such as "0.0121 [0.0042, 0.0200]; seeds 0.0101 0.0141: reproduced"."""
    show = partial(METRICS[finding.metric].show, finer=1)
    seeds = " ".join(show(value) for value in finding.gain.by_seed)
    allowed = ""
    if finding.stake and finding.leeway:
        allowed = ", measure undecided"
        if finding.stake.interval.low > 0:
            above = finding.leeway.interval.show(show)
            allowed = f", allowed {show(-finding.allowed)}; above it by {above}"
    return f"{finding.gain.interval.show(show)}; seeds {seeds}{allowed}: {finding.verdict}"


def figures_table(outcome: Outcome) -> str:
    """Every arm's figures."""
    there = next(iter(outcome.figures.values()))  # a stored study may be older than a figure
    metrics = [METRICS[name] for name in outcome.study.figures if name in there]
    head = ["arm", *(m.heading for m in metrics), *["tokens"] * bool(outcome.tokens)]
    rows = []
    for arm, values in outcome.figures.items():
        cells = [values[m.name].show(m.show) for m in metrics]
        if arm in outcome.tokens:
            cells.append(f"{outcome.tokens[arm]:,}")
        rows.append([arm, *cells])
    return markdown.table(head, rows) + "\n"


def plot(outcome: Outcome, path: Path) -> None:
    """A panel for every figure, the arms below each other with their intervals."""
    arms, panels = list(outcome.figures), {}
    for name in outcome.study.figures:
        title = f"{METRICS[name].title}, {METRICS[name].better} is better"
        panels[title] = [outcome.figures[arm][name] for arm in arms]
    plot_panels(arms, panels, path)


def plot_panels(rows: Sequence[str], panels: Mapping[str, Sequence[Interval]], path: Path) -> None:
    """Values of the same rows side by side, a panel for every title, as points with their intervals."""
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
        panel.plot([interval.low, interval.high], [row, row], color=COLOUR, linewidth=2)
        panel.plot(interval.value, row, "o", color=COLOUR)
    panel.grid(axis="x", alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)

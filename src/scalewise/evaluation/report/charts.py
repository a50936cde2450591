"""Plot a training log as inline SVG with the light or dark colors of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from markupsafe import Markup

from scalewise.evaluation.report.findings import first_and_last

# Placeholder colors for matplotlib, replaced by CSS styles so that one plot fits both themes.
INK, GRID = "#00000b", "#00000c"
SERIES = tuple(f"#0000{i}a" for i in range(1, 7))
_STYLES = {
    INK: "currentColor",
    GRID: "var(--line)",
    **{c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)},
}
WIDTH, HEIGHT = 4.6, 2.5  # inches of 72 pixels

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("MMD", ("mmd",)),
    ("DMD", ("dmd",)),
    ("GAN, student", ("gan",)),
    ("Denoising, fake model", ("fake/denoising",)),
    ("Discriminator", ("fake/discriminator",)),
    ("Mean and std of x0", ("x0/mean", "x0/std")),
    ("Share of x0 beyond 4 sigma", ("x0/beyond_4_sigma",)),
    ("Gradients of the terms in x0", ("mmd/gradient_norm", "dmd/gradient_norm", "gan/gradient_norm")),
    ("Gradient norms", ("student/gradient_norm", "fake/gradient_norm")),
)
_BY_STEP = {"mmd", "dmd", "gan"}  # values that depend on the schedule step of their row


@dataclass(frozen=True)
class Chart:
    """A panel: its title, a text description and the SVG."""

    title: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One curve: iterations, values and label."""

    x: np.ndarray
    y: np.ndarray
    label: str


def training_charts(log: Sequence[Mapping[str, Any]], schedule: Sequence[str]) -> list[Chart]:
    """Return a panel for each logged term; terms of the student have a line for each schedule step."""
    charts = []
    for title, keys in PANELS:
        lines = [line for key in keys for line in lines_of(log, key, schedule, several=len(keys) > 1)]
        if lines:
            charts.append(Chart(title, describe(title, log, keys), Markup(plot(lines, name=title))))
    return charts


def lines_of(
    log: Sequence[Mapping[str, Any]], key: str, schedule: Sequence[str], *, several: bool = False
) -> list[Line]:
    """Return the curves of a logged value: one, or one for each schedule step."""
    rows = [row for row in log if key in row]
    if len(rows) < 2:
        return []
    steps = sorted({int(row["step"]) for row in rows if "step" in row}) if key in _BY_STEP else []
    if len(steps) < 2:
        return [_line(rows, key, key.removeprefix("x0/").removesuffix("/gradient_norm") if several else "")]
    groups = [(step, [row for row in rows if row.get("step") == step]) for step in steps]
    names = {step: schedule[step] if step < len(schedule) else f"step {step + 1}" for step in steps}
    return [_line(group, key, names[step]) for step, group in groups if len(group) > 1]


def _line(rows: Sequence[Mapping[str, Any]], key: str, label: str) -> Line:
    pairs = np.array([(float(row["iteration"]), float(row[key])) for row in rows])
    return Line(pairs[:, 0], pairs[:, 1], label)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centered moving mean [N] of values [N] over about a twentieth of the curve."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def describe(title: str, log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Describe the curves in words for screen readers."""
    parts = []
    for key in keys:
        if ends := first_and_last(log, key):
            parts.append(
                f"{key} from {ends[0]:.3g} in the first tenth of training to {ends[1]:.3g} in the last"
            )
    return f"{title} over the iterations" + (": " + "; ".join(parts) if parts else "")


def plot(lines: Sequence[Line], *, name: str) -> str:
    """Plot curves as SVG, with the raw values faint behind the smoothed ones."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The salt gives each plot of a page different ids, which are the same in every run.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.color": INK}
    ):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            color = SERIES[i % len(SERIES)]
            axes.plot(line.x, line.y, color=color, linewidth=0.7, alpha=0.28)
            axes.plot(line.x, smooth(line.y), color=color, linewidth=1.8, label=line.label)
        _style(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if len(lines) > 1:
            columns = len(lines) if len(lines) < 4 else ceil(len(lines) / 2)
            figure.legend(
                loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=1.2,
                columnspacing=1.2, borderpad=0.2,
            )  # fmt: skip
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return to_inline(text.getvalue())


def _style(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.figure.patch.set_alpha(0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_xlabel("iteration", color=INK, fontsize=9)
    axes.margins(x=0.01)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def to_inline(svg: str) -> str:
    """Remove the parts of an SVG file that an inline element does not need, and insert CSS colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    for color, style in _STYLES.items():
        svg = svg.replace(color, style)
    return svg.strip()

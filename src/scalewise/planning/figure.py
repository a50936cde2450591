"""The figure of a spectral survey: power of clean latents, noise and noisy latents at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalewise.method.spectrum import weights

if TYPE_CHECKING:
    from scalewise.planning.schedule_search import Survey

CLEAN, NOISE, NOISY = "#7b3fb5", "#2b6cb0", "#dd6b20"
SAFE, UNSAFE = "#2f9e44", "#e03131"
PANEL = 3.1  # inches
MOST_COLUMNS = 5


def draw_survey(survey: Survey, levels: Sequence[float], path: Path) -> Path:
    """Write a PNG with a row for each axis and a panel for each noise level in [0, 1000]; return its path.

    Vertical lines stand where the schedules' scales end: what lies right of one, that scale cannot hold.
    Green: where the noise exceeds the signal by the margin, so that a scale may leave it out. Red: where it
    does not, so that a scale has to hold it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(levels), MOST_COLUMNS)
    lines = [(a, levels[i : i + columns]) for a in survey.axes for i in range(0, len(levels), columns)]
    figure = Figure(figsize=(PANEL * columns + 0.6, PANEL * len(lines) + 1.2), layout="constrained", dpi=110)
    grid = figure.subplots(len(lines), columns, squeeze=False, sharey="row")
    for row, (axis, some) in zip(grid, lines, strict=True):
        unit = "side" if axis == "space" else "clip"
        row[0].set_ylabel(f"power, {axis}")
        for panel, t in zip_longest(row, some):
            if t is None:
                panel.set_visible(False)
                continue
            _panel(panel, survey, axis, t)
            panel.set_xlabel(f"frequency, cycles a {unit}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    beside = max(1, 2 * columns - 1)  # so that the names fit into the width
    figure.legend(handles, labels, loc="outside upper center", ncols=beside, frameon=False, fontsize=9)
    FigureCanvasAgg(figure).print_png(path)
    return path


def _panel(panel: Any, survey: Survey, axis: str, t: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    spectrum, number = survey.axes[axis], list(survey.axes).index(axis)
    full = survey.spectra.full
    cells = min(full.size) if axis == "space" else full.frames
    x = spectrum.frequency * cells
    alpha, sigma = weights(survey.noise, t)
    panel.loglog(x, spectrum.power, color=CLEAN, label="clean latents")
    panel.axhline(1.0, color=NOISE, label="noise")
    panel.loglog(
        x, alpha**2 * spectrum.power, color=CLEAN, linestyle="--", linewidth=1, label="their part at t"
    )
    panel.axhline(sigma**2, color=NOISE, linestyle="--", linewidth=1, label="its part at t")
    panel.loglog(x, survey.noisy(axis, t), color=NOISY, label="noisy latents")
    safe = survey.smallest_safe(axis, t)
    edge = survey.hidden_from(axis, t) * cells
    left, right = 1.0, cells / 2
    panel.axvspan(max(edge, left), right, color=SAFE, alpha=0.15, linewidth=0, label="hidden by the noise")
    panel.axvspan(left, max(edge, left), color=UNSAFE, alpha=0.10, linewidth=0, label="needed")
    used = {scale for judged in survey.schedules for scale in judged.schedule.scales}
    shown = {survey.spectra.limits(scale)[number]: scale for scale in sorted(used)}
    for limit, scale in shown.items():
        panel.axvline(limit * cells, color="#555", linewidth=0.7, linestyle=":")
        name = str(scale.frames if axis == "time" else min(scale.size))
        panel.annotate(
            name, (limit * cells, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom"
        )
    panel.set_title(f"t = {t:.4g}, safe from {_short(safe, axis)}", fontsize=10, pad=12)
    panel.set_xlim(left, right)
    panel.xaxis.set_major_locator(LogLocator(2))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.25, linewidth=0.5)


def _short(scale: Any, axis: str) -> str:
    return f"{scale.frames} frames" if axis == "time" else f"{scale.height}x{scale.width}"

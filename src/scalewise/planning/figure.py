"""Figure of a spectrum: power of clean latents, noise and noisy latents at each timestep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalewise.method.spectrum import weights

if TYPE_CHECKING:
    from scalewise.planning.schedule_search import SpectrumReport

CLEAN, NOISE, NOISY = "#7b3fb5", "#2b6cb0", "#dd6b20"
SAFE, UNSAFE = "#2f9e44", "#e03131"
PANEL = 3.1  # inches
MOST_COLUMNS = 5


def plot_spectrum(report: SpectrumReport, timesteps: Sequence[float], path: Path) -> Path:
    """Write a PNG with a row per axis and a panel per timestep in [0, 1000]; return its path.

    Vertical lines mark the highest frequency that each scale of the schedules can represent. Green: the noise
    exceeds the signal by the margin, so a scale may drop these frequencies. Red: it does not.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(timesteps), MOST_COLUMNS)
    lines = [(a, timesteps[i : i + columns]) for a in report.axes for i in range(0, len(timesteps), columns)]
    figure = Figure(figsize=(PANEL * columns + 0.6, PANEL * len(lines) + 1.2), layout="constrained", dpi=110)
    grid = figure.subplots(len(lines), columns, squeeze=False, sharey="row")
    for row, (axis, some) in zip(grid, lines, strict=True):
        unit = "side" if axis == "space" else "clip"
        row[0].set_ylabel(f"power, {axis}")
        for panel, t in zip_longest(row, some):
            if t is None:
                panel.set_visible(False)
                continue
            _panel(panel, report, axis, t)
            panel.set_xlabel(f"frequency, cycles per {unit}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    legend_columns = max(1, 2 * columns - 1)  # so that the legend fits the width
    figure.legend(
        handles, labels, loc="outside upper center", ncols=legend_columns, frameon=False, fontsize=9
    )
    FigureCanvasAgg(figure).print_png(path)
    return path


def _panel(panel: Any, report: SpectrumReport, axis: str, t: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    spectrum, number = report.axes[axis], list(report.axes).index(axis)
    full = report.spectra.full
    cells = min(full.size) if axis == "space" else full.frames
    x = spectrum.frequency * cells
    alpha, sigma = weights(report.noise, t)
    panel.loglog(x, spectrum.power, color=CLEAN, label="clean latents")
    panel.axhline(1.0, color=NOISE, label="noise")
    panel.loglog(
        x,
        alpha**2 * spectrum.power,
        color=CLEAN,
        linestyle="--",
        linewidth=1,
        label="clean latents, scaled by alpha(t)",
    )
    panel.axhline(sigma**2, color=NOISE, linestyle="--", linewidth=1, label="noise, scaled by sigma(t)")
    panel.loglog(x, report.noisy(axis, t), color=NOISY, label="noisy latents")
    safe = report.smallest_safe(axis, t)
    edge = report.noise_cutoff(axis, t) * cells
    left, right = 1.0, cells / 2
    panel.axvspan(max(edge, left), right, color=SAFE, alpha=0.15, linewidth=0, label="hidden by noise")
    panel.axvspan(left, max(edge, left), color=UNSAFE, alpha=0.10, linewidth=0, label="needed")
    used = {scale for rated in report.schedules for scale in rated.schedule.scales}
    shown = {report.spectra.limits(scale)[number]: scale for scale in sorted(used)}
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

"""Render a report with the template page.html.j2, which escapes all text."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.report import ReportContent
from scalewise.evaluation.report.charts import training_charts
from scalewise.evaluation.report.findings import duration, findings, milliseconds, timing_of
from scalewise.evaluation.report.images import embed, zoom
from scalewise.metrics import METRICS, Interval, Metric

HERE = Path(__file__).parent
CONTENT_WIDTH, NAMES_WIDTH, GAP = 1180, 108, 6
PARTS = {"text": "text encoder", "denoiser": "denoiser", "vae": "VAE"}
TILES = ("prompt_match", "frechet")
"""Metrics shown at the top of the page."""


def render(content: ReportContent) -> str:
    """Render the HTML document."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    metrics = [m for m in METRICS.values() if any(m.name in row.values for row in content.rows)]
    return environment.get_template("page.html.j2").render(
        content=content,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        tiles=tiles(content),
        side=zoom(content.columns[0].images[0])[0] if content.prompts and content.columns else 0,
        bands=bands(content),
        metrics=metrics,
        headings=[heading(metric) for metric in metrics],
        ranges={metric.name: range_of(content.rows, metric.name) for metric in metrics},
        parts=PARTS,
        findings=findings(content),
        charts=training_charts(content.log, content.schedule),
        **{helper.__name__: helper for helper in (duration, embed, milliseconds, positions, zip, zoom)},
    )


def tiles(content: ReportContent) -> list[tuple[str, str]]:
    """Return the measured key numbers as (value, description)."""
    found = []
    batches = list(dict.fromkeys(timing.batch for timing in content.timings))
    for batch in batches[:1] + batches[1:][-1:]:
        timing = timing_of(content, content.student, batch)
        if timing and "total" in timing.speedup:
            about = f"speed-up over {content.teacher}, caption to pixels, batch size {batch}"
            found.append((f"{timing.speedup['total'].value:.1f}×", about))
    rows = {row.name: row.values for row in content.rows}
    ours, theirs = rows.get(content.student, {}), rows.get(content.teacher, {})
    for name, metric in METRICS.items():
        if name in TILES and name in ours and name in theirs:
            other = metric.show(theirs[name].value)
            about = f"{metric.title} of {content.student} ({content.teacher}: {other})"
            found.append((metric.show(ours[name].value), about))
    return found


def bands(content: ReportContent) -> list[range]:
    """Split the prompts into rows of about equal length."""
    if not content.columns or not content.prompts:
        return []
    width = zoom(content.columns[0].images[0])[0]
    fit = max(1, (CONTENT_WIDTH - NAMES_WIDTH) // (width + GAP))
    count = len(content.prompts)
    each = ceil(count / ceil(count / fit))
    return [range(start, min(start + each, count)) for start in range(0, count, each)]


def heading(metric: Metric) -> Markup:
    """Return the column heading of a metric."""
    return Markup("{}<small>{} is better</small>").format(metric.title, metric.better)


def range_of(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the smallest and largest number in the column of a metric."""
    found = [row.values[name] for row in rows if name in row.values]
    numbers = [n for f in found for n in ((f.low, f.value, f.high) if f.known else (f.value,))]
    return min(numbers), max(numbers)


def positions(found: Interval, bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Return the low end, value and high end of an interval as percentages between the bounds."""
    start, span = bounds[0], (bounds[1] - bounds[0]) or 1.0
    low, value, high = (100 * (x - start) / span for x in (found.low, found.value, found.high))
    return low, value, high

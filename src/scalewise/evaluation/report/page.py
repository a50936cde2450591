"""Render a report with the template page.html.j2, which escapes all text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.report import ReportContent
from scalewise.evaluation.report.charts import training_charts
from scalewise.evaluation.report.findings import duration, findings, milliseconds, timing_of
from scalewise.evaluation.report.images import embed
from scalewise.metrics import METRICS, Interval, Metric

HERE = Path(__file__).parent
PARTS = {"text": "text encoder", "denoiser": "denoiser", "vae": "VAE"}
TILES = (("scene_match", "prompt_match"), ("frechet",))
"""Metrics shown at the top of the page: of each group the first that was measured."""
FINAL_WIDTH = 256
"""Width of the last image of a step sequence; the earlier ones are smaller in proportion to their scale."""


class Tile(NamedTuple):
    """A key number: the value, its 95% interval ("" if unknown) and a description."""

    value: str
    interval: str
    about: str


def render(content: ReportContent) -> str:
    """Render the HTML document."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        content=content,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        tiles=tiles(content),
        columns=sorted(content.columns, key=lambda column: column.kind != "render"),
        tables=metric_tables(content.rows),
        parts=PARTS,
        findings=findings(content),
        charts=training_charts(content.log, content.schedule),
        final_width=FINAL_WIDTH,
        **{f.__name__: f for f in (duration, embed, headings, milliseconds, positions, range_of, zip)},
    )


def tiles(content: ReportContent) -> list[Tile]:
    """Return the measured key numbers of the student: speed-ups and metrics."""
    found = []
    batches = list(dict.fromkeys(timing.batch for timing in content.timings))
    for batch in batches[:1] + batches[1:][-1:]:
        timing = timing_of(content, content.student, batch)
        if timing and (ratio := timing.speedup.get("total")):
            about = f"speed-up over {content.teacher}, caption to pixels, batch size {batch}"
            interval = f"95% interval {ratio.low:.1f} to {ratio.high:.1f}" if ratio.known else ""
            found.append(Tile(f"{ratio.value:.1f}×", interval, about))
    rows = {row.name: row.values for row in content.rows}
    ours, theirs = rows.get(content.student, {}), rows.get(content.teacher, {})
    for names in TILES:
        name = next((name for name in names if name in ours and name in theirs), None)
        if name is None:
            continue
        metric, value = METRICS[name], ours[name]
        about = (
            f"{metric.title} of {content.student}, {metric.better} is better "
            f"({content.teacher}: {theirs[name].show(metric.show)})"
        )
        interval = (
            f"95% interval {metric.show(value.low)} to {metric.show(value.high)}" if value.known else ""
        )
        found.append(Tile(metric.show(value.value), interval, about))
    return found


def metric_tables(rows: Sequence[Row]) -> list[tuple[str, list[Metric]]]:
    """Return the measured metrics by group, as (heading, metrics); those without a group come first."""
    measured = [metric for metric in METRICS.values() if any(metric.name in row.values for row in rows)]
    names = list(dict.fromkeys(["", *(metric.group for metric in measured)]))
    by_group = sorted(measured, key=lambda metric: names.index(metric.group))
    return [(group, list(members)) for group, members in groupby(by_group, key=lambda metric: metric.group)]


def headings(metrics: Sequence[Metric]) -> list[Markup]:
    """Return the column headings of metrics."""
    return [Markup("{}<small>{} is better</small>").format(m.title, m.better) for m in metrics]


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

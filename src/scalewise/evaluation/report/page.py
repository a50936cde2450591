"""The page of a report, section by section; everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from scalewise.evaluation.report import Column, Journey, ReportContent
from scalewise.evaluation.report.charts import training_charts
from scalewise.evaluation.report.images import embed, zoom
from scalewise.evaluation.report.words import duration, findings, milliseconds, show, timing_of

STYLE = Path(__file__).with_name("style.css")
# Nothing may be fetched, whatever a caption or a recipe contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CONTENT_WIDTH, NAMES_WIDTH, GAP = 1180, 108, 6
PARTS = {"text": "text encoder", "denoiser": "denoiser", "vae": "VAE"}


def page(content: ReportContent) -> str:
    """The whole document."""
    sections = "\n".join(part for part in (build(content) for build in SECTIONS) if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(content.title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{header(content)}
{sections}
</main>
<footer>Made by scalewise{escape(_version(content))}. This file holds everything that it shows.</footer>
</body>
</html>
"""


def _version(content: ReportContent) -> str:
    version = content.versions.get("scalewise-diffusion", "")
    return f" {version}" if version else ""


def section(title: str, lead: str, *body: str) -> str:
    """A section with a heading and a sentence that says what is seen."""
    said = f'<p class="about">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}\n" + "\n".join(body) + "\n</section>"


def header(content: ReportContent) -> str:
    """Title, summary, and the few numbers that matter most."""
    shown = "".join(
        f"<li><strong>{escape(value)}</strong><span>{escape(about)}</span></li>"
        for value, about in tiles(content)
    )
    return (
        f'<header>\n<p class="eyebrow">scale-wise distillation</p>\n<h1>{escape(content.title)}</h1>\n'
        f'<p class="summary">{escape(content.summary)}</p>\n'
        + (f'<ul class="tiles">{shown}</ul>\n' if shown else "")
        + "</header>"
    )


def tiles(content: ReportContent) -> list[tuple[str, str]]:
    """Key figures as (value, what it is), as far as they were measured."""
    found = []
    batches = list(dict.fromkeys(int(t["batch"]) for t in content.timings))
    for batch in batches[:1] + batches[1:][-1:]:
        timing = timing_of(content, content.student, batch)
        if timing and "total" in timing["speedup"]:
            about = f"as fast as {content.teacher}, caption to pixels, batch size {batch}"
            found.append((f"{timing['speedup']['total'][0]:.1f}×", about))
    rows = {row["name"]: row["values"] for row in content.figures}
    ours, theirs = rows.get(content.student, {}), rows.get(content.teacher, {})
    for metric in content.metrics:
        name = metric["name"]
        if name in ("prompt_match", "frechet") and name in ours and name in theirs:
            about = (
                f"{metric['title']} of {content.student}; {content.teacher} {show(metric, theirs[name][0])}"
            )
            found.append((show(metric, ours[name][0]), about))
    return found


def side_by_side(content: ReportContent) -> str:
    """Every contender's picture of the same prompts from the same seeds."""
    if not content.columns or not content.prompts:
        return ""
    width = zoom(content.columns[0].images[0])[0]
    fit = max(1, (CONTENT_WIDTH - NAMES_WIDTH) // (width + GAP))
    count = len(content.prompts)
    each = ceil(count / ceil(count / fit))  # bands of about equal length
    bands = [_band(content, range(start, min(start + each, count)), width) for start in range(0, count, each)]
    lead = "All draw the same prompts from the same seeds."
    return section("Side by side", lead, *bands)


def _band(content: ReportContent, chosen: Iterable[int], width: int) -> str:
    names = "".join(
        f"<div><b>{escape(column.name)}</b><small>{escape(column.about)}</small></div>"
        for column in content.columns
    )
    figures = "".join(_compared(content.columns, content.prompts[i], i) for i in chosen)
    names = f'<div class="names" aria-hidden="true">{names}</div>'
    return f'<div class="band" style="--side:{width}px">{names}{figures}</div>'


def _compared(columns: Sequence[Column], prompt: str, number: int) -> str:
    cells = "".join(
        f"<div>{embed(column.images[number], alt=f'{prompt}, drawn by {column.name}')}"
        f"<small>{escape(column.name)}</small></div>"
        for column in columns
    )
    return f'<figure><div class="cells">{cells}</div><figcaption>{escape(prompt)}</figcaption></figure>'


def growth(content: ReportContent) -> str:
    """The student's x0 at every scale, at its own size."""
    if not content.journeys:
        return ""
    shown = "".join(_journey(journey) for journey in content.journeys)
    lead = (
        "What the student believes the finished picture to be after each step, decoded at the size of that "
        "step. Early steps are small, so they cost little."
    )
    return section("How a picture grows", lead, f'<div class="journeys">{shown}</div>')


def _journey(journey: Journey) -> str:
    pairs = zip(journey.pictures, journey.labels, strict=True)
    steps = "".join(_grown(picture, label, journey.prompt) for picture, label in pairs)
    caption = f"<figcaption>{escape(journey.prompt)}</figcaption>"
    return f'<figure class="journey"><div>{steps}</div>{caption}</figure>'


def _grown(picture: np.ndarray, label: str, prompt: str) -> str:
    height, width = picture.shape[:2]
    image = embed(picture, alt=f"{prompt}, {width} by {height} pixels, {label}", smallest=1)
    lines = "<br>".join(escape(part) for part in [f"{width} px", *label.split(", ")])
    return f'<div style="--side:{zoom(picture, 1)[0]}">{image}<small>{lines}</small></div>'


def quality(content: ReportContent) -> str:
    """The table of figures with their intervals."""
    metrics = [m for m in content.metrics if any(m["name"] in row["values"] for row in content.figures)]
    if not metrics:
        return ""
    head = "".join(
        f'<th scope="col">{escape(metric["title"])}<small>{metric["better"]} is better</small></th>'
        for metric in metrics
    )
    ranges = {metric["name"]: _range(content.figures, metric["name"]) for metric in metrics}
    rows = "".join(_row(row, metrics, ranges) for row in content.figures)
    about = "; ".join(f"<b>{escape(m['title'])}</b>: {escape(m['about'])}" for m in metrics)
    lead = (
        "Brackets hold 95% intervals over prompts. “Better” and “worse” are said where the 95% interval of "
        f"the paired difference to {escape(content.teacher)}, over the same prompts and seeds, excludes 0."
    )
    table = _table("Quality", f"<tr><td></td>{head}</tr>", rows)
    return section("Quality", lead, table, f'<p class="fine">{about}.</p>')


def _row(
    row: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], ranges: Mapping[str, tuple[float, float]]
) -> str:
    cells = "".join(_figure(row, metric, ranges[metric["name"]]) for metric in metrics)
    about = f"{escape(row['about'])}; {row['images']:,} pictures"
    name = f'<th scope="row">{escape(row["name"])}<small>{about}</small></th>'
    return f'<tr class="{escape(row["kind"])}">{name}{cells}</tr>'


def _range(figures: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    found = [value for row in figures if name in row["values"] for value in row["values"][name]]
    bounds = [value for value in found if value is not None]
    return min(bounds), max(bounds)


def _figure(row: Mapping[str, Any], metric: Mapping[str, Any], bounds: tuple[float, float]) -> str:
    if metric["name"] not in row["values"]:
        return '<td class="none">–</td>'
    value, low, high = row["values"][metric["name"]]
    if low is None or high is None:  # too few prompts for an interval
        return f"<td><strong>{show(metric, value)}</strong></td>"
    start, span = bounds[0], (bounds[1] - bounds[0]) or 1.0
    left, middle, right = (100 * (x - start) / span for x in (low, value, high))
    whisker = (
        f'<span class="track" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
        f'<b style="left:{middle:.1f}%"></b></span>'
    )
    verdict = row["verdicts"].get(metric["name"], "")
    chip = f' <em class="{verdict}">{verdict}</em>' if verdict else ""
    interval = f"<small>[{show(metric, low)}, {show(metric, high)}]</small>"
    return f"<td><strong>{show(metric, value)}</strong>{chip}{interval}{whisker}</td>"


def speed(content: ReportContent) -> str:
    """Milliseconds per picture by part, as bars to scale and as a table."""
    if not content.timings:
        return ""
    batches = list(dict.fromkeys(int(t["batch"]) for t in content.timings))
    bars = "".join(_bars(content, batch) for batch in batches)
    key = "".join(f'<span><i class="{part}"></i>{name}</span>' for part, name in PARTS.items())
    rows = "".join(_timing(timing) for timing in content.timings)
    columns = [*PARTS.values(), "caption to pixels", "speed-up", "denoiser alone"]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("batch", *columns))
    lead = (
        "Time per picture; that of a batch is divided by its size. The contenders took turns within every "
        "round, and speed-ups are medians of the rounds’ own ratios, with 95% intervals: so the machine’s "
        "swings cancel."
    )
    return section(
        "Speed", lead, f'<p class="key">{key}</p><div class="speeds">{bars}</div>',
        _table("Speed", f"<tr><td></td>{head}</tr>", rows),
    )  # fmt: skip


def _bars(content: ReportContent, batch: int) -> str:
    timings = [t for t in content.timings if t["batch"] == batch]
    longest = max(t["parts"]["total"][0] for t in timings)
    lines = "".join(_bar(timing, longest) for timing in timings)
    caption = f"<figcaption>batch size {batch}</figcaption>"
    return f'<figure class="bars">{caption}{lines}</figure>'


def _bar(timing: Mapping[str, Any], longest: float) -> str:
    parts = "".join(
        f'<i class="{part}" style="width:{100 * timing["parts"][part][0] / longest:.2f}%"></i>'
        for part in PARTS
        if part in timing["parts"]
    )
    total = milliseconds(timing["parts"]["total"][0])
    bar = f'<span class="bar" aria-hidden="true">{parts}</span>'
    return f"<div><b>{escape(timing['name'])}</b>{bar}<span>{total}</span></div>"


def _timing(timing: Mapping[str, Any]) -> str:
    parts = [timing["parts"].get(part) for part in (*PARTS, "total")]
    cells = "".join(
        f"<td>{milliseconds(part[0])}</td>" if part else '<td class="none">–</td>' for part in parts
    )
    for part in ("total", "denoiser"):
        ratio = timing["speedup"].get(part)
        cells += (
            f"<td><strong>{ratio[0]:.3g}×</strong><small>[{ratio[1]:.3g}, {ratio[2]:.3g}]</small></td>"
            if ratio
            else '<td class="none">–</td>'
        )
    return f'<tr><th scope="row">{escape(timing["name"])}</th><td>{timing["batch"]}</td>{cells}</tr>'


def _table(label: str, head: str, body: str) -> str:
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def said(content: ReportContent) -> str:
    """What the numbers say, in sentences made from them."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(content))
    lead = "Differences are taken over the same prompts and seeds; brackets hold their 95% intervals."
    return section("What the numbers say", lead, f'<ul class="said">{sentences}</ul>') if sentences else ""


def done(content: ReportContent) -> str:
    """What was done and how long each part took."""
    whole = sum(stage.seconds for stage in content.stages)
    if whole <= 0:
        return ""
    bar, rows = "", ""
    for number, stage in enumerate(content.stages):
        colour = f"var(--series-{number % 6 + 1})"
        share = 100 * stage.seconds / whole
        bar += f'<i style="width:{share:.2f}%;background:{colour}"></i>'
        name = f'<i class="dot" style="background:{colour}"></i>{escape(stage.name)}'
        about = f"<small>{escape(stage.about)}</small>"
        numbers = f"<td>{duration(stage.seconds)}</td><td>{share:.0f}%</td>"
        rows += f'<tr><th scope="row">{name}{about}</th>{numbers}</tr>'
    rows += f'<tr class="sum"><th scope="row">together</th><td>{duration(whole)}</td><td></td></tr>'
    head = '<tr><td></td><th scope="col">time</th><th scope="col">share</th></tr>'
    stacked = f'<div class="stages bar" aria-hidden="true">{bar}</div>'
    return section("What was done", "", stacked, _table("Stages", head, rows))


def training(content: ReportContent) -> str:
    """Curves of the training log."""
    charts = training_charts(content.log, content.schedule)
    if not charts:
        return ""
    shown = "".join(
        f'<figure class="chart" role="img" aria-label="{escape(chart.alt)}">'
        f"<figcaption>{escape(chart.title)}</figcaption>{chart.svg}</figure>"
        for chart in charts
    )
    lead = (
        "Faint: single iterations; strong: running means. Where a term depends on the step of the schedule, "
        "each step has its line. The statistics of x0 would show a student that leaves the VAE’s range while "
        "its loss still falls."
    )
    return section("Training", lead, f'<div class="charts">{shown}</div>')


def again(content: ReportContent) -> str:
    """How to get the same result."""
    body = []
    if content.command:
        body.append(f"<pre><code>{escape(content.command)}</code></pre>")
    for title, table in (("Machine", content.machine), ("Versions", content.versions)):
        if table:
            items = "".join(
                f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in table.items()
            )
            body.append(f"<h3>{title}</h3><dl>{items}</dl>")
    if content.recipe:
        text = f"<pre><code>{escape(content.recipe)}</code></pre>"
        body.append(f"<details><summary>The recipe</summary>{text}</details>")
    return section("How to reproduce this", "", *body) if body else ""


SECTIONS: tuple[Callable[[ReportContent], str], ...] = (
    side_by_side, growth, quality, speed, said, done, training, again,
)  # fmt: skip

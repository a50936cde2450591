"""Summarize results in sentences, with the same wording for better, worse and inconclusive ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.report import ReportContent
from scalewise.evaluation.timing import Timing
from scalewise.metrics import METRICS, Metric
from scalewise.metrics.intervals import MIN_ROUNDS

NO_BREAK = "\u00a0"
UNKNOWN = "unknown"


def findings(content: ReportContent) -> list[str]:
    """Return sentences about speed, quality, limits of the metrics and training, as far as measured."""
    found = [*speed(content)]
    for row in content.rows:
        found += quality(row)
    return [*found, *real_images(content), *cautions(content), *training(content), *content.notes]


def milliseconds(value: float) -> str:
    """Format a time given in milliseconds, such as 4.2 ms or 4.2 s."""
    text = f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
    return text.replace(" ", NO_BREAK)


def duration(seconds: float) -> str:
    """Format a duration, such as 4.2 s, 4 min 10 s or 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def timing_of(content: ReportContent, name: str, batch: int) -> Timing | None:
    """Return the timing of a sampler at a batch size, or None."""
    return next((t for t in content.timings if (t.name, t.batch) == (name, batch)), None)


def speed(content: ReportContent) -> list[str]:
    """Return one sentence per batch size about the times of student and teacher."""
    sentences = []
    for batch in dict.fromkeys(t.batch for t in content.timings):
        ours, theirs = (timing_of(content, name, batch) for name in (content.student, content.teacher))
        if not ours or not theirs or "total" not in ours.speedup:
            continue
        ratio = ours.speedup["total"]
        text = (
            f"From caption to pixels at batch size {batch}: {content.student} "
            f"{milliseconds(ours.parts['total'].value)} per image, {content.teacher} "
            f"{milliseconds(theirs.parts['total'].value)}; a speed-up of {ratio.value:.3g}x "
            f"[{ratio.low:.3g}, {ratio.high:.3g}]."
        )
        if "denoiser" in ours.speedup:
            text += f" For the denoiser alone it is {ours.speedup['denoiser'].value:.3g}x."
        sentences.append(text)
    return sentences


def quality(row: Row) -> list[str]:
    """Return sentences about the differences of a sampler to its baseline, grouped by verdict."""
    by_verdict: dict[str, list[str]] = {"better": [], "worse": [], "": [], UNKNOWN: []}
    for name, found in row.differences.items():
        metric = METRICS[name]
        unit = " points" if metric.percent else ""
        text = f"{metric.title} {signed(metric, found.value)}{unit}"
        if found.known:
            text += f" [{signed(metric, found.low)}, {signed(metric, found.high)}]"
        by_verdict[row.verdict(name) if found.known else UNKNOWN].append(text)
    words = {
        "better": "better than {}", "worse": "worse than {}", "": "no measurable difference to {}",
        UNKNOWN: "too few prompts for a comparison with {}",
    }  # fmt: skip
    return [
        f"{capital(row.name)}: {words[verdict].format(row.compared_with)} in {'; '.join(items)}."
        for verdict, items in by_verdict.items()
        if items
    ]


def capital(name: str) -> str:
    """Capitalize the first letter of a name."""
    return name[:1].upper() + name[1:]


def signed(metric: Metric, value: float) -> str:
    """Format a difference with its sign; shares are in percentage points."""
    text = f"{100 * value:+.1f}" if metric.percent else f"{value:+.{metric.digits}f}"
    return text.replace("-", "−")


def real_images(content: ReportContent) -> list[str]:
    """Return sentences with the metrics of real images, which show the limits of the scorer."""
    sentences = []
    for row in content.rows:
        if row.kind != "real":
            continue
        values = ", ".join(
            f"{METRICS[name].title} {METRICS[name].show(found.value)}" for name, found in row.values.items()
        )
        sentences.append(
            f"For reference, the same metrics for real images: {row.name} ({row.images:,}), {values}."
        )
    return sentences


def cautions(content: ReportContent) -> list[str]:
    """Return warnings about unequal numbers of images and too few rounds."""
    sentences = []
    counts = sorted({row.images for row in content.rows})
    if len(counts) > 1:
        sentences.append(
            f"The rows have different numbers of images ({', '.join(map(str, counts))}). A Fréchet "
            "distance is larger for fewer images, so compare it only between rows with the same number."
        )
    rounds = min((timing.rounds for timing in content.timings), default=MIN_ROUNDS)
    if rounds < MIN_ROUNDS:
        sentences.append(
            f"Times were measured in {rounds} round{'s' if rounds > 1 else ''}; their intervals are ranges "
            "with "
            "less than 95% coverage."
        )
    return sentences


def training(content: ReportContent) -> list[str]:
    """Return sentences about the change of losses, and a warning if x0 drifted out of the VAE's range."""
    sentences = []
    for key, title in (("mmd", "MMD"), ("fake/denoising", "The fake model's denoising loss")):
        if ends := first_and_last(content.log, key):
            first, last = ends
            direction = "fell" if last < first else "rose"
            change = f" ({abs(last / first - 1):.0%})" if first > 0 else ""
            sentences.append(
                f"{title} {direction} from {first:.3g} in the first tenth of training to {last:.3g} in the "
                f"last{change}."
            )
    if (ends := first_and_last(content.log, "x0/beyond_4_sigma")) and ends[1] > max(0.001, 2 * ends[0]):
        sentences.append(
            f"The student's latents have drifted: {ends[1]:.2%} of their values are more than four standard "
            f"deviations from the mean of real ones, compared with {ends[0]:.2%} at the start. Images may be "
            "oversaturated."
        )
    return sentences


def first_and_last(log: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Return the means of a logged value over the first and last tenth of the log; None below 20 rows."""
    values = [float(row[key]) for row in log if key in row]
    if len(values) < 20:
        return None
    tenth = len(values) // 10
    return fmean(values[:tenth]), fmean(values[-tenth:])

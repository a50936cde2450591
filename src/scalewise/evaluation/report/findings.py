"""What the numbers say, in sentences: good news and bad in the same words, chance named as chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.report import ReportContent
from scalewise.evaluation.timing import Timing
from scalewise.metrics import METRICS, Metric
from scalewise.metrics.intervals import FEWEST_ROUNDS

NO_BREAK = "\u00a0"
UNKNOWN = "unknown"


def findings(content: ReportContent) -> list[str]:
    """Sentences about speed, quality, the judge's limits and the training, as far as there are numbers."""
    found = [*speed(content)]
    for row in content.figures:
        found += quality(row)
    return [*found, *real_images(content), *cautions(content), *training(content), *content.notes]


def milliseconds(value: float) -> str:
    """Such as 4.2 ms, 42 ms, 4.2 s."""
    text = f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
    return text.replace(" ", NO_BREAK)


def duration(seconds: float) -> str:
    """Such as 4.2 s, 42 s, 4 min 10 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def timing_of(content: ReportContent, name: str, batch: int) -> Timing | None:
    """A sampler's timing at a batch size, if it was taken."""
    return next((t for t in content.timings if (t.name, t.batch) == (name, batch)), None)


def speed(content: ReportContent) -> list[str]:
    """One sentence per batch size on the student's time and the teacher's."""
    sentences = []
    for batch in dict.fromkeys(t.batch for t in content.timings):
        ours, theirs = (timing_of(content, name, batch) for name in (content.student, content.teacher))
        if not ours or not theirs or "total" not in ours.speedup:
            continue
        ratio = ours.speedup["total"]
        word = "faster" if ratio.value >= 1 else "as fast"
        text = (
            f"From caption to pixels at batch size {batch}: {content.student} "
            f"{milliseconds(ours.parts['total'].value)} per image, {content.teacher} "
            f"{milliseconds(theirs.parts['total'].value)}; {ratio.value:.3g} times {word} "
            f"[{ratio.low:.3g}, {ratio.high:.3g}]."
        )
        if "denoiser" in ours.speedup:
            text += f" The denoiser alone: {ours.speedup['denoiser'].value:.3g} times."
        sentences.append(text)
    return sentences


def quality(row: Row) -> list[str]:
    """How a sampler differs from the one it is compared with, sorted by better, worse and undecided."""
    sorted_out: dict[str, list[str]] = {"better": [], "worse": [], "": [], UNKNOWN: []}
    for name, found in row.differences.items():
        metric = METRICS[name]
        unit = " points" if metric.percent else ""
        said = f"{metric.title} {signed(metric, found.value)}{unit}"
        if found.known:
            said += f" [{signed(metric, found.low)}, {signed(metric, found.high)}]"
        sorted_out[row.verdict(name) if found.known else UNKNOWN].append(said)
    words = {
        "better": "better than {}", "worse": "worse than {}", "": "no difference to {} beyond chance",
        UNKNOWN: "too few prompts to tell a difference to {}",
    }  # fmt: skip
    return [
        f"{capital(row.name)}: {words[verdict].format(row.compared_with)} in {'; '.join(items)}."
        for verdict, items in sorted_out.items()
        if items
    ]


def capital(name: str) -> str:
    """A name at the beginning of a sentence."""
    return name[:1].upper() + name[1:]


def signed(metric: Metric, value: float) -> str:
    """A difference with its sign; those of shares are in percentage points."""
    text = f"{100 * value:+.1f}" if metric.percent else f"{value:+.{metric.digits}f}"
    return text.replace("-", "−")


def real_images(content: ReportContent) -> list[str]:
    """What real images score: the scorer has limits of its own."""
    sentences = []
    for row in content.figures:
        if row.kind != "real":
            continue
        figures = ", ".join(
            f"{METRICS[name].title} {METRICS[name].show(found.value)}" for name, found in row.values.items()
        )
        sentences.append(
            f"For scale, the same scores of real images: {row.name} ({row.images:,}), {figures}."
        )
    return sentences


def cautions(content: ReportContent) -> list[str]:
    """What keeps these numbers from saying more."""
    sentences = []
    counts = sorted({row.images for row in content.figures})
    if len(counts) > 1:
        sentences.append(
            f"The rows rest on different numbers of images ({', '.join(map(str, counts))}); a Fréchet "
            "distance is larger with fewer images, so compare it only between rows of the same number."
        )
    rounds = min((timing.rounds for timing in content.timings), default=FEWEST_ROUNDS)
    if rounds < FEWEST_ROUNDS:
        sentences.append(
            f"Times rest on {rounds} round{'s' if rounds > 1 else ''}, so their intervals are plain ranges "
            "and hold less than 95%."
        )
    return sentences


def training(content: ReportContent) -> list[str]:
    """How losses moved from the first tenth of the run to the last; whether x0 stayed in the VAE's range."""
    sentences = []
    for key, title in (("mmd", "MMD"), ("fake/denoising", "The fake model's denoising loss")):
        if ends := first_and_last(content.log, key):
            first, last = ends
            way = "fell" if last < first else "rose"
            change = f" ({abs(last / first - 1):.0%})" if first > 0 else ""
            sentences.append(
                f"{title} {way} from {first:.3g} in the first tenth of training to {last:.3g} in the "
                f"last{change}."
            )
    if (ends := first_and_last(content.log, "x0/beyond_4_sigma")) and ends[1] > max(0.001, 2 * ends[0]):
        sentences.append(
            f"The student's latents have drifted: {ends[1]:.2%} of their values lie beyond four standard "
            f"deviations of real ones, against {ends[0]:.2%} at the start. Expect oversaturated images."
        )
    return sentences


def first_and_last(log: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Means of a logged number over the first and last tenth of its rows; None with fewer than 20 rows."""
    values = [float(row[key]) for row in log if key in row]
    if len(values) < 20:
        return None
    tenth = len(values) // 10
    return fmean(values[:tenth]), fmean(values[-tenth:])

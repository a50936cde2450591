"""Time samplers in milliseconds per image, in total and by part, in interleaved rounds.

The speed of a machine varies by tens of percent within minutes. Each round therefore runs every sampler once,
and ratios are computed within a round, where a slowdown affects all samplers, before taking medians. The
functions take callables and a clock, so that tests can use fake ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

from scalewise.common import markdown
from scalewise.common.progress import ProgressCallback, no_progress
from scalewise.metrics.intervals import MIN_ROUNDS, Interval, median_interval

Clock = Callable[[], float]
"""Returns seconds since an arbitrary start, after waiting for the device to finish its work."""
Mark = Callable[[], None]
"""Called by a part after each of its pieces ("denoiser/1", "denoiser/2"); the last piece ends with the
part.
"""
Parts = Mapping[str, Callable[[Mark], object]]
"""The parts of sampling one batch, in order: {"text": ..., "denoiser": ..., "vae": ...}."""
Times = dict[str, dict[str, list[float]]]
"""times[sampler][part][round] in milliseconds per image."""

TOTAL = "total"
T = TypeVar("T")


@dataclass(frozen=True)
class TimedSampler:
    """A sampler to time; `enter(batch)` is a context that yields its parts for a batch size."""

    name: str
    enter: Callable[[int], AbstractContextManager[Parts]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image of a sampler at one batch size."""

    name: str
    batch: int
    rounds: int
    parts: dict[str, Interval]
    """Times by part, and "total" from caption to pixels."""
    speedup: dict[str, Interval]
    """Speed-up over the baseline by part and in total, computed within rounds; empty for the baseline."""
    baseline: str


def device_clock(device: str = "cpu") -> Clock:
    """Return a clock that synchronizes a CUDA device before it reads the time."""
    if not device.startswith("cuda"):
        return time.perf_counter
    import torch

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def bench(
    samplers: Sequence[TimedSampler], *, batches: Sequence[int] = (1, 8), rounds: int = 7,
    clock: Clock = time.perf_counter, done: ProgressCallback = no_progress,
) -> list[Timing]:  # fmt: skip
    """Time all samplers at every batch size; the first is the baseline."""
    found = measure_times(samplers, batches, rounds=rounds, clock=clock, done=done)
    return [t for batch, times in found.items() for t in summarize(times, batch, baseline=samplers[0].name)]


def measure_times(
    samplers: Sequence[TimedSampler], batches: Sequence[int], *, rounds: int,
    clock: Clock = time.perf_counter, done: ProgressCallback = no_progress,
) -> dict[int, Times]:  # fmt: skip
    """Time every sampler once per round at every batch size, after one warm-up round.

    `done` is called with the number of finished rounds, out of len(batches) * (rounds + 1). ValueError for
    fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"Timing needs at least one round; got {rounds}. Use 7 for a 95% interval.")
    found: dict[int, Times] = {}
    for at, batch in enumerate(batches):
        batch_times = found[batch] = {sampler.name: {} for sampler in samplers}
        for number in range(rounds + 1):
            for sampler in rotate(samplers, number):
                times = time_parts(sampler, batch, clock)
                if number > 0:
                    for part, milliseconds in times.items():
                        batch_times[sampler.name].setdefault(part, []).append(milliseconds)
            done(at * (rounds + 1) + number + 1)
    return found


def rotate(items: Sequence[T], number: int) -> list[T]:
    """Rotate items by `number`, so that each round starts with another one."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def time_parts(sampler: TimedSampler, batch: int, clock: Clock) -> dict[str, float]:
    """Return milliseconds per image of each part and in total for one run, without setup and cleanup."""
    times, pieces = dict[str, float](), dict[str, float]()
    with sampler.enter(batch) as parts:
        for part, work in parts.items():
            marks, started = list[float](), clock()
            work(partial(_mark, marks, clock))
            ended = clock()
            times[part] = 1000 * (ended - started) / batch
            for number, (since, until) in enumerate(pairwise([started, *marks[:-1], ended]), 1):
                if marks:
                    pieces[f"{part}/{number}"] = 1000 * (until - since) / batch
    return times | {TOTAL: sum(times.values())} | pieces


def _mark(marks: list[float], clock: Clock) -> None:
    marks.append(clock())


def summarize(times: Times, batch: int, *, baseline: str) -> list[Timing]:
    """Compute medians over rounds of the times, and of the ratios to the baseline within each round."""
    base = times[baseline]
    timings = []
    for name, own in times.items():
        ratios = {
            part: median_interval([theirs / ours for theirs, ours in zip(base[part], own[part], strict=True)])
            for part in own
            if name != baseline and part in base and min(own[part]) > 0
        }
        spreads = {part: median_interval(values) for part, values in own.items()}
        timings.append(Timing(name, batch, len(own[TOTAL]), spreads, ratios, baseline))
    return timings


def timings_table(timings: Sequence[Timing]) -> str:
    """Return a markdown table of milliseconds per image by part, and the speed-up with its interval."""
    parts = [part for part in timings[0].parts if "/" not in part]
    head = ["", "batch", *(f"{part}, ms" for part in parts), "speed-up", "of the denoiser alone"]
    rows = []
    for timing in timings:
        cells = [format_ms(timing.parts[part].value) for part in parts]
        ratios = [format_ratio(timing.speedup.get(part)) for part in (TOTAL, "denoiser")]
        rows.append([timing.name, str(timing.batch), *cells, *ratios])
    return markdown.table(head, rows)


def describe_rounds(rounds: int) -> str:
    """Describe the times and the ranges in brackets."""
    if rounds == 1:
        return "One round, so the variation between rounds is unknown."
    brackets = (
        "the 95% interval of the median"
        if rounds >= MIN_ROUNDS
        else "the range (too few rounds for an interval)"
    )
    return f"Medians of {rounds} rounds, with {brackets} in brackets; ratios are computed within rounds."


def format_ms(milliseconds: float) -> str:
    """Format milliseconds with three significant digits, or as an integer from 100 on."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def format_ratio(ratio: Interval | None) -> str:
    """Format a ratio as "12.3x [11.8, 12.9]"; "-" for None (the baseline)."""
    return f"{ratio.value:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio else "-"

"""Milliseconds per image: end to end and by part, with the contenders taking turns.

The speed of a machine swings by tens of per cent within minutes. A ratio of two times is therefore taken
within a round, in which every contender runs once, and the rounds' ratios are summarised: what slows a round
down slows both. Everything here works on callables and a clock, so that tests can use pretended ones.
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
from scalewise.metrics.intervals import FEWEST_ROUNDS, Interval, median_interval

Clock = Callable[[], float]
"""Seconds since whenever; waits first until the device has done what it was given."""
Mark = Callable[[], None]
"""Called by a part after each of its pieces: "denoiser/1", "denoiser/2"; the last one ends with the part."""
Parts = Mapping[str, Callable[[Mark], object]]
"""What makes up one batch, in the order in which it runs: {"text": ..., "denoiser": ..., "vae": ...}."""
Laps = dict[str, dict[str, list[float]]]
"""laps[contender][part][round] in milliseconds per image."""

TOTAL = "total"
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A contender to time: `enter(batch)` gives its parts for a batch size, and cleans up after it."""

    name: str
    enter: Callable[[int], AbstractContextManager[Parts]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image of a contender at one batch size."""

    name: str
    batch: int
    rounds: int
    parts: dict[str, Interval]
    """By part, and "total" from caption to pixels."""
    speedup: dict[str, Interval]
    """Times faster than the baseline, within the same round; by part and in total. Empty for the baseline."""
    baseline: str


def device_clock(device: str = "cpu") -> Clock:
    """A clock that waits for a CUDA device before it looks at the time."""
    if not device.startswith("cuda"):
        return time.perf_counter
    import torch

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def bench(
    subjects: Sequence[Subject], *, batches: Sequence[int] = (1, 8), rounds: int = 7,
    clock: Clock = time.perf_counter, done: ProgressCallback = no_progress,
) -> list[Timing]:  # fmt: skip
    """Time all subjects at every batch size; the first subject is what the others are compared with."""
    found = laps_of(subjects, batches, rounds=rounds, clock=clock, done=done)
    return [t for batch, laps in found.items() for t in summarize(laps, batch, baseline=subjects[0].name)]


def laps_of(
    subjects: Sequence[Subject], batches: Sequence[int], *, rounds: int, clock: Clock = time.perf_counter,
    done: ProgressCallback = no_progress,
) -> dict[int, Laps]:  # fmt: skip
    """Run every subject once a round at every batch size, in turns; the first round of each is warm-up.

    `done` is called with the number of rounds finished, of len(batches) * (rounds + 1).
    """
    if rounds < 1:
        raise ValueError(f"Timing needs at least one round, not {rounds}; 7 give a 95% interval.")
    found: dict[int, Laps] = {}
    for at, batch in enumerate(batches):
        laps = found[batch] = {subject.name: {} for subject in subjects}
        for number in range(rounds + 1):
            for subject in in_turns(subjects, number):
                lap = time_parts(subject, batch, clock)
                if number > 0:
                    for part, milliseconds in lap.items():
                        laps[subject.name].setdefault(part, []).append(milliseconds)
            done(at * (rounds + 1) + number + 1)
    return found


def in_turns(items: Sequence[T], number: int) -> list[T]:
    """Rotate the order of items, so that each round begins with the next one."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def time_parts(subject: Subject, batch: int, clock: Clock) -> dict[str, float]:
    """Milliseconds per image of each part and in total, from one run; entering and leaving do not count."""
    lap, pieces = dict[str, float](), dict[str, float]()
    with subject.enter(batch) as parts:
        for part, work in parts.items():
            marks, started = list[float](), clock()
            work(partial(_mark, marks, clock))
            ended = clock()
            lap[part] = 1000 * (ended - started) / batch
            for number, (since, until) in enumerate(pairwise([started, *marks[:-1], ended]), 1):
                if marks:
                    pieces[f"{part}/{number}"] = 1000 * (until - since) / batch
    return lap | {TOTAL: sum(lap.values())} | pieces


def _mark(marks: list[float], clock: Clock) -> None:
    marks.append(clock())


def summarize(laps: Laps, batch: int, *, baseline: str) -> list[Timing]:
    """Medians over rounds, and medians of the rounds' own ratios to the baseline."""
    base = laps[baseline]
    timings = []
    for name, own in laps.items():
        ratios = {
            part: median_interval([theirs / ours for theirs, ours in zip(base[part], own[part], strict=True)])
            for part in own
            if name != baseline and part in base and min(own[part]) > 0
        }
        spreads = {part: median_interval(values) for part, values in own.items()}
        timings.append(Timing(name, batch, len(own[TOTAL]), spreads, ratios, baseline))
    return timings


def timings_table(timings: Sequence[Timing]) -> str:
    """A table in markdown: milliseconds per image by part, and the speed-up with its interval."""
    parts = [part for part in timings[0].parts if "/" not in part]
    head = ["", "batch", *(f"{part}, ms" for part in parts), "speed-up", "of the denoiser alone"]
    rows = []
    for timing in timings:
        cells = [format_ms(timing.parts[part].value) for part in parts]
        ratios = [format_ratio(timing.speedup.get(part)) for part in (TOTAL, "denoiser")]
        rows.append([timing.name, str(timing.batch), *cells, *ratios])
    return markdown.table(head, rows)


def rounds_told(rounds: int) -> str:
    """What the figures and their brackets are."""
    if rounds == 1:
        return "One round: nothing tells how far another would be from it."
    brackets = "the 95 % interval of the median" if rounds >= FEWEST_ROUNDS else "the range of so few rounds"
    return f"Medians of {rounds} rounds, in brackets {brackets}; ratios are taken within rounds."


def format_ms(milliseconds: float) -> str:
    """Three digits are more than timing is worth: 0.42, 4.2, 42, 420."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def format_ratio(ratio: Interval | None) -> str:
    """Such as "12.3x [11.8, 12.9]", or a dash for the baseline itself."""
    return f"{ratio.value:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio else "-"

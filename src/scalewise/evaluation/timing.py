"""Milliseconds per image: end to end and by part, with the contenders taking turns.

The speed of a machine swings by tens of per cent within minutes. A ratio of two times is therefore taken
within a round, in which every contender runs once, and the rounds' ratios are summarised: what slows a round
down slows both. Everything here works on callables and a clock, so that tests can use pretended ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

Clock = Callable[[], float]
"""Seconds since whenever; waits first until the device has done what it was given."""
Parts = Mapping[str, Callable[[], object]]
"""What makes up one batch, in the order in which it runs: {"text": ..., "denoiser": ..., "vae": ...}.
Pieces of a part are written "denoiser/1", "denoiser/2"; the part is their sum."""
Laps = dict[str, dict[str, list[float]]]
"""laps[contender][part][round] in milliseconds per image."""

TOTAL = "total"
FEWEST_ROUNDS = 6  # that a 95% interval of a median needs


@dataclass(frozen=True)
class Subject:
    """A contender to time: `enter(batch)` gives its parts for a batch size, and cleans up after it."""

    name: str
    enter: Callable[[int], AbstractContextManager[Parts]]


@dataclass(frozen=True)
class Spread:
    """A median over rounds with its 95% interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Order statistics, which assume no distribution; of fewer than FEWEST_ROUNDS values their range."""
        ordered, count = sorted(values), len(values)
        # P(median outside [k-th smallest, k-th largest]) = 2 P(Binomial(n, 1/2) < k): the largest k below 5%.
        outside, cut = 2 * 0.5**count, 0
        while outside + 2 * comb(count, cut + 1) * 0.5**count <= 0.05:
            cut += 1
            outside += 2 * comb(count, cut) * 0.5**count
        return cls(median(ordered), ordered[cut], ordered[count - 1 - cut])

    def to_list(self) -> list[float]:
        """[median, low, high], as results are stored."""
        return [self.median, self.low, self.high]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image of a contender at one batch size."""

    name: str
    batch: int
    rounds: int
    parts: dict[str, Spread]
    """By part, and "total" from caption to pixels."""
    speedup: dict[str, Spread]
    """Times faster than the baseline, within the same round; by part and in total. Empty for the baseline."""
    baseline: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored in JSON and shown in reports."""
        return {
            "name": self.name, "batch": self.batch, "rounds": self.rounds, "baseline": self.baseline,
            "parts": {part: spread.to_list() for part, spread in self.parts.items()},
            "speedup": {part: spread.to_list() for part, spread in self.speedup.items()},
        }  # fmt: skip


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
    subjects: Sequence[Subject], *, batches: Iterable[int] = (1, 8), rounds: int = 7,
    clock: Clock = time.perf_counter, done: Callable[[int], None] = lambda count: None,
) -> list[Timing]:  # fmt: skip
    """Time all subjects at every batch size; the first subject is what the others are compared with.

    `done` is told the number of rounds finished, warm-up included; there are len(batches) * (rounds + 1).
    """
    timings: list[Timing] = []
    for number, batch in enumerate(batches):

        def so_far(count: int, before: int = number * (rounds + 1)) -> None:
            done(before + count)

        laps = interleave(subjects, batch, rounds=rounds, clock=clock, done=so_far)
        timings += summarise(laps, batch, baseline=subjects[0].name)
    return timings


def interleave(
    subjects: Sequence[Subject], batch: int, *, rounds: int = 7, clock: Clock = time.perf_counter,
    done: Callable[[int], None] = lambda count: None,
) -> Laps:  # fmt: skip
    """Run every subject once a round, each round beginning with the next one; the first round is warm-up."""
    if rounds < 1:
        raise ValueError(f"Timing needs at least one round, not {rounds}; 7 give a 95% interval.")
    laps: Laps = {subject.name: {} for subject in subjects}
    for number in range(rounds + 1):
        first = number % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            lap = time_parts(subject, batch, clock)
            if number > 0:
                for part, milliseconds in lap.items():
                    laps[subject.name].setdefault(part, []).append(milliseconds)
        done(number + 1)
    return laps


def time_parts(subject: Subject, batch: int, clock: Clock) -> dict[str, float]:
    """Milliseconds per image of each part and in total, from one run; entering and leaving do not count."""
    lap, pieces = dict[str, float](), dict[str, float]()
    with subject.enter(batch) as parts:
        for name, work in parts.items():
            started = clock()
            work()
            milliseconds = 1000 * (clock() - started) / batch
            part, _, piece = name.partition("/")
            lap[part] = lap.get(part, 0.0) + milliseconds
            if piece:
                pieces[name] = milliseconds
    return lap | {TOTAL: sum(lap.values())} | pieces


def summarise(laps: Laps, batch: int, *, baseline: str) -> list[Timing]:
    """Medians over rounds, and medians of the rounds' own ratios to the baseline."""
    base = laps[baseline]
    timings = []
    for name, own in laps.items():
        ratios = {
            part: Spread.of([theirs / ours for theirs, ours in zip(base[part], own[part], strict=True)])
            for part in own
            if name != baseline and part in base and min(own[part]) > 0
        }
        spreads = {part: Spread.of(values) for part, values in own.items()}
        timings.append(Timing(name, batch, len(own[TOTAL]), spreads, ratios, baseline))
    return timings


def table(timings: Sequence[Timing]) -> str:
    """A table in markdown: milliseconds per image by part, and the speed-up with its interval."""
    parts = [part for part in timings[0].parts if "/" not in part]
    head = ["", "batch", *(f"{part}, ms" for part in parts), "speed-up", "of the denoiser alone"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for timing in timings:
        cells = [format_ms(timing.parts[part].median) for part in parts]
        ratios = [format_ratio(timing.speedup.get(part)) for part in (TOTAL, "denoiser")]
        lines.append([timing.name, str(timing.batch), *cells, *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rounds_told(rounds: int) -> str:
    """What the figures and their brackets are."""
    if rounds == 1:
        return "One round: nothing tells how far another would be from it."
    brackets = "the 95 % interval of the median" if rounds >= FEWEST_ROUNDS else "the range of so few rounds"
    return f"Medians of {rounds} rounds, in brackets {brackets}; ratios are taken within rounds."


def format_ms(milliseconds: float) -> str:
    """Three digits are more than timing is worth: 0.42, 4.2, 42, 420."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def format_ratio(ratio: Spread | None) -> str:
    """Such as "12.3x [11.8, 12.9]", or a dash for the baseline itself."""
    return f"{ratio.median:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio else "-"

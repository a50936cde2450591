"""Timing, with pretended clocks: medians, interleaving, ratios that survive a machine whose speed swings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import comb
from pathlib import Path

import pytest

from scalewise.common.results import write_json
from scalewise.evaluation.timing import Mark, Parts, TimedSampler, bench, measure_times, timings_table
from scalewise.metrics.intervals import Interval, median_interval


class Machine:
    """A clock that only pretended work moves; `speed` may change as the log of what ran grows."""

    def __init__(self, slowdown: list[float] | None = None) -> None:
        self.now, self.log = 0.0, list[str]()
        self.slowdown = slowdown or [1.0]

    def clock(self) -> float:
        return self.now

    def subject(
        self, name: str, *, text: float = 0.0, denoiser: float = 0.0, vae: float = 0.0
    ) -> TimedSampler:
        """Seconds per image of each part; entering costs a second that must not count."""

        @contextmanager
        def enter(batch: int) -> Iterator[Parts]:
            self.now += 1
            self.log.append(name)
            seconds = {"text": text, "denoiser": denoiser, "vae": vae}
            yield {part: partial(self.work, cost * batch) for part, cost in seconds.items()}

        return TimedSampler(name, enter)

    def work(self, seconds: float, _mark: Mark) -> None:
        # Two subjects make a round of two entries, so a round runs at one speed.
        self.now += seconds * self.slowdown[(len(self.log) - 1) // 2 % len(self.slowdown)]


def test_times_are_milliseconds_per_image_of_every_part_and_their_sum() -> None:
    machine = Machine()
    only = machine.subject("teacher", text=0.002, denoiser=0.5, vae=0.03)
    (timing,) = bench([only], batches=[8], rounds=3, clock=machine.clock)
    medians = {part: spread.value for part, spread in timing.parts.items()}
    assert medians == pytest.approx({"text": 2, "denoiser": 500, "vae": 30, "total": 532})
    assert (timing.batch, timing.rounds, timing.speedup) == (8, 3, {})


def test_contenders_take_turns_and_the_first_round_is_warm_up() -> None:
    machine = Machine()
    pair = [machine.subject("a", denoiser=1), machine.subject("b", denoiser=1)]
    laps = measure_times(pair, [1], rounds=3, clock=machine.clock)[1]
    assert machine.log == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(laps["a"]["denoiser"]) == 3


def test_ratios_are_exact_although_the_machine_swings_threefold_between_rounds() -> None:
    machine = Machine(slowdown=[1.0, 3.0, 1.4, 0.7, 2.2])
    pair = [
        machine.subject("teacher", denoiser=0.9, vae=0.1),
        machine.subject("student", denoiser=0.1, vae=0.1),
    ]
    teacher, student = bench(pair, batches=[4], rounds=10, clock=machine.clock)
    ratio = student.speedup["denoiser"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((9, 9, 9))
    assert student.speedup["total"].value == pytest.approx(5)
    assert teacher.parts["total"].high > 2 * teacher.parts["total"].low  # while the times themselves swing


def test_both_batch_sizes_are_timed_and_progress_counts_every_round() -> None:
    machine, counts = Machine(), list[int]()
    pair = [machine.subject("a", denoiser=1), machine.subject("b", denoiser=2)]
    timings = bench(pair, batches=(1, 8), rounds=2, clock=machine.clock, done=counts.append)
    assert [(t.name, t.batch) for t in timings] == [("a", 1), ("b", 1), ("a", 8), ("b", 8)]
    assert counts == [1, 2, 3, 4, 5, 6]


def test_the_interval_of_a_median_has_the_order_statistics_that_the_binomial_says() -> None:
    assert median_interval([3, 1, 2]) == Interval(2, 1, 3)
    assert median_interval(range(1, 8)) == Interval(4, 1, 7)
    # Of 20 values the 6th and the 15th: 2 P(B < 6) = 0.041, and the next ones in would leave out 0.115.
    assert median_interval(range(1, 21)) == Interval(10.5, 6, 15)
    assert (
        2 * sum(comb(20, k) for k in range(6)) / 2**20 < 0.05 < 2 * sum(comb(20, k) for k in range(7)) / 2**20
    )


def test_a_table_names_every_contender_and_the_baseline_has_no_ratio() -> None:
    machine = Machine()
    pair = [
        machine.subject("teacher", denoiser=0.8, vae=0.2),
        machine.subject("student", denoiser=0.05, vae=0.2),
    ]
    lines = timings_table(bench(pair, batches=[1], rounds=6, clock=machine.clock)).splitlines()
    assert (
        lines[0]
        == "|  | batch | text, ms | denoiser, ms | vae, ms | total, ms | speed-up | of the denoiser alone |"
    )
    assert lines[2] == "| teacher | 1 | 0 | 800 | 200 | 1,000 | - | - |"
    assert lines[3] == "| student | 1 | 0 | 50 | 200 | 250 | 4x [4, 4] | 16x [16, 16] |"


def test_a_timing_is_stored_with_its_intervals_as_lists(tmp_path: Path) -> None:
    machine = Machine()
    pair = [machine.subject("a", denoiser=2), machine.subject("b", denoiser=1)]
    write_json(tmp_path / "t.json", bench(pair, batches=[1], rounds=1, clock=machine.clock))
    plain = json.loads((tmp_path / "t.json").read_text())[1]
    assert plain["speedup"]["total"] == [2.0, 2.0, 2.0]
    assert plain["baseline"] == "a"


def test_timing_without_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round; got 0"):
        measure_times([Machine().subject("a")], [1], rounds=0)


def test_a_bar_in_a_label_stays_in_its_cell():
    machine = Machine()
    line = timings_table(bench([machine.subject("a|b")], batches=[1], rounds=1, clock=machine.clock))
    assert line.splitlines()[2].startswith(r"| a\|b | 1 |")

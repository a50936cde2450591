"""95% intervals for figures measured on a sample of images, by repeating the measurement on halves of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalewise.rng import permutation

LEVEL = 0.95
ROUNDS = 2000  # verdicts stand at the ends of intervals, which few rounds leave to chance
FEWEST = 4


@dataclass(frozen=True)
class Interval:
    """A measured value with the bounds that hold the true one 95 times of 100, as far as sampling goes."""

    value: float
    low: float
    high: float

    def within(self, low: float, high: float) -> Interval:
        """The interval cut to what the figure can be, for example [0, 1] for a share."""
        return Interval(self.value, min(max(self.low, low), high), min(max(self.high, low), high))

    def of_a_share(self, count: int) -> Interval:
        """The interval, or the exact binomial one (Clopper and Pearson 1934) of a share that is 0 or 1 in all
        of `count` samples, of whose spread halves know nothing.
        """
        open_end = 1 - ((1 - LEVEL) / 2) ** (1 / count)
        if self.value == 0 and self.high <= 0:
            return Interval(0.0, 0.0, open_end)
        if self.value == 1 and self.low >= 1:
            return Interval(1.0, 1 - open_end, 1.0)
        return self

    def excludes(self, number: float) -> bool:
        """Tell whether `number` lies outside."""
        return not self.low <= number <= self.high

    def to_list(self) -> list[float]:
        """[value, low, high], as results are stored."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Resampled:
    """A figure of a whole sample and of random halves of it.

    Figures over the same halves add up: `a - b` is their difference, paired, and `0.1 * a` a part.
    """

    value: float
    halves: Tensor
    """The figure of every half, float64 [R]."""
    count: int
    """Independent samples in the whole."""

    def __sub__(self, other: Resampled) -> Resampled:
        return self + -1.0 * other

    def __add__(self, other: Resampled) -> Resampled:
        assert self.count == other.count, "figures are of the same halves"
        return Resampled(self.value + other.value, self.halves + other.halves, self.count)

    def __rmul__(self, factor: float) -> Resampled:
        return Resampled(factor * self.value, factor * self.halves, self.count)

    @classmethod
    def mean(cls, figures: Sequence[Resampled]) -> Resampled:
        """The mean of figures over the same halves: of several seeds, say, whose pictures are not mixed."""
        total = figures[0]
        for figure in figures[1:]:
            total = total + figure
        return (1 / len(figures)) * total

    def interval(self) -> Interval:
        """The 95% interval.

        The usual bootstrap draws with replacement. A Frechet distance falls with the number of *different*
        images, so repeated ones push it up: its percentile interval may not even hold the measured value.
        Halves drawn without replacement have no repeats, and for a mean their spread around their own average
        equals the standard error of the whole sample (variance s^2 (1/m - 1/n), which for m = n/2 is s^2/n;
        other m are rescaled). The spread is reflected about the measured value ("pivotal"), so the bias that
        comes with half the sample cancels. What stays is the bias of the value itself at this sample size:
        compare figures of equal counts.
        """
        again = self.halves[~self.halves.isnan()]  # a half may hold no image that the figure is about
        if len(again) < 2:
            return Interval(self.value, -math.inf, math.inf)
        half = self.count // 2
        spread = (again - again.mean()) * math.sqrt(half / (self.count - half))
        outside = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        low, high = spread.quantile(outside).tolist()
        return Interval(self.value, self.value - high, self.value - low)


def resample(
    statistic: Callable[[Tensor], float], count: int, *, rounds: int = ROUNDS, seed: int = 0
) -> Resampled:
    """Measure `statistic(indices)` on all of range(count) and on random halves, the same for equal seeds."""
    if count < FEWEST:
        raise ValueError(
            f"An interval needs at least {FEWEST} independent samples, not {count}; draw more prompts."
        )
    halves = (permutation(count, "interval", seed, r)[: count // 2] for r in range(rounds))
    again = torch.tensor([statistic(rows) for rows in halves], dtype=torch.float64)
    return Resampled(statistic(torch.arange(count)), again, count)


def bootstrap_interval(
    statistic: Callable[[Tensor], float], count: int, *, rounds: int = 200, seed: int = 0
) -> Interval:
    """Measure `statistic(indices)` on all of range(count), with a 95% interval from random halves."""
    return resample(statistic, count, rounds=rounds, seed=seed).interval()

"""95% intervals for figures measured on a sample of images, by repeating the measurement on halves of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist, median

import torch
from torch import Tensor

from scalewise.method.rng import permutation

LEVEL = 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
ROUNDS = 2000  # verdicts stand at the ends of intervals, which few rounds leave to chance
FEWEST = 20
"""Independent samples that an interval needs; of fewer it holds the true value too seldom (docs/log.md)."""
FEWEST_ROUNDS = 6
"""Values that a 95% interval of a median needs."""

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the expansion below errs by less
# than 0.0001.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(freedom: int) -> float:
    """How many standard errors, estimated with some degrees of freedom, reach to the end of a 95% interval.

    The expansion is Abramowitz and Stegun 26.7.5.
    """
    assert freedom >= 1, "a standard error needs two values"
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, n = NORMAL, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


@dataclass(frozen=True)
class Interval:
    """A measured value with the bounds that hold the true one 95 times of 100, as far as sampling goes."""

    value: float
    low: float
    high: float

    @classmethod
    def unknown(cls, value: float) -> Interval:
        """A value that rests on too little for an interval."""
        return cls(value, -math.inf, math.inf)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, low: float, high: float) -> Interval:
        """The interval cut to what the figure can be, for example [0, 1] for a share."""
        if not self.known:
            return self
        return Interval(self.value, min(max(self.low, low), high), min(max(self.high, low), high))

    def __truediv__(self, number: float) -> Interval:
        return Interval(self.value / number, self.low / number, self.high / number)

    def excludes(self, number: float) -> bool:
        """Tell whether `number` lies outside."""
        return not self.low <= number <= self.high

    def show(self, show: Callable[[float], str]) -> str:
        """Such as "0.31 [0.25, 0.37]"; the value alone where there is no interval."""
        if not self.known:
            return show(self.value)
        return f"{show(self.value)} [{show(self.low)}, {show(self.high)}]"

    def to_list(self) -> list[float | None]:
        """[value, low, high], as results are stored; None for the ends of an unknown interval."""
        return [self.value, self.low, self.high] if self.known else [self.value, None, None]

    @classmethod
    def from_list(cls, stored: Sequence[float | None]) -> Interval:
        """Read what `to_list` gave."""
        value, low, high = stored
        assert value is not None
        return cls.unknown(value) if low is None or high is None else cls(value, low, high)


def median_interval(values: Sequence[float]) -> Interval:
    """Take the median of values with its 95% interval; of fewer than FEWEST_ROUNDS values their range.

    The ends are order statistics, which assume no distribution.
    """
    ordered, count = sorted(values), len(values)
    # P(median outside [k-th smallest, k-th largest]) = 2 P(Binomial(n, 1/2) < k): the largest k below 5%.
    outside, cut = 2 * 0.5**count, 0
    while outside + 2 * comb(count, cut + 1) * 0.5**count <= 0.05:
        cut += 1
        outside += 2 * comb(count, cut) * 0.5**count
    return Interval(median(ordered), ordered[cut], ordered[count - 1 - cut])


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

    @property
    def spread(self) -> Tensor:
        """How far the figure of the whole sample may be off, by every half, float64 [R].

        The usual bootstrap draws with replacement. A Frechet distance falls with the number of *different*
        images, so repeated ones push it up: its percentile interval may not even hold the measured value.
        Halves drawn without replacement have no repeats, and for a mean their spread around their own average
        equals the standard error of the whole sample (variance s^2 (1/m - 1/n), which for m = n/2 is s^2/n;
        other m are rescaled).
        """
        again = self.halves[~self.halves.isnan()]  # a half may hold no image that the figure is about
        half = self.count // 2
        return (again - again.mean()) * math.sqrt(half / (self.count - half))

    @property
    def error(self) -> float:
        """The standard error over the samples."""
        return float(self.spread.std())

    def interval(self) -> Interval:
        """The 95% interval.

        The spread is reflected about the measured value ("pivotal"), so the bias that comes with half the
        sample cancels, and widened as Student's t is against the normal distribution. What stays is the bias
        of the value itself at this sample size: compare figures of equal counts.
        """
        spread = self.spread
        if len(spread) < 2:
            return Interval.unknown(self.value)
        outside = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        wider = t_quantile(self.count - 1) / NORMAL
        low, high = (wider * spread.quantile(outside)).tolist()
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

"""95% intervals of metrics, from the same metrics on random halves of the samples."""

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
NORMAL_QUANTILE = NormalDist().inv_cdf((1 + LEVEL) / 2)
ROUNDS = 2000  # verdicts depend on interval ends, which vary if rounds are few
MIN_SAMPLES = 20
"""Minimum independent samples of an interval; with fewer, its coverage is below 95% (docs/log.md)."""
MIN_ROUNDS = 6
"""Minimum number of values of a 95% interval of a median."""

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; for more, the error of the expansion below
# is
# less than 0.0001.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t: half the width of a 95% interval in standard errors.

    For more than 10 degrees of freedom by the expansion in Abramowitz and Stegun, 26.7.5.
    """
    assert degrees >= 1, "a standard error needs two values"
    if degrees <= len(_T):
        return _T[degrees - 1]
    z, n = NORMAL_QUANTILE, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95% interval, which covers the uncertainty from sampling only."""

    value: float
    low: float
    high: float

    @classmethod
    def unknown(cls, value: float) -> Interval:
        """Return a value without an interval, for too few samples."""
        return cls(value, -math.inf, math.inf)

    @property
    def known(self) -> bool:
        """Whether the value has an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, low: float, high: float) -> Interval:
        """Clip the interval to the range of the metric, such as [0, 1] for a share."""
        if not self.known:
            return self
        return Interval(self.value, min(max(self.low, low), high), min(max(self.high, low), high))

    def __truediv__(self, number: float) -> Interval:
        return Interval(self.value / number, self.low / number, self.high / number)

    def excludes(self, number: float) -> bool:
        """Return whether `number` is outside the interval."""
        return not self.low <= number <= self.high

    def show(self, show: Callable[[float], str]) -> str:
        """Format as "0.31 [0.25, 0.37]", or as the value alone if there is no interval."""
        if not self.known:
            return show(self.value)
        return f"{show(self.value)} [{show(self.low)}, {show(self.high)}]"

    def to_list(self) -> list[float | None]:
        """Return [value, low, high] for storage; the ends of an unknown interval are None."""
        return [self.value, self.low, self.high] if self.known else [self.value, None, None]

    @classmethod
    def from_list(cls, stored: Sequence[float | None]) -> Interval:
        """Parse the output of `to_list`."""
        value, low, high = stored
        assert value is not None
        return cls.unknown(value) if low is None or high is None else cls(value, low, high)


def median_interval(values: Sequence[float]) -> Interval:
    """Compute the median of values and its 95% interval, or their range for fewer than MIN_ROUNDS values.

    The ends are order statistics, so no distribution is assumed.
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
    """A metric on all samples and on random halves of them.

    Metrics on the same halves support arithmetic: `a - b` is the paired difference.
    """

    value: float
    halves: Tensor
    """Value on each half, float64 [R]."""
    count: int
    """Number of independent samples."""

    def __sub__(self, other: Resampled) -> Resampled:
        return self + -1.0 * other

    def __add__(self, other: Resampled) -> Resampled:
        assert self.count == other.count, "both need the same halves"
        return Resampled(self.value + other.value, self.halves + other.halves, self.count)

    def __rmul__(self, factor: float) -> Resampled:
        return Resampled(factor * self.value, factor * self.halves, self.count)

    @classmethod
    def mean(cls, values: Sequence[Resampled]) -> Resampled:
        """Average metrics on the same halves, such as those of several training seeds."""
        total = values[0]
        for value in values[1:]:
            total = total + value
        return (1 / len(values)) * total

    @property
    def deviations(self) -> Tensor:
        """Estimated deviations of the value on all samples, one for each half, float64 [R].

        The usual bootstrap samples with replacement. Fréchet distances decrease with the number of *distinct*
        images, so duplicates increase them: the percentile interval may not even contain the measured value.
        Halves without replacement have no duplicates. For a mean, their deviation from their own average
        equals the standard error on all samples (variance s^2 (1/m - 1/n), which is s^2/n for m = n/2;
        other m are rescaled).
        """
        values = self.halves[~self.halves.isnan()]  # NaN: the metric applies to no image of a half
        half = self.count // 2
        return (values - values.mean()) * math.sqrt(half / (self.count - half))

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return float(self.deviations.std())

    def interval(self) -> Interval:
        """Return the 95% interval.

        The deviations is reflected about the measured value ("pivotal interval"), which cancels the bias of
        half-size samples, and is widened by the ratio of Student's t to the normal quantile. The bias of the
        value at this sample size remains, so compare only values of the same number of samples.
        """
        deviations = self.deviations
        if len(deviations) < 2:
            return Interval.unknown(self.value)
        outside = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        widening = t_quantile(self.count - 1) / NORMAL_QUANTILE
        low, high = (widening * deviations.quantile(outside)).tolist()
        return Interval(self.value, self.value - high, self.value - low)


def resample(
    statistic: Callable[[Tensor], float], count: int, *, rounds: int = ROUNDS, seed: int = 0
) -> Resampled:
    """Compute `statistic(indices [G])` on range(count) and on random halves, which depend on the seed
    only.
    """
    if count < MIN_SAMPLES:
        raise ValueError(
            f"An interval needs at least {MIN_SAMPLES} independent samples; got {count}. Use more prompts."
        )
    halves = (permutation(count, "interval", seed, r)[: count // 2] for r in range(rounds))
    values = torch.tensor([statistic(rows) for rows in halves], dtype=torch.float64)
    return Resampled(statistic(torch.arange(count)), values, count)


def bootstrap_interval(
    statistic: Callable[[Tensor], float], count: int, *, rounds: int = 200, seed: int = 0
) -> Interval:
    """Compute `statistic(indices [G])` on range(count), with a 95% interval from random halves."""
    return resample(statistic, count, rounds=rounds, seed=seed).interval()

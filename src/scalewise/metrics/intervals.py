"""95% intervals for figures measured on a sample of images, by repeating the measurement on halves of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalewise.rng import permutation

LEVEL = 0.95
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

    def excludes(self, number: float) -> bool:
        """Tell whether `number` lies outside."""
        return not self.low <= number <= self.high

    def to_list(self) -> list[float]:
        """[value, low, high], as results are stored."""
        return [self.value, self.low, self.high]


def bootstrap_interval(
    statistic: Callable[[Tensor], float], count: int, *, rounds: int = 200, seed: int = 0
) -> Interval:
    """Measure `statistic(indices)` on all of range(count), with a 95% interval from random halves.

    The usual bootstrap draws with replacement. A Frechet distance falls with the number of *different*
    images, so repeated ones push it up: its percentile interval may not even hold the measured value. Halves
    drawn without replacement have no repeats, and for a mean their spread around their own average equals
    the standard error of the whole sample (variance s^2 (1/m - 1/n), which for m = n/2 is s^2/n; other m are
    rescaled). The spread is reflected about the measured value ("pivotal"), so the bias that comes with half
    the sample cancels. What stays is the bias of the value itself at this sample size: compare figures of
    equal counts.
    """
    if count < FEWEST:
        raise ValueError(
            f"An interval needs at least {FEWEST} independent samples, not {count}; draw more prompts."
        )
    value = statistic(torch.arange(count))
    half = count // 2
    halves = [permutation(count, "interval", seed, r)[:half] for r in range(rounds)]
    again = torch.tensor([statistic(rows) for rows in halves], dtype=torch.float64)
    again = again[~again.isnan()]  # a half may hold no image that the figure is about
    if len(again) < 2:
        return Interval(value, -math.inf, math.inf)
    spread = (again - again.mean()) * math.sqrt(half / (count - half))
    outside = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = spread.quantile(outside).tolist()
    return Interval(value, value - high, value - low)

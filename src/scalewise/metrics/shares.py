"""95% intervals of shares: Wilson (1927); Newcombe (1998) for paired differences; MOVER for means of shares.

Resampling does not work for shares of few prompts or near 0 or 1: their distribution is skewed, and all
halves may have the same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scalewise.metrics.base import ImageFeatures, Mean, Statistic
from scalewise.metrics.intervals import MIN_SAMPLES, NORMAL_QUANTILE, Interval


def interval(ours: Statistic, theirs: Statistic | None = None) -> Interval:
    """Compute the interval of a share or, with `theirs`, of the difference ours - theirs on the same prompts.

    Both are a `Mean` of 1 for images that pass and 0 for others; NaN where a part does not apply to an image.
    """
    tables = _tables(ours)
    if theirs is None:
        return mean_of_parts([wilson(share(table), effective_count(table)) for table in tables])
    return mean_of_parts([paired_difference(a, b) for a, b in zip(tables, _tables(theirs), strict=True)])


def _tables(statistic: Statistic) -> list[Tensor]:
    assert isinstance(statistic, Mean), "a share needs a Mean"
    return [_by_prompt(part, statistic.features) for part in statistic.parts]


def wilson(share: float, count: float) -> Interval:
    """Compute the Wilson score interval of a share of `count` independent samples."""
    z2 = NORMAL_QUANTILE**2 / count
    center = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return Interval(share, max(0.0, center - half), min(1.0, center + half))


def share(table: Tensor) -> float:
    """Compute the share of images that pass from a table [P, 2]: images that pass, images, for each
    prompt.
    """
    return float(table[:, 0].sum() / table[:, 1].sum())


def effective_count(table: Tensor) -> float:
    """Compute the number of independent images with the same variance as those of a table [P, 2].

    Images of one prompt are correlated, so the result is between the number of prompts (all images of a
    prompt pass or fail together) and the number of images (independent). It is the number of prompts if the
    correlation cannot be estimated: for few prompts, or if all or none of the images pass.
    """
    table = table[table[:, 1] > 0]
    prompts, images, mean = len(table), float(table[:, 1].sum()), share(table)
    if prompts < MIN_SAMPLES or mean in (0, 1):
        return prompts
    residual = table[:, 0] - mean * table[:, 1]
    variance = float(residual.square().sum()) / images**2 * prompts / (prompts - 1)
    return min(max(mean * (1 - mean) / max(variance, 1e-12), prompts), images)


def paired_difference(ours: Tensor, theirs: Tensor) -> Interval:
    """Compute the interval of the difference of two shares on the same prompts, from tables [P, 2].

    Newcombe 1998, method 10: the interval ends of both shares are combined as errors with the correlation of
    the prompts' shares.
    """
    a, b = (wilson(share(table), effective_count(table)) for table in (ours, theirs))
    both = (ours[:, 1] > 0) & (theirs[:, 1] > 0)
    correlation = _correlation(*(table[both, 0] / table[both, 1] for table in (ours, theirs)))

    def joint(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x**2 - 2 * correlation * x * y + y**2))

    value = a.value - b.value
    low = value - joint(a.value - a.low, b.high - b.value)
    return Interval(value, low, value + joint(a.high - a.value, b.value - b.low))


def mean_of_parts(parts: Sequence[Interval]) -> Interval:
    """Compute the interval of the mean of independent values from their intervals.

    Distances to the interval ends are added in quadrature (MOVER, Zou and Donner 2008).
    """
    value = sum(part.value for part in parts) / len(parts)
    low = math.hypot(*(part.value - part.low for part in parts)) / len(parts)
    high = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Interval(value, value - low, value + high)


def _by_prompt(values: Tensor, features: ImageFeatures) -> Tensor:
    """Count images that pass and images with a value for each prompt, float64 [P, 2]."""
    counts = ~values.isnan()
    table = torch.zeros(features.prompts, 2, dtype=torch.float64)
    rows = torch.stack([values[counts].double(), torch.ones(int(counts.sum()), dtype=torch.float64)], 1)
    return table.index_add_(0, features.prompt[counts], rows)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Compute Pearson's correlation of shares [P]; if positive, with Newcombe's continuity correction."""
    if len(a) == 0:
        return 0.0
    covariance = float(((a - a.mean()) * (b - b.mean())).mean())
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * len(a)))
    width = float(a.std(correction=0) * b.std(correction=0))
    return covariance / width if width > 0 else 0.0

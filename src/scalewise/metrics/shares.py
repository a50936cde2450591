"""95% intervals of shares: Wilson's (1927), of paired differences Newcombe's, of means over parts MOVER.

A share of few prompts, or one near 0 or 1, is skewed and may not spread at all between halves of the sample,
so that resampling says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scalewise.metrics.base import Mean, Seen, Statistic
from scalewise.metrics.intervals import FEWEST, NORMAL, Interval


def interval(ours: Statistic, theirs: Statistic | None = None) -> Interval:
    """The interval of a share or, with `theirs`, of the difference ours - theirs over the same prompts.

    Both are a `Mean` of 1 for an image that passes, else 0, NaN where the part does not apply to it.
    """
    tables = _tables(ours)
    if theirs is None:
        return mean_of_parts([wilson(share(table), effective_count(table)) for table in tables])
    return mean_of_parts([paired_difference(a, b) for a, b in zip(tables, _tables(theirs), strict=True)])


def _tables(statistic: Statistic) -> list[Tensor]:
    assert isinstance(statistic, Mean), "shares are means"
    return [_by_prompt(part, statistic.seen) for part in statistic.parts]


def wilson(share: float, count: float) -> Interval:
    """The score interval of a share of `count` independent samples."""
    z2 = NORMAL**2 / count
    center = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return Interval(share, max(0.0, center - half), min(1.0, center + half))


def share(table: Tensor) -> float:
    """The share of images that pass, of a table by prompt [P, 2]: how many pass, of how many."""
    return float(table[:, 0].sum() / table[:, 1].sum())


def effective_count(table: Tensor) -> float:
    """How many independent images spread as those of a table [P, 2] do: images of one prompt are alike.

    From the number of prompts, as if all images of a prompt passed or failed together, to that of images.
    Of few prompts, and where all pass or none, the likeness cannot be measured: there prompts count.
    """
    table = table[table[:, 1] > 0]
    prompts, images, mean = len(table), float(table[:, 1].sum()), share(table)
    if prompts < FEWEST or mean in (0, 1):
        return prompts
    residual = table[:, 0] - mean * table[:, 1]
    variance = float(residual.square().sum()) / images**2 * prompts / (prompts - 1)
    return min(max(mean * (1 - mean) / max(variance, 1e-12), prompts), images)


def paired_difference(ours: Tensor, theirs: Tensor) -> Interval:
    """The interval of a difference of shares of the same prompts, from tables by prompt [P, 2] each.

    Newcombe 1998, method 10: the distances of both Wilson intervals' ends, added as errors that correlate as
    the prompts' shares do.
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
    """The interval of the mean of independent figures: the distances of their ends, added as errors are.

    MOVER (Zou and Donner 2008).
    """
    value = sum(part.value for part in parts) / len(parts)
    low = math.hypot(*(part.value - part.low for part in parts)) / len(parts)
    high = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Interval(value, value - low, value + high)


def _by_prompt(values: Tensor, seen: Seen) -> Tensor:
    """How many images of each prompt pass, and how many count, float64 [P, 2]."""
    counts = ~values.isnan()
    table = torch.zeros(seen.prompts, 2, dtype=torch.float64)
    rows = torch.stack([values[counts].double(), torch.ones(int(counts.sum()), dtype=torch.float64)], 1)
    return table.index_add_(0, seen.prompt[counts], rows)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of prompts' shares [P] each; a positive one less Newcombe's correction for continuity."""
    if len(a) == 0:
        return 0.0
    covariance = float(((a - a.mean()) * (b - b.mean())).mean())
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * len(a)))
    width = float(a.std(correction=0) * b.std(correction=0))
    return covariance / width if width > 0 else 0.0

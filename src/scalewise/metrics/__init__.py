"""Figures of drawn images. A metric is one file that offers a `Metric`, and a line here."""

from __future__ import annotations

import torch

from scalewise.metrics import (
    clip,
    diversity,
    features,
    frechet,
    geneval,
    hpsv3,
    image_reward,
    preference,
    shares,
    spectral,
    video,
)
from scalewise.metrics.base import Metric, Seen, Statistic, prompts_of
from scalewise.metrics.clip import ClipScorer
from scalewise.metrics.extras import Extra
from scalewise.metrics.intervals import FEWEST, Interval, Resampled, bootstrap_interval, resample

EXTRAS: dict[str, Extra] = {
    extra.name: extra
    for extra in (
        features.FID, features.FD, preference.PICKSCORE, preference.HPSV2, image_reward.EXTRA, hpsv3.EXTRA,
        geneval.EXTRA, spectral.EXTRA, video.EXTRA,
    )
}  # fmt: skip
"""What `--metric` can ask for."""

OWN: tuple[Metric, ...] = (frechet.METRIC, *clip.METRICS, diversity.METRIC)
"""What the scorer alone tells."""

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (*OWN, *(m for extra in EXTRAS.values() for m in extra.metrics))
}

__all__ = [
    "EXTRAS",
    "FEWEST",
    "METRICS",
    "OWN",
    "ClipScorer",
    "Interval",
    "Metric",
    "Resampled",
    "Seen",
    "Statistic",
    "bootstrap_interval",
    "measure",
    "resample",
]


def measure(
    seen: Seen, *, against: Seen | None = None, rounds: int | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Take every metric that `seen` allows, with its 95% interval over prompts.

    With `against`, images of the same prompts by another contender: the *differences* seen - against, over
    the same halves of the prompts. They say far more than two intervals side by side: hard prompts are hard
    for both. `rounds` of resampling: None = as many as befit the metric.

    Shares have intervals of their own kind at every count (`shares.py`); other figures have none where fewer
    than `FEWEST` prompts have a value.
    """
    found: dict[str, Interval] = {}
    for name, metric in METRICS.items():
        ours = metric.statistic(seen)
        theirs = metric.statistic(against) if against else None
        if ours is None or (against and theirs is None):
            continue
        if metric.share:
            found[name] = shares.interval(ours, theirs)
            continue
        rests_on = [prompts_of(ours, seen)]
        rests_on += [prompts_of(theirs, against)] if theirs and against else []
        figure = _difference(ours, theirs) if theirs else ours
        if min(rests_on) < FEWEST:
            found[name] = Interval.unknown(figure(torch.arange(seen.prompts)))
            continue
        interval = bootstrap_interval(figure, seen.prompts, rounds=rounds or metric.rounds, seed=seed)
        width = metric.bounds[1] - metric.bounds[0]
        found[name] = interval.within(*((-width, width) if theirs else metric.bounds))
    return found


def _difference(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda prompts: ours(prompts) - theirs(prompts)

"""Metrics of generated images. To add one, write a file with a `Metric` and list it here."""

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
    motion,
    preference,
    scene,
    shares,
    spectral,
    video,
)
from scalewise.metrics.base import ImageFeatures, Metric, Statistic, count_prompts
from scalewise.metrics.clip import ClipScorer
from scalewise.metrics.extras import Extra
from scalewise.metrics.intervals import MIN_SAMPLES, Interval, Resampled, bootstrap_interval, resample

EXTRAS: dict[str, Extra] = {
    extra.name: extra
    for extra in (
        features.FID, features.FD, preference.PICKSCORE, preference.HPSV2, image_reward.EXTRA, hpsv3.EXTRA,
        geneval.EXTRA, scene.EXTRA, spectral.EXTRA, video.EXTRA, motion.EXTRA,
    )
}  # fmt: skip
"""Metrics that `--metric` selects, by name."""

SCORER_METRICS: tuple[Metric, ...] = (frechet.METRIC, *clip.METRICS, diversity.METRIC)
"""Metrics that need only the scorer (a CLIP model)."""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*SCORER_METRICS, *(m for extra in EXTRAS.values() for m in extra.metrics))
}

__all__ = [
    "EXTRAS",
    "METRICS",
    "MIN_SAMPLES",
    "SCORER_METRICS",
    "ClipScorer",
    "ImageFeatures",
    "Interval",
    "Metric",
    "Resampled",
    "Statistic",
    "bootstrap_interval",
    "measure",
    "resample",
]


def measure(
    features: ImageFeatures, *, against: ImageFeatures | None = None, rounds: int | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Compute every metric that `features` allows, with a 95% interval over prompts.

    With `against` (another sampler's images of the same prompts), compute the *differences* features -
    against over the same halves of the prompts. These are more precise than two separate intervals, because a
    hard prompt is hard for both samplers. `rounds` is the number of resampling rounds; None uses the
    metric's default.

    Shares always have an interval (`shares.py`); other metrics have one only if at least `MIN_SAMPLES`
    prompts have a value.
    """
    intervals: dict[str, Interval] = {}
    for name, metric in METRICS.items():
        ours = metric.statistic(features)
        theirs = metric.statistic(against) if against else None
        if ours is None or (against and theirs is None):
            continue
        if metric.share:
            intervals[name] = shares.interval(ours, theirs)
            continue
        prompt_counts = [count_prompts(ours, features)]
        prompt_counts += [count_prompts(theirs, against)] if theirs and against else []
        combined = _difference(ours, theirs) if theirs else ours
        if min(prompt_counts) < MIN_SAMPLES:
            intervals[name] = Interval.unknown(combined(torch.arange(features.prompts)))
            continue
        interval = bootstrap_interval(combined, features.prompts, rounds=rounds or metric.rounds, seed=seed)
        width = metric.bounds[1] - metric.bounds[0]
        intervals[name] = interval.within(*((-width, width) if theirs else metric.bounds))
    return intervals


def _difference(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda prompts: ours(prompts) - theirs(prompts)

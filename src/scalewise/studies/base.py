"""Studies: variants that are trained, sampled and evaluated in the same way, and claims about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Literal

from scalewise.metrics import METRICS, Interval, Resampled
from scalewise.metrics.intervals import t_quantile

Verdict = Literal["reproduced", "not reproduced", "undecided"]


@dataclass(frozen=True)
class Variant:
    """A student that the study trains, or a sampler that needs no training."""

    name: str
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe `mini`. Iterations and batch size are those of the recipe for all students."""
    sampling_overrides: tuple[str, ...] = ()
    """Further overrides for sampling only, such as a schedule that the student was not trained with."""
    sampler: str = ""
    """Sampler to use instead of a student: teacher, teacher:4, undistilled."""
    start: Start | None = None
    """If set, the teacher continues from noised samples of its dataset."""


# The repr of this class is part of the names of stored files: renaming it or its fields invalidates them.
@dataclass(frozen=True)
class Start:
    """Noised latents of known images, at the timestep of the teacher's schedule nearest to t."""

    how: Literal["noised", "enlarged, noised", "noised, enlarged"]
    """Noise the full-size latent, or the latent of the smallest scale after or before upscaling it."""
    t: float


@dataclass(frozen=True)
class Claim:
    """Claim that a variant is better than another one, or as good as it if `reference` is given.

    "As good" allows a loss of `tolerance` times the difference between the two variants of `reference`. A
    tolerance relative to the metric itself would mean little: a CLIP score of 70 instead of 77 can be that of
    a broken model.
    """

    text: str
    variant: str
    other: str
    reference: tuple[str, str] | None = None
    tolerance: float = 0.1

    @property
    def relation(self) -> Literal["better", "as good"]:
        """The claimed relation of `variant` to `other`."""
        return "as good" if self.reference else "better"

    @property
    def variants(self) -> set[str]:
        """Names of all variants needed to evaluate the claim."""
        return {self.variant, self.other, *(self.reference or ())}


@dataclass(frozen=True)
class Study:
    """One or more claims of the paper that can be checked on the mini."""

    name: str
    title: str
    source: str
    """Section and table of the paper."""
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    differences: str
    """Differences from the setting of the paper."""
    metrics: tuple[str, ...] = ("frechet", "clip_score")
    """Metrics that decide the claims."""
    extra_metrics: tuple[str, ...] = ("spectrum",)
    """Metrics that are only shown."""

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """Metrics to compute, without duplicates."""
        return tuple(dict.fromkeys((*self.metrics, *self.extra_metrics)))

    @property
    def trained(self) -> set[str]:
        """Names of the variants that are students."""
        return {v.name for v in self.variants if not v.sampler and not v.start}

    @property
    def starts_from_data(self) -> bool:
        """Whether the variants continue from samples of the dataset instead of sampling held-out captions."""
        return any(v.start for v in self.variants)

    def __post_init__(self) -> None:
        names = [v.name for v in self.variants]
        assert len(set(names)) == len(names), "names of variants must be different"
        assert {name for c in self.claims for name in c.variants} <= set(names), "claims name known variants"
        assert set(self.all_metrics) <= set(METRICS), "metrics must be known"
        assert not self.starts_from_data or all(v.start for v in self.variants), "all variants share prompts"


@dataclass(frozen=True)
class Effect:
    """A difference between variants with its uncertainty."""

    value: float
    """Mean over S seeds."""
    prompt_error: float
    """Standard error over prompts."""
    count: int
    """Number of prompts."""
    by_seed: tuple[float, ...]
    """The difference for each seed, [S]."""
    trained: bool = True
    """Whether each seed is a separate training. If not, a seed only changes the noise, which differs for each
    image in any case, so the error over prompts covers it."""

    @property
    def interval(self) -> Interval:
        """The 95% interval over prompts and trainings; unknown for a single training seed.

        The squares of two half-widths are added: t(prompts - 1) times the standard error over prompts, and
        t(S - 1) times the standard deviation over seeds / sqrt(S). Whatever the spread of the seeds, a true
        effect of 0 lies below such an interval in at most 2.5% of studies (simulation in docs/log.md).
        """
        half = t_quantile(self.count - 1) * self.prompt_error
        if self.trained:
            seeds = len(self.by_seed)
            if seeds < 2:
                return Interval.unknown(self.value)
            half = math.hypot(half, t_quantile(seeds - 1) * stdev(self.by_seed) / math.sqrt(seeds))
        return Interval(self.value, self.value - half, self.value + half)

    @classmethod
    def from_resampled(cls, difference: Resampled, by_seed: Sequence[float], *, trained: bool) -> Effect:
        """Build an effect from a difference resampled over prompts (mean over seeds) and its value per
        seed.
        """
        return cls(difference.value, difference.error, difference.count, tuple(by_seed), trained)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that a verdict depends on, as stored in JSON."""
        return {
            "interval": self.interval, "error_over_prompts": self.prompt_error,
            "by_seed": self.by_seed, "trained": self.trained,
        }  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Result of a claim in one metric."""

    claim: Claim
    metric: str
    gain: Effect
    """How much better `claim.variant` is than `claim.other`; negative if it is worse."""
    reference_gain: Effect | None = None
    """How much better the first variant of `claim.reference` is than the second."""
    margin: Effect | None = None
    """The gain plus the allowed loss. Both are uncertain, and are resampled together."""

    @property
    def allowed_loss(self) -> float:
        """How much worse `claim.variant` may be."""
        return self.claim.tolerance * self.reference_gain.value if self.reference_gain else 0.0

    @property
    def verdict(self) -> Verdict:
        """Reproduced if the whole interval supports the claim, not reproduced if it supports the opposite.

        Undecided without an interval, if the reference variants may be equal, or if an end of the interval is
        so close to 0 that other random halves could move it across: within a fortieth of the interval, which
        is three standard errors of a standard deviation estimated from 2,000 rounds.
        """
        if self.reference_gain and self.reference_gain.interval.low <= 0:
            return "undecided"
        decisive = (self.margin or self.gain).interval
        if not decisive.known:
            return "undecided"
        chance = (decisive.high - decisive.low) / 40
        if decisive.low > chance:
            return "reproduced"
        return "not reproduced" if decisive.high < -chance else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as stored in JSON (the keys are part of the file format)."""
        return {
            "claim": self.claim.text, "arm": self.claim.variant, "other": self.claim.other,
            "relation": self.claim.relation, "yardstick": self.claim.reference, "metric": self.metric,
            "gain": self.gain, "stake": self.reference_gain, "allowed": self.allowed_loss,
            "leeway": self.margin, "verdict": self.verdict,
        }  # fmt: skip


def evaluate_claim(
    claim: Claim, metric: str, resampled: Mapping[str, Resampled], by_seed: Mapping[str, Sequence[float]], *,
    trained: Collection[str],
) -> Finding:  # fmt: skip
    """Evaluate a claim in one metric, given the values of the metric by variant.

    `resampled` has means over seeds with the same random halves of the prompts for all variants, `by_seed`
    the values of each seed. `trained` names the variants whose seeds are separate trainings.
    """
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0

    def difference(one: str, other: str) -> tuple[Resampled, list[float]]:
        seeds = [sign * (a - b) for a, b in zip(by_seed[one], by_seed[other], strict=True)]
        return sign * (resampled[one] - resampled[other]), seeds

    gain, seed_gains = difference(claim.variant, claim.other)
    gain_trained = bool({claim.variant, claim.other} & set(trained))
    gain_effect = Effect.from_resampled(gain, seed_gains, trained=gain_trained)
    if not claim.reference:
        return Finding(claim, metric, gain_effect)
    reference, seed_references = difference(*claim.reference)
    margin = gain + claim.tolerance * reference
    seed_margins = [g + claim.tolerance * r for g, r in zip(seed_gains, seed_references, strict=True)]
    reference_trained = bool(set(claim.reference) & set(trained))
    return Finding(
        claim, metric, gain_effect,
        Effect.from_resampled(reference, seed_references, trained=reference_trained),
        Effect.from_resampled(margin, seed_margins, trained=gain_trained or reference_trained),
    )  # fmt: skip


def combine_verdicts(findings: Sequence[Finding]) -> Verdict:
    """Return the verdict shared by all metrics, or undecided if they differ."""
    verdicts = {f.verdict for f in findings}
    return verdicts.pop() if len(verdicts) == 1 else "undecided"

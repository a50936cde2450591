"""What a study is: arms that are trained, drawn and judged alike, and the paper's claims about them."""

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
class Arm:
    """One way to make pictures: a student that the study trains, or a contender that needs no training."""

    name: str
    overrides: tuple[str, ...] = ()
    """Of the recipe `mini`; every student has its iterations and batch."""
    drawn: tuple[str, ...] = ()
    """Further overrides that only the sampler sees: a schedule that the student was not trained for."""
    contender: str = ""
    """Instead of a student: teacher, teacher:4, undistilled."""
    start: Start | None = None
    """The teacher goes on from noised samples of its set."""


@dataclass(frozen=True)
class Start:
    """Latents of known pictures brought to the level nearest to t in the teacher's schedule."""

    how: Literal["noised", "enlarged, noised", "noised, enlarged"]
    """From the full-size latent, or from that of the schedule's first scale."""
    t: float


@dataclass(frozen=True)
class Claim:
    """That one arm is better than another; or as good, if a `yardstick` is given: worse by at most a part
    (`tolerance`) of that by which the yardstick's first arm is better than its second.

    A share of the figure itself would say little: a CLIP score of 70 of 77 may be that of a broken model.
    """

    text: str
    arm: str
    other: str
    yardstick: tuple[str, str] | None = None
    tolerance: float = 0.1

    @property
    def relation(self) -> Literal["better", "as good"]:
        """What is claimed."""
        return "as good" if self.yardstick else "better"

    @property
    def named(self) -> set[str]:
        """All arms that it takes to judge it."""
        return {self.arm, self.other, *(self.yardstick or ())}


@dataclass(frozen=True)
class Study:
    """A claim of the paper, or some, made checkable on the mini."""

    name: str
    title: str
    source: str
    """Where the paper says so."""
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    differs: str
    """What differs from the paper's setting."""
    metrics: tuple[str, ...] = ("frechet", "clip_score")
    """What the claims are judged by."""
    also: tuple[str, ...] = ("spectrum",)
    """Figures that are shown beside them."""

    @property
    def figures(self) -> tuple[str, ...]:
        """All metrics, each once."""
        return tuple(dict.fromkeys((*self.metrics, *self.also)))

    @property
    def trained(self) -> set[str]:
        """The arms that are students."""
        return {arm.name for arm in self.arms if not arm.contender and not arm.start}

    @property
    def continues(self) -> bool:
        """Whether the arms go on from samples of the set, instead of drawing held-out captions."""
        return any(arm.start for arm in self.arms)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        assert len(set(names)) == len(names), "arms have different names"
        assert {name for c in self.claims for name in c.named} <= set(names), "claims are about arms"
        assert set(self.figures) <= set(METRICS), "metrics are known"
        assert not self.continues or all(arm.start for arm in self.arms), "arms draw the same prompts"


@dataclass(frozen=True)
class Effect:
    """A difference between arms, and what makes it uncertain."""

    value: float
    """Mean over S seeds."""
    prompts: float
    """Its standard error over prompts."""
    count: int
    """Of prompts."""
    by_seed: tuple[float, ...]
    """The same for every seed alone, [S]."""
    trained: bool = True
    """Whether a seed decides a training. Else it decides noise alone, which every image has its own of, and
    the error over prompts holds all."""

    @property
    def interval(self) -> Interval:
        """The 95% interval, over prompts and trainings; unknown with a single seed of training.

        The squares of both parts' half widths add up: t(prompts - 1) times the error over prompts, and
        t(S - 1) times the standard deviation of seeds / sqrt(S). Whatever the seeds' spread, a true effect of
        0 lies below such an interval in at most 2.5% of studies (docs/log.md has the simulation).
        """
        half = t_quantile(self.count - 1) * self.prompts
        if self.trained:
            seeds = len(self.by_seed)
            if seeds < 2:
                return Interval.unknown(self.value)
            half = math.hypot(half, t_quantile(seeds - 1) * stdev(self.by_seed) / math.sqrt(seeds))
        return Interval(self.value, self.value - half, self.value + half)

    @classmethod
    def of(cls, figure: Resampled, by_seed: Sequence[float], *, trained: bool) -> Effect:
        """Of a difference over the same halves of all prompts and seeds, and of every seed alone."""
        return cls(figure.value, figure.error, figure.count, tuple(by_seed), trained)

    def to_dict(self) -> dict[str, Any]:
        """All that a verdict rests on, as stored in JSON."""
        return {
            "interval": self.interval, "error_over_prompts": self.prompts,
            "by_seed": self.by_seed, "trained": self.trained,
        }  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a claim came to in one figure."""

    claim: Claim
    metric: str
    gain: Effect
    """By how much the arm is better than the other; below 0 it is worse."""
    stake: Effect | None = None
    """By how much the yardstick's first arm is better than its second, if there is one."""
    leeway: Effect | None = None
    """The gain and what the claim lets the arm lose, together: paired, so that both are uncertain at once."""

    @property
    def allowed(self) -> float:
        """How much worse the claim lets the arm be."""
        return self.claim.tolerance * self.stake.value if self.stake else 0.0

    @property
    def verdict(self) -> Verdict:
        """Reproduced if all of the interval says so, not reproduced if all of it says the opposite.

        Nothing is decided by a yardstick that may be of no length, without an interval, or by an end that
        other random halves could move across 0: by up to a fortieth of the interval, three standard errors of
        a standard deviation of 2,000 rounds.
        """
        if self.stake and self.stake.interval.low <= 0:
            return "undecided"
        decisive = (self.leeway or self.gain).interval
        if not decisive.known:
            return "undecided"
        chance = (decisive.high - decisive.low) / 40
        if decisive.low > chance:
            return "reproduced"
        return "not reproduced" if decisive.high < -chance else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """What was found, as stored in JSON."""
        return {
            "claim": self.claim.text, "arm": self.claim.arm, "other": self.claim.other,
            "relation": self.claim.relation, "yardstick": self.claim.yardstick, "metric": self.metric,
            "gain": self.gain, "stake": self.stake, "allowed": self.allowed, "leeway": self.leeway,
            "verdict": self.verdict,
        }  # fmt: skip


def find(
    claim: Claim, metric: str, figures: Mapping[str, Resampled], by_seed: Mapping[str, Sequence[float]], *,
    trained: Collection[str],
) -> Finding:  # fmt: skip
    """Judge a claim in a metric by the arms' figures, over the same halves of all prompts and seeds, and by
    those of every seed alone. `trained` names the arms whose seed decides a training.
    """
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0

    def difference(one: str, other: str) -> tuple[Resampled, list[float]]:
        seeds = [sign * (a - b) for a, b in zip(by_seed[one], by_seed[other], strict=True)]
        return sign * (figures[one] - figures[other]), seeds

    gain, gains = difference(claim.arm, claim.other)
    differs = bool({claim.arm, claim.other} & set(trained))
    found = Effect.of(gain, gains, trained=differs)
    if not claim.yardstick:
        return Finding(claim, metric, found)
    stake, stakes = difference(*claim.yardstick)
    leeway = gain + claim.tolerance * stake
    leeways = [g + claim.tolerance * s for g, s in zip(gains, stakes, strict=True)]
    measure_differs = bool(set(claim.yardstick) & set(trained))
    return Finding(
        claim, metric, found, Effect.of(stake, stakes, trained=measure_differs),
        Effect.of(leeway, leeways, trained=differs or measure_differs),
    )  # fmt: skip


def overall(findings: Sequence[Finding]) -> Verdict:
    """One verdict over several figures: what all of them say."""
    verdicts = {f.verdict for f in findings}
    return verdicts.pop() if len(verdicts) == 1 else "undecided"

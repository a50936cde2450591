"""What a study is: arms that are trained, drawn and judged alike, and the paper's claims about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scalewise.metrics import METRICS, Interval, Resampled

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
class Finding:
    """What a claim came to in one figure."""

    claim: Claim
    metric: str
    gain: Interval
    """By how much the arm is better than the other; below 0 it is worse."""
    by_seed: tuple[float, ...]
    """The same for every seed alone."""
    stake: Interval | None = None
    """By how much the yardstick's first arm is better than its second, if there is one."""
    leeway: Interval | None = None
    """The gain and what the claim lets the arm lose, together: paired, so that both are uncertain at once."""

    @property
    def allowed(self) -> float:
        """How much worse the claim lets the arm be."""
        return self.claim.tolerance * self.stake.value if self.stake else 0.0

    @property
    def verdict(self) -> Verdict:
        """Reproduced if all of the interval and every seed say so, not reproduced if all say the opposite.

        Nothing is decided by a yardstick that may be of no length, or by an end that other random halves
        could move across 0: by up to a twentieth of the interval, three standard errors of a 2.5 % quantile
        of 2,000 rounds.
        """
        if self.stake and self.stake.low <= 0:
            return "undecided"
        decisive = self.leeway or self.gain
        chance = (decisive.high - decisive.low) / 20
        if decisive.low > chance and all(gain > -self.allowed for gain in self.by_seed):
            return "reproduced"
        if decisive.high < -chance and all(gain < -self.allowed for gain in self.by_seed):
            return "not reproduced"
        return "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "claim": self.claim.text, "arm": self.claim.arm, "other": self.claim.other,
            "relation": self.claim.relation, "yardstick": self.claim.yardstick, "metric": self.metric,
            "gain": self.gain.to_list(), "by_seed": list(self.by_seed),
            "stake": self.stake.to_list() if self.stake else None, "allowed": self.allowed,
            "leeway": self.leeway.to_list() if self.leeway else None, "verdict": self.verdict,
        }  # fmt: skip


def find(
    claim: Claim, metric: str, figures: Mapping[str, Resampled], by_seed: Mapping[str, Sequence[float]]
) -> Finding:
    """Judge a claim in a metric by the arms' figures, over the same halves of all prompts and seeds, and by
    those of every seed alone.
    """
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0
    gain = sign * (figures[claim.arm] - figures[claim.other])
    seeds = [sign * (a - b) for a, b in zip(by_seed[claim.arm], by_seed[claim.other], strict=True)]
    if not claim.yardstick:
        return Finding(claim, metric, gain.interval(), tuple(seeds))
    better, worse = claim.yardstick
    stake = sign * (figures[better] - figures[worse])
    leeway = gain + claim.tolerance * stake
    return Finding(claim, metric, gain.interval(), tuple(seeds), stake.interval(), leeway.interval())


def overall(findings: Sequence[Finding]) -> Verdict:
    """One verdict over several figures: what all of them say."""
    verdicts = {f.verdict for f in findings}
    return verdicts.pop() if len(verdicts) == 1 else "undecided"

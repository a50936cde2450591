"""What a study is: arms that are trained, drawn and judged alike, and the paper's claims about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scalewise.metrics import METRICS, Interval

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
    (`tolerance`) of the difference between the yardstick's two arms.

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

    @property
    def continues(self) -> bool:
        """Whether the arms go on from samples of the set, instead of drawing held-out captions."""
        return any(arm.start for arm in self.arms)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        assert len(set(names)) == len(names), "arms have different names"
        assert {name for c in self.claims for name in c.named} <= set(names), "claims are about arms"
        assert set(self.metrics) <= set(METRICS), "metrics are known"
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
    allowed: float
    """How much worse the claim lets the arm be."""

    @property
    def verdict(self) -> Verdict:
        """Reproduced if all of the interval and every seed say so, not reproduced if all say the opposite."""
        if self.gain.low > -self.allowed and all(gain > -self.allowed for gain in self.by_seed):
            return "reproduced"
        if self.gain.high < -self.allowed and all(gain < -self.allowed for gain in self.by_seed):
            return "not reproduced"
        return "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "claim": self.claim.text, "arm": self.claim.arm, "other": self.claim.other,
            "relation": self.claim.relation, "yardstick": self.claim.yardstick, "metric": self.metric,
            "gain": self.gain.to_list(),
            "by_seed": list(self.by_seed), "allowed": self.allowed, "verdict": self.verdict,
        }  # fmt: skip


def find(
    claim: Claim, metric: str, difference: Interval, by_seed: Sequence[float], *, figures: Mapping[str, float]
) -> Finding:
    """Judge a claim by the difference arm - other in a metric, and by that of every seed; `figures` are those
    of all arms.
    """
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0
    bounds = sorted((sign * difference.low, sign * difference.high))
    allowed = 0.0
    if claim.yardstick:
        one, two = claim.yardstick
        allowed = claim.tolerance * abs(figures[one] - figures[two])
    gain = Interval(sign * difference.value, *bounds)
    return Finding(claim, metric, gain, tuple(sign * value for value in by_seed), allowed)


def overall(findings: Sequence[Finding]) -> Verdict:
    """One verdict over several figures: what the decided ones agree on."""
    decided = {f.verdict for f in findings} - {"undecided"}
    return decided.pop() if len(decided) == 1 else "undecided"

"""The study of training cost, which times iterations and needs no student."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalewise.bench import Spread
from scalewise.build import Progress
from scalewise.metrics import Interval
from scalewise.recipes import find_recipe
from scalewise.studies.base import Verdict
from scalewise.studies.page import plot_panels
from scalewise.training_cost import GB, TrainingCost, measure_training

NAME, TITLE, SOURCE = "training-cost", "What a training iteration costs", "section 5.3, table 5"


@dataclass(frozen=True)
class CostClaim:
    """That one kind of iteration takes less time than another."""

    text: str
    ratio: str
    """As `TrainingCost.ratios` names it."""
    paper: float
    """The ratio that the paper's table gives, about."""

    def verdict(self, ratio: Spread) -> Verdict:
        """Reproduced if the interval of one / other lies on the paper's side of 1."""
        less = self.paper < 1
        if ratio.high < 1 or ratio.low > 1:
            return "reproduced" if (ratio.high < 1) == less else "not reproduced"
        return "undecided"


CLAIMS = (
    CostClaim(
        "scale-wise training is cheaper", "scale-wise, full loss / full scale, full loss", 1 / 2
    ),
    CostClaim("so it is with MMD alone", "scale-wise, MMD alone / full scale, MMD alone", 1 / 2),
    CostClaim("the full loss costs more than MMD alone", "scale-wise, full loss / scale-wise, MMD alone", 7),
)  # fmt: skip
DIFFERS = (
    "The mini on a processor instead of SD3.5 Medium on GPUs. The fake model is updated as often for one "
    "update of the student as the recipe `mini` says; with MMD alone it does not exist. Peak memory is that "
    "of tensors, base and optimizers included."
)


def run_cost(out: Path, *, rounds: int, progress: Progress) -> dict[str, Verdict]:
    """Measure and write training-cost.json, .md and .png; returns the verdicts by claim."""
    cost = measure_training(find_recipe("mini"), rounds=rounds, progress=progress)
    verdicts = {claim.text: claim.verdict(cost.ratios[claim.ratio]) for claim in CLAIMS}
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"study": NAME, "source": SOURCE, **cost.to_dict(), "verdicts": verdicts}
    (out / f"{NAME}.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / f"{NAME}.md").write_text(page(cost, verdicts, rounds))
    plot(cost, out / f"{NAME}.png")
    return verdicts


def plot(cost: TrainingCost, path: Path) -> None:
    """Seconds and peak memory of every mode."""
    seconds = [Interval(m.seconds.median, m.seconds.low, m.seconds.high) for m in cost.modes]
    peaks = [Interval(m.peak / GB, m.peak / GB, m.peak / GB) for m in cost.modes]
    panels = {"an iteration, seconds": seconds, "peak memory, GB": peaks}
    plot_panels([mode.name for mode in cost.modes], panels, path)


def page(cost: TrainingCost, verdicts: dict[str, Verdict], rounds: int) -> str:
    """The study's page in markdown."""
    lines = ["| claim | verdict | measured ratio | paper's, about |", "| --- | --- | ---: | ---: |"]
    for claim in CLAIMS:
        ratio = cost.ratios[claim.ratio]
        measured = f"{ratio.median:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]"
        lines.append(f"| {claim.text} | **{verdicts[claim.text]}** | {measured} | {claim.paper:.2g} |")
    parts = [
        f"# {TITLE}\n\nPaper: {SOURCE}.\n",
        f"    scalewise study {NAME} --rounds {rounds}\n",
        "\n".join(lines) + "\n",
        cost.markdown,
        f"![seconds and memory by mode]({NAME}.png)\n",
        f"Medians of {rounds} rounds, in each of which every mode runs once over all steps, on "
        f"{cost.setting['device']}; in brackets the 95 % interval of the median, or the range of fewer than "
        "six rounds. Ratios are taken within rounds. A claim is reproduced if the whole interval lies on "
        "the paper's side of 1.\n",
        f"## What differs from the paper\n{DIFFERS}\n",
    ]
    return "\n".join(parts)

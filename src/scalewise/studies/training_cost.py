"""The study of training cost, which times iterations and needs no student."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scalewise.common import markdown
from scalewise.common.checkpoint import write_atomically
from scalewise.common.progress import Progress
from scalewise.common.results import write_json, write_text
from scalewise.config.presets import find_recipe
from scalewise.data.shards import exclusive
from scalewise.evaluation.training_cost import GB, TrainingCost, measure_training
from scalewise.metrics import Interval
from scalewise.metrics.intervals import FEWEST_ROUNDS
from scalewise.studies.base import Verdict
from scalewise.studies.page import plot_panels

NAME, TITLE, SOURCE = "training-cost", "What a training iteration costs", "section 5.3, table 5"


@dataclass(frozen=True)
class CostClaim:
    """That one kind of iteration takes less time than another."""

    text: str
    ratio: str
    """As `TrainingCost.ratios` names it."""
    paper: float
    """The ratio of the table's figures for SD3.5 Medium."""

    def verdict(self, ratio: Interval, rounds: int) -> Verdict:
        """Reproduced if the interval of one / other lies on the paper's side of 1; fewer than six rounds have
        no interval, and decide nothing.
        """
        if rounds < FEWEST_ROUNDS:
            return "undecided"
        if not ratio.excludes(1):
            return "undecided"
        return "reproduced" if (ratio.value < 1) == (self.paper < 1) else "not reproduced"


CLAIMS = (
    CostClaim(
        "scale-wise training is cheaper", "scale-wise, full loss / full scale, full loss", 3.2 / 7.5
    ),
    CostClaim("so it is with MMD alone", "scale-wise, MMD alone / full scale, MMD alone", 0.4 / 1.0),
    CostClaim(
        "the full loss costs more than MMD alone", "scale-wise, full loss / scale-wise, MMD alone", 3.2 / 0.4
    ),
)  # fmt: skip
DIFFERS = (
    "The mini on a processor instead of SD3.5 Medium on GPUs. The fake model is updated as often for one "
    "update of the student as the recipe `mini` says; with MMD alone it does not exist. Peak memory is that "
    "of tensors, base and optimizers included."
)


def run_cost(out: Path, *, rounds: int, progress: Progress) -> dict[str, Verdict]:
    """Measure and write training-cost.json, .md and .png; returns the verdicts by claim."""
    cost = measure_training(find_recipe("mini"), rounds=rounds, progress=progress)
    verdicts = {claim.text: claim.verdict(cost.ratios[claim.ratio], rounds) for claim in CLAIMS}
    found: dict[str, Any] = {"study": NAME, "source": SOURCE, **vars(cost), "verdicts": verdicts}
    with exclusive(out / "locks" / NAME):
        write_json(out / f"{NAME}.json", found)
        write_atomically(out / f"{NAME}.png", partial(plot, cost))
        write_text(out / f"{NAME}.md", page(cost, verdicts, rounds))
    return verdicts


def plot(cost: TrainingCost, path: Path) -> None:
    """Seconds and peak memory of every mode."""
    peaks = [Interval(m.peak / GB, m.peak / GB, m.peak / GB) for m in cost.modes]
    panels = {"an iteration, seconds": [m.seconds for m in cost.modes], "peak memory, GB": peaks}
    plot_panels([mode.name for mode in cost.modes], panels, path)


def page(cost: TrainingCost, verdicts: dict[str, Verdict], rounds: int) -> str:
    """The study's page in markdown."""
    show = "{:.3g}".format
    rows = [
        [c.text, f"**{verdicts[c.text]}**", cost.ratios[c.ratio].show(show), f"{c.paper:.2g}"] for c in CLAIMS
    ]
    parts = [
        f"# {TITLE}\n\nPaper: {SOURCE}.\n",
        f"    scalewise study {NAME} --rounds {rounds}\n",
        markdown.table(["claim", "verdict", "measured ratio", "paper's"], rows, left=2) + "\n",
        cost.markdown,
        f"![seconds and memory by mode]({NAME}.png)\n",
        "In a round every mode runs once over all steps, in turns. A claim is reproduced if the whole "
        f"interval lies on the paper's side of 1; fewer than {FEWEST_ROUNDS} rounds have no interval and "
        "decide nothing.\n",
        f"## What differs from the paper\n{DIFFERS}\n",
    ]
    return "\n".join(parts)

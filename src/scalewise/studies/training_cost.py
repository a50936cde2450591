"""Study of training cost: times training iterations instead of training students."""

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
from scalewise.metrics.intervals import MIN_ROUNDS
from scalewise.studies.base import Verdict
from scalewise.studies.page import plot_panels

NAME, TITLE, SOURCE = "training-cost", "Cost of a training iteration", "section 5.3, table 5"


@dataclass(frozen=True)
class CostClaim:
    """Claim about the ratio of the times of two kinds of iterations."""

    text: str
    ratio: str
    """Key of `TrainingCost.ratios`."""
    paper: float
    """The ratio according to table 5 of the paper, for SD3.5 Medium."""

    def verdict(self, ratio: Interval, rounds: int) -> Verdict:
        """Reproduced if the whole interval of the ratio is on the same side of 1 as in the paper.

        Undecided with fewer than six rounds, which give no interval.
        """
        if rounds < MIN_ROUNDS:
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
DIFFERENCES = (
    "The mini on a CPU instead of SD3.5 Medium on GPUs. The number of updates of the fake model per update "
    "of the student is that of the recipe `mini`; with MMD alone there is no fake model. Peak memory only "
    "counts tensors, including the base and the optimizer states."
)


def run_training_cost(out: Path, *, rounds: int, progress: Progress) -> dict[str, Verdict]:
    """Measure, write training-cost.json, .md and .png, and return the verdicts by claim."""
    cost = measure_training(find_recipe("mini"), rounds=rounds, progress=progress)
    verdicts = {claim.text: claim.verdict(cost.ratios[claim.ratio], rounds) for claim in CLAIMS}
    result: dict[str, Any] = {"study": NAME, "source": SOURCE, **vars(cost), "verdicts": verdicts}
    with exclusive(out / "locks" / NAME):
        write_json(out / f"{NAME}.json", result)
        write_atomically(out / f"{NAME}.png", partial(plot, cost))
        write_text(out / f"{NAME}.md", format_page(cost, verdicts, rounds))
    return verdicts


def plot(cost: TrainingCost, path: Path) -> None:
    """Plot the time and peak memory of each mode."""
    peaks = [Interval(m.peak / GB, m.peak / GB, m.peak / GB) for m in cost.modes]
    panels = {"seconds per iteration": [m.seconds for m in cost.modes], "peak memory, GB": peaks}
    plot_panels([mode.name for mode in cost.modes], panels, path)


def format_page(cost: TrainingCost, verdicts: dict[str, Verdict], rounds: int) -> str:
    """Return the page in markdown."""
    show = "{:.3g}".format
    rows = [
        [c.text, f"**{verdicts[c.text]}**", cost.ratios[c.ratio].show(show), f"{c.paper:.2g}"] for c in CLAIMS
    ]
    parts = [
        f"# {TITLE}\n\nPaper: {SOURCE}.\n",
        f"    scalewise study {NAME} --rounds {rounds}\n",
        markdown.table(["claim", "verdict", "measured ratio", "paper"], rows, left=2) + "\n",
        cost.markdown,
        f"![time and memory by mode]({NAME}.png)\n",
        "In each round, every mode runs once over all steps, in alternating order. A claim is reproduced if "
        "the whole interval is on the same side of 1 as in the paper, and undecided with fewer than "
        f"{MIN_ROUNDS} rounds, which give no interval.\n",
        f"## Differences from the paper\n{DIFFERENCES}\n",
    ]
    return "\n".join(parts)

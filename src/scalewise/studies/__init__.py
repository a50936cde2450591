"""Claims of the paper that anyone can check on the mini."""

from __future__ import annotations

from scalewise.studies.base import Arm, Claim, Study
from scalewise.studies.definitions import STUDIES
from scalewise.studies.page import write_page
from scalewise.studies.run import Effort, Outcome, refuse_count, run_study
from scalewise.studies.training_cost import run_cost

__all__ = [
    "STUDIES",
    "Arm",
    "Claim",
    "Effort",
    "Outcome",
    "Study",
    "refuse_count",
    "run_cost",
    "run_study",
    "write_page",
]

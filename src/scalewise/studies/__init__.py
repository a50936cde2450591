"""Claims of the paper that can be checked on the mini."""

from __future__ import annotations

from scalewise.studies.base import Claim, Study, Variant
from scalewise.studies.definitions import STUDIES
from scalewise.studies.page import write_page
from scalewise.studies.run import Outcome, StudySettings, check_count, run_study
from scalewise.studies.training_cost import run_training_cost

__all__ = [
    "STUDIES",
    "Claim",
    "Outcome",
    "Study",
    "StudySettings",
    "Variant",
    "check_count",
    "run_study",
    "run_training_cost",
    "write_page",
]

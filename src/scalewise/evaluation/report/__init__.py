"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.timing import Timing

__all__ = ["Column", "ReportContent", "Stage", "StepSequence", "write_report"]


@dataclass(frozen=True)
class Stage:
    """One thing that was done, and how long it took."""

    name: str
    about: str
    seconds: float


@dataclass(frozen=True)
class Column:
    """One sampler's pictures of the shown prompts, bytes [N, H, W, 3]."""

    name: str
    about: str
    images: np.ndarray


@dataclass(frozen=True)
class StepSequence:
    """How one picture grows: x0 of every step, decoded, bytes [h_i, w_i, 3] each."""

    prompt: str
    labels: Sequence[str]
    pictures: Sequence[np.ndarray]


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows. What is empty is left out."""

    title: str
    summary: str
    """One paragraph in plain language."""
    stages: Sequence[Stage] = ()
    prompts: Sequence[str] = ()
    columns: Sequence[Column] = ()
    """The samplers' pictures of `prompts`, from the same seeds."""
    journeys: Sequence[StepSequence] = ()
    log: Sequence[Mapping[str, Any]] = ()
    """Rows of the training log, as `Trainer.fit` yields them."""
    schedule: Sequence[str] = ()
    """A label for each step of the schedule, such as "t 1000, 8x8"."""
    figures: Sequence[Row] = ()
    """The metrics of every sampler; those of real images in a row of kind "real"."""
    timings: Sequence[Timing] = ()
    """Of every sampler and batch size."""
    teacher: str = "teacher"
    """Name of the sampler that speeds and differences refer to."""
    student: str = "student"
    """Name of the sampler that the report is about."""
    notes: Sequence[str] = ()
    """Further sentences for "What the numbers say"."""
    command: str = ""
    recipe: str = ""
    """The recipe as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in self.columns:
            if len(column.images) != len(self.prompts):
                raise ValueError(
                    f"{column.name!r} has {len(column.images)} pictures for {len(self.prompts)} prompts; "
                    "give one for each."
                )


def write_report(path: Path, content: ReportContent) -> Path:
    """Write a report to `path`, styles, pictures and plots inside, no script, nothing fetched; return it."""
    from scalewise.evaluation.report.page import page

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(content), encoding="utf-8")
    return path

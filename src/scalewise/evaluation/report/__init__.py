"""The report of a comparison as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.timing import Timing

__all__ = ["Column", "NextStep", "ReportContent", "Stage", "StepSequence", "write_report"]


@dataclass(frozen=True)
class Stage:
    """A stage of a run and its duration."""

    name: str
    about: str
    seconds: float


@dataclass(frozen=True)
class Column:
    """Images of the shown prompts, uint8 [N, H, W, 3], by one sampler or by a renderer."""

    name: str
    about: str
    images: np.ndarray
    kind: Literal["sampler", "render"] = "sampler"
    """"render": drawn by a program from the caption, the ground truth; shown before the samplers."""


@dataclass(frozen=True)
class StepSequence:
    """The decoded x0 of every step of one image, uint8 [H_i, W_i, 3] each; the last is the final image."""

    prompt: str
    labels: Sequence[str]
    images: Sequence[np.ndarray]


@dataclass(frozen=True)
class NextStep:
    """A command to try after reading the report, and what it does."""

    about: str
    command: str


@dataclass(frozen=True)
class ReportContent:
    """The content of a report; sections without content are omitted."""

    title: str
    summary: str
    """One paragraph in plain language."""
    stages: Sequence[Stage] = ()
    prompts: Sequence[str] = ()
    columns: Sequence[Column] = ()
    """The samplers' images of `prompts`, from the same seeds."""
    step_sequences: Sequence[StepSequence] = ()
    log: Sequence[Mapping[str, Any]] = ()
    """Rows of the training log, as `Trainer.fit` yields them."""
    schedule: Sequence[str] = ()
    """A label for each step of the schedule, such as "t 1000, 8x8"."""
    rows: Sequence[Row] = ()
    """The metrics of every sampler; real images have rows of kind "real"."""
    timings: Sequence[Timing] = ()
    """Times of every sampler and batch size."""
    teacher: str = "teacher"
    """Name of the sampler that is the baseline of speed-ups and differences."""
    student: str = "student"
    """Name of the sampler that the report is about."""
    notes: Sequence[str] = ()
    """Further sentences for "Summary of the results"."""
    next_steps: Sequence[NextStep] = ()
    command: str = ""
    recipe: str = ""
    """The recipe as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in self.columns:
            if len(column.images) != len(self.prompts):
                raise ValueError(
                    f"{column.name!r} has {len(column.images)} images for {len(self.prompts)} prompts; "
                    "the numbers must match."
                )


def write_report(path: Path, content: ReportContent) -> Path:
    """Write a report with embedded styles, images and plots to `path`, without scripts; return `path`."""
    from scalewise.evaluation.report.page import render

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(content), encoding="utf-8")
    return path

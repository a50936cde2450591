"""Evaluate samplers on the same prompts and seeds: metrics with intervals, differences to the first
sampler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalewise.common import distributed, markdown
from scalewise.common.progress import Progress, ProgressCallback, silent
from scalewise.common.results import write_json, write_text
from scalewise.evaluation.generated_images import GeneratedImages
from scalewise.evaluation.samplers import (
    Prompts,
    SamplerSpec,
    encode,
    enter,
    generate_images,
)
from scalewise.evaluation.scoring import Scorers
from scalewise.evaluation.timing import Mark, Parts, TimedSampler
from scalewise.method.backbone import Precision
from scalewise.metrics import METRICS, ImageFeatures, Interval, Metric, measure
from scalewise.models import PipelineAdapter


@dataclass(frozen=True)
class Row:
    """The metrics of one sampler."""

    name: str
    kind: str
    about: str
    images: int
    values: dict[str, Interval]
    compared_with: str = ""
    differences: dict[str, Interval] = field(default_factory=dict)
    """Values of this sampler minus those of `compared_with`, over the same prompts."""

    def verdict(self, metric: str) -> str:
        """Return "better" or "worse" than `compared_with`, or "" if the interval of the difference includes
        0.
        """
        difference = self.differences.get(metric)
        if difference is None or not difference.excludes(0):
            return ""
        return "better" if (difference.value < 0) == (METRICS[metric].better == "lower") else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdicts, as stored in JSON."""
        return {**vars(self), "verdicts": {name: self.verdict(name) for name in self.differences}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Build a row from the output of `to_dict`."""
        plain: dict[str, Any] = {k: v for k, v in values.items() if k != "verdicts"}
        for key in ("values", "differences"):
            plain[key] = {metric: Interval.from_list(value) for metric, value in values[key].items()}
        return cls(**plain)


@dataclass(frozen=True)
class Result:
    """The metrics of a sampler and the scores they were computed from."""

    row: Row
    seen: ImageFeatures


def make_result(spec: SamplerSpec, seen: ImageFeatures, *, first: Result | None = None) -> Result:
    """Compute all metrics of a sampler, and their differences to those of `first`."""
    differences = measure(seen, against=first.seen) if first else {}
    row = Row(spec.name, spec.kind, spec.about, len(seen.prompt), measure(seen),
              first.row.name if first else "", differences)  # fmt: skip
    return Result(row, seen)


def warn_of_truncation_once(
    model: PipelineAdapter | None, spec: SamplerSpec, captions: Sequence[str]
) -> AbstractContextManager[None]:
    """Warn once about all captions that the text encoders truncate; suppress further warnings in the
    context.
    """
    if model is None or spec.kind == "folder":
        return nullcontext()
    stock = model.pipeline_sequence_length() if spec.kind == "teacher" else None
    return model.warn_of_truncation_once(captions, tokens=spec.text_length or stock)


def evaluate(
    model: PipelineAdapter | None, samplers: Sequence[SamplerSpec], prompts: Prompts, scorers: Scorers, *,
    batch: int = 16,
    precision: Precision = "float32",
    progress: Progress = silent,
    keep: Callable[[SamplerSpec, Sequence[int], np.ndarray], None] = lambda _sampler, _numbers, _images: None,
    storage: Callable[[SamplerSpec], GeneratedImages | None] = lambda _sampler: None,
) -> Iterator[Result]:  # fmt: skip
    """Generate and score the images of one sampler after the other; the first is the baseline.

    Folders need no `model`. With several processes, each generates and scores a part of the images, and only
    the first yields results.

    `keep(spec, numbers, images)` is called with the images of this process before they are scored.
    `storage(spec)` may return a folder to save batches to and to load existing batches from.
    """
    first, mine = None, distributed.split(len(prompts))
    own = prompts.select(mine)
    for spec in samplers:
        generating = progress(f"sampling: {spec.name}", len(prompts))
        with generating as done, warn_of_truncation_once(model, spec, prompts.captions):
            stored, callbacks = storage(spec), dict[str, Any]()
            if stored:
                stored.prepare()
                callbacks = {"load_batch": stored.read, "save_batch": stored.write}
            images = generate_images(
                model, spec, prompts, batch=batch, precision=precision, numbers=mine,
                done=partial(_report, done, len(prompts)), **callbacks,
            )  # fmt: skip
        keep(spec, mine, images)
        scores = distributed.gather_rows(scorers.score_images(images, own.captions))
        if scores is not None:
            result = make_result(spec, scorers.combine(scores, prompts), first=first)
            first = first or result
            yield result


def _report(done: ProgressCallback, total: int, count: int) -> None:
    """Report the progress of all processes, assuming that they are equally fast."""
    done(min(total, count * distributed.world()))


def timed_sampler(
    model: PipelineAdapter, spec: SamplerSpec, caption: str, *, precision: Precision = "float32",
    each_step: bool = False,
) -> TimedSampler:  # fmt: skip
    """Return the benchmark of a sampler for one caption; a student is fused, so its times are those of the
    base.

    With `each_step`, the steps of the denoiser are also timed individually.
    """
    return TimedSampler(spec.name, partial(_parts, model, spec, caption, precision, each_step=each_step))


@contextmanager
def _parts(
    model: PipelineAdapter, spec: SamplerSpec, caption: str, precision: Precision, batch: int, *,
    each_step: bool,
) -> Iterator[Parts]:  # fmt: skip
    state: dict[str, Any] = {}

    def text(_mark: Mark) -> None:
        state["cond"] = encode(model, spec, [caption] * batch)
        negative = [spec.negative_prompt]
        state["uncond"] = encode(model, spec, negative) if spec.guidance != 1 else state["cond"]

    def vae(_mark: Mark) -> None:
        model.decode(state["x0"])

    with torch.no_grad(), enter(model, spec, precision=precision) as sampler:

        def denoiser(mark: Mark) -> None:
            on_step = (lambda _i, _x0: mark()) if each_step else None
            state["x0"] = sampler(state["cond"], state["uncond"], range(batch), on_step=on_step)

        yield {"text": text, "denoiser": denoiser, "vae": vae}


def table(rows: Sequence[Row]) -> str:
    """Return a markdown table of all metrics with intervals, and whether each differs from the baseline."""
    shown = [metric for name, metric in METRICS.items() if any(name in row.values for row in rows)]
    text = markdown.table(
        ["", "settings", "images", *(metric.heading for metric in shown)],
        [[r.name, r.about, f"{r.images:,}", *(_cell(r, m) for m in shown)] for r in rows],
        left=2,
    )
    compared = next((row.compared_with for row in rows if row.compared_with), "")
    note = (
        f"better, worse: than {compared}, by a paired difference whose 95% interval excludes 0."
        if compared
        else ""
    )
    few = " Values without an interval have too few prompts." if any(
        not found.known for row in rows for found in row.values.values()
    ) else ""  # fmt: skip
    return f"{text}\n\n95% intervals over prompts.{few} {note}".rstrip() + "\n"


def _cell(row: Row, metric: Metric) -> str:
    found = row.values.get(metric.name)
    return f"{found.show(metric.show)} {row.verdict(metric.name)}".rstrip() if found else "-"


def save_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write the metrics to figures.json and figures.md in a folder."""
    write_json(folder / "figures.json", list(rows))
    write_text(folder / "figures.md", table(rows))


def load_rows(folder: Path) -> list[Row]:
    """Read figures.json, as written by `save_rows`."""
    return [
        Row.from_dict(values) for values in json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    ]

"""Compare contenders on the same prompts and seeds: figures with intervals, differences to the first one."""

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
from scalewise.evaluation.drawings import Drawings
from scalewise.evaluation.samplers import (
    Contender,
    Prompts,
    draw,
    encode,
    enter,
)
from scalewise.evaluation.scoring import Judge
from scalewise.evaluation.timing import Mark, Parts, Subject
from scalewise.method.backbone import Precision
from scalewise.metrics import METRICS, Interval, Metric, Seen, measure
from scalewise.models import PipelineAdapter


@dataclass(frozen=True)
class Row:
    """The figures of one contender."""

    name: str
    kind: str
    about: str
    images: int
    values: dict[str, Interval]
    compared_with: str = ""
    differences: dict[str, Interval] = field(default_factory=dict)
    """This contender's figures less the compared one's, over the same prompts."""

    def verdict(self, metric: str) -> str:
        """ "better" or "worse" than the compared contender, or "" where the difference may be chance."""
        difference = self.differences.get(metric)
        if difference is None or not difference.excludes(0):
            return ""
        return "better" if (difference.value < 0) == (METRICS[metric].better == "lower") else "worse"

    def to_dict(self) -> dict[str, Any]:
        """The fields and the verdicts, as stored in JSON."""
        return {**vars(self), "verdicts": {name: self.verdict(name) for name in self.differences}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Read what was stored."""
        plain: dict[str, Any] = {k: v for k, v in values.items() if k != "verdicts"}
        for key in ("values", "differences"):
            plain[key] = {metric: Interval.from_list(found) for metric, found in values[key].items()}
        return cls(**plain)


@dataclass(frozen=True)
class Result:
    """A contender's figures, and what they were taken of."""

    row: Row
    seen: Seen


def judge_result(contender: Contender, seen: Seen, *, first: Result | None = None) -> Result:
    """Take all figures of what was seen of a contender, and their differences to those of `first`."""
    differences = measure(seen, against=first.seen) if first else {}
    row = Row(contender.name, contender.kind, contender.about, len(seen.prompt), measure(seen),
              first.row.name if first else "", differences)  # fmt: skip
    return Result(row, seen)


def warned_once(
    model: PipelineAdapter | None, contender: Contender, captions: Sequence[str]
) -> AbstractContextManager[None]:
    """Warn in one sentence of all captions that are cut for who draws; drawing within it warns no more."""
    if model is None or contender.kind == "folder":
        return nullcontext()
    stock = model.stock_sequence() if contender.kind == "teacher" else None
    return model.warned_once(captions, tokens=contender.text_length or stock)


def evaluate(
    model: PipelineAdapter | None, contenders: Sequence[Contender], prompts: Prompts, judge: Judge, *,
    batch: int = 16,
    precision: Precision = "float32",
    progress: Progress = silent,
    keep: Callable[[Contender, Sequence[int], np.ndarray], None] = lambda _contender, _numbers, _images: None,
    drawings: Callable[[Contender], Drawings | None] = lambda _contender: None,
) -> Iterator[Result]:  # fmt: skip
    """Draw and judge one contender after the other; the first is what the others are compared with.

    Folders need no `model`. Several processes draw and look at a part of the pictures each; the first one
    alone has results.

    `keep(contender, numbers, images)` is called with what this process drew before it is judged. Where
    `drawings(contender)` gives a place, every batch is written there, and read if it is there already.
    """
    first, mine = None, distributed.split(len(prompts))
    own = prompts.chosen(mine)
    for contender in contenders:
        drawing = progress(f"drawing: {contender.name}", len(prompts))
        with drawing as done, warned_once(model, contender, prompts.captions):
            place, there = drawings(contender), dict[str, Any]()
            if place:
                place.begin()
                there = {"known": place.read, "keep": place.write}
            images = draw(
                model, contender, prompts, batch=batch, precision=precision, numbers=mine,
                done=partial(_report, done, len(prompts)), **there,
            )  # fmt: skip
        keep(contender, mine, images)
        looks = distributed.gather_rows(judge.look(images, own.captions))
        if looks is not None:
            result = judge_result(contender, judge.seen(looks, prompts), first=first)
            first = first or result
            yield result


def _report(done: ProgressCallback, total: int, count: int) -> None:
    """Tell what all processes have done: they draw alike."""
    done(min(total, count * distributed.world()))


def subject(
    model: PipelineAdapter, contender: Contender, caption: str, *, precision: Precision = "float32",
    each_step: bool = False,
) -> Subject:  # fmt: skip
    """What `bench` times: the contender drawing one caption. A student is fused: its times are the base's.

    With `each_step` the denoiser's steps are timed one by one.
    """
    return Subject(contender.name, partial(_parts, model, contender, caption, precision, each_step=each_step))


@contextmanager
def _parts(
    model: PipelineAdapter, contender: Contender, caption: str, precision: Precision, batch: int, *,
    each_step: bool,
) -> Iterator[Parts]:  # fmt: skip
    held: dict[str, Any] = {}

    def text(_mark: Mark) -> None:
        held["cond"] = encode(model, contender, [caption] * batch)
        negative = [contender.negative_prompt]
        held["uncond"] = encode(model, contender, negative) if contender.guidance != 1 else held["cond"]

    def vae(_mark: Mark) -> None:
        model.decode(held["x0"])

    with torch.no_grad(), enter(model, contender, precision=precision) as sampler:

        def denoiser(mark: Mark) -> None:
            on_step = (lambda _i, _x0: mark()) if each_step else None
            held["x0"] = sampler(held["cond"], held["uncond"], range(batch), on_step=on_step)

        yield {"text": text, "denoiser": denoiser, "vae": vae}


def table(rows: Sequence[Row]) -> str:
    """A table in markdown: every figure with its interval, and whether it differs from the first one's."""
    shown = [metric for name, metric in METRICS.items() if any(name in row.values for row in rows)]
    text = markdown.table(
        ["", "drawn with", "images", *(metric.heading for metric in shown)],
        [[r.name, r.about, f"{r.images:,}", *(_cell(r, m) for m in shown)] for r in rows],
        left=2,
    )
    compared = next((row.compared_with for row in rows if row.compared_with), "")
    note = (
        f"better, worse: than {compared}, by a paired difference whose 95% interval leaves out 0."
        if compared
        else ""
    )
    few = " Figures without an interval rest on too few prompts." if any(
        not found.known for row in rows for found in row.values.values()
    ) else ""  # fmt: skip
    return f"{text}\n\n95% intervals over prompts.{few} {note}".rstrip() + "\n"


def _cell(row: Row, metric: Metric) -> str:
    found = row.values.get(metric.name)
    return f"{found.show(metric.show)} {row.verdict(metric.name)}".rstrip() if found else "-"


def save_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write figures.json and figures.md into a folder."""
    write_json(folder / "figures.json", list(rows))
    write_text(folder / "figures.md", table(rows))


def load_rows(folder: Path) -> list[Row]:
    """Read what `save_rows` wrote."""
    return [
        Row.from_dict(values) for values in json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    ]

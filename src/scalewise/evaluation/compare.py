"""A comparison on disk: pictures, figures with intervals, times, all from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from scalewise import mini
from scalewise.common import distributed
from scalewise.common.progress import Progress
from scalewise.common.results import write_json
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.evaluation import timing
from scalewise.evaluation.drawings import Drawings, drawn_by
from scalewise.evaluation.evaluate import Result, Row, evaluate, save_rows, subject, table
from scalewise.evaluation.samplers import (
    Contender,
    Prompts,
    check_fit,
    parse_contenders,
)
from scalewise.evaluation.scoring import SCORER, SPECTRUM, Asked, Judge, check_asked, judge_of
from scalewise.evaluation.stored_images import ContenderError, read_folder
from scalewise.method.rng import permutation
from scalewise.metrics import measure
from scalewise.models import PipelineAdapter, family_of
from scalewise.training import setup


@dataclass(frozen=True)
class Outcome:
    """What a comparison found."""

    results: list[Result]
    rows: list[Row]
    timings: list[timing.Timing]

    @property
    def markdown(self) -> str:
        """Both tables."""
        text = table(self.rows)
        return f"{text}\n{timing.timings_table(self.timings)}" if self.timings else text


def real_rows(judge: Judge) -> list[Row]:
    """What real pictures reach by the same judge: those held out, and as many of the training set.

    The prompt match of real pictures is what the scorer allows. Their distances are to pictures of other
    subjects: drawn ones, which have the reference's captions, can be nearer.
    """
    features = {k: v.float() for k, v in load_file(mini.REFERENCE).items()}
    held_out, trained = features["test"], features["train"]
    chosen = permutation(len(trained), "real")[: len(held_out)]
    captions = mini.captions("train")
    rows = []
    for name, about, looks, texts, judges in (
        (
            "real, held out",
            "pictures that nothing was trained on",
            {SCORER: held_out},
            mini.captions("test"),
            replace(judge, reference=None),  # they are the reference
        ),
        (
            "real, trained on",
            "a random part of the training pictures",
            {SCORER: trained[chosen], SPECTRUM: features["train_spectrum"][chosen]},
            [captions[i] for i in chosen],
            judge,
        ),
    ):
        prompts = Prompts(tuple(texts), tuple(range(len(texts))))
        rows.append(Row(name, "real", about, len(texts), measure(judges.seen(looks, prompts))))
    return rows


def compare(
    recipe: Recipe,
    contenders: Sequence[str],
    texts: Sequence[str],
    progress: Progress,
    *,
    out: Path,
    batch: int = 16,
    seed: int = 0,
    speed: bool = True,
    rounds: int = 7,
    each: int = 1,
    asked: Asked | None = None,
) -> Outcome:
    """Draw, judge and time every contender; writes pictures, figures and timings to `out`.

    Images that an earlier call with the same samplers and prompts has written there are not drawn again.

    `each`: samples of every text, from seeds of their own; two or more tell how diverse they are.
    """
    parsed = parse_contenders(contenders, recipe)
    _check_names(parsed)
    prompts, asked = Prompts.of(texts, each=each, seed=seed), asked or Asked()
    if len(prompts) < distributed.world():
        raise RecipeError(
            f"{len(prompts)} pictures are fewer than the {distributed.world()} processes; start fewer, or "
            "draw more."
        )
    family = family_of(recipe.model.folder, recipe.model.family)
    check_asked(asked, texts, video=family.video)
    judge = judge_of(recipe, asked, pool=texts, progress=progress)
    judge.warn_of_few(len(prompts))
    draws = any(contender.kind != "folder" for contender in parsed)
    for contender in parsed if draws else ():  # else they are read at once anyway
        if contender.kind == "folder":
            with progress(f"reading {contender.name}", 0):
                assert contender.path is not None
                read_folder(contender.path, prompts.captions, numbers=distributed.split(len(prompts)))
    model = setup.load(recipe, ("denoiser", "vae", "text")) if draws else None
    if model:
        check_fit(model, parsed)
    if distributed.is_main():
        (out / "timings.json").unlink(missing_ok=True)  # of an earlier comparison
    results, rows = list[Result](), list[Row]()
    for result in evaluate(
        model, parsed, prompts, judge, batch=batch, precision=recipe.train.precision, progress=progress,
        keep=partial(_copy_pictures, prompts, out / "pictures"),
        drawings=partial(_drawings, recipe, prompts, out / "pictures"),
    ):  # fmt: skip
        results.append(result)
        rows = [r.row for r in results] + (real_rows(judge) if judge.is_minis else [])
        save_rows(rows, out)  # after each, so that a stopped comparison keeps what it has
    timings = []
    if speed and model is not None and distributed.is_main():
        timings = time_all(model, recipe, parsed, texts[0], progress, rounds=rounds)
    if timings:
        write_json(out / "timings.json", timings)
    return Outcome(results, rows, timings)


def time_all(
    model: PipelineAdapter,
    recipe: Recipe,
    contenders: Sequence[Contender],
    caption: str,
    progress: Progress,
    *,
    rounds: int = 7,
) -> list[timing.Timing]:
    """Milliseconds per image at batch 1 and 8, all contenders taking turns."""
    drawing = [c for c in contenders if c.kind != "folder"]
    subjects = [subject(model, c, caption, precision=recipe.train.precision) for c in drawing]
    if not subjects:
        return []
    with progress("timing", 2 * (rounds + 1)) as done, torch.no_grad():
        clock = timing.device_clock(str(model.device))
        return timing.bench(subjects, batches=(1, 8), rounds=rounds, clock=clock, done=done)


def _drawings(recipe: Recipe, prompts: Prompts, parent: Path, contender: Contender) -> Drawings | None:
    """Where the images of a sampler are kept and found again; folders are copied instead."""
    if contender.kind == "folder":
        return None
    return Drawings(parent / file_name(contender.name), prompts, drawn_by(recipe, contender))


def _copy_pictures(
    prompts: Prompts, parent: Path, contender: Contender, numbers: Sequence[int], images: np.ndarray
) -> None:
    """Write this process's part of a folder's images beside the drawn ones, in the order of the prompts."""
    folder = parent / file_name(contender.name)
    if contender.path is None or contender.kind != "folder" or contender.path.resolve() == folder.resolve():
        return  # drawn, or these very images are judged again
    place = Drawings(folder, prompts, f"copied from {contender.path.resolve()}")
    place.begin()
    place.write(numbers, images)
    distributed.barrier_without_timeout()


def file_name(name: str) -> str:
    """The folder of a contender's pictures."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _check_names(contenders: Sequence[Contender]) -> None:
    """Refuse two whose pictures would go into one folder."""
    places = dict[str, str]()
    for contender in contenders:
        if not file_name(contender.name):
            raise ContenderError(
                f"The label {contender.name!r} names no folder for pictures; use letters or digits."
            )
        other = places.setdefault(file_name(contender.name), contender.name)
        if other != contender.name:
            raise ContenderError(
                f"The pictures of {other!r} and {contender.name!r} would go into one folder, "
                f"{file_name(other)!r}; label one of them otherwise."
            )

"""Compare samplers on the same prompts and seeds, and write images, metrics and times to a folder."""

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
from scalewise.evaluation.evaluate import Result, Row, evaluate, save_rows, table, timed_sampler
from scalewise.evaluation.generated_images import GeneratedImages, sampler_fingerprint
from scalewise.evaluation.samplers import (
    Prompts,
    SamplerSpec,
    check_fit,
    parse_samplers,
)
from scalewise.evaluation.scoring import (
    SCORER,
    SPECTRUM,
    Scorers,
    ScoringOptions,
    check_scoring,
    load_scorers,
)
from scalewise.evaluation.stored_images import SamplerError, read_folder
from scalewise.method.rng import permutation
from scalewise.metrics import measure
from scalewise.models import PipelineAdapter, family_of
from scalewise.training import setup


@dataclass(frozen=True)
class Outcome:
    """Results of a comparison."""

    results: list[Result]
    rows: list[Row]
    timings: list[timing.Timing]

    @property
    def markdown(self) -> str:
        """The tables of metrics and times."""
        text = table(self.rows)
        return f"{text}\n{timing.timings_table(self.timings)}" if self.timings else text


def score_real_images(scorers: Scorers) -> list[Row]:
    """Score real images of the mini: the held-out ones and equally many from the training set.

    Their prompt match shows the limits of the scorer. Generated images can have a lower Fréchet distance,
    because they share the captions of the reference images and the real training images do not.
    """
    features = {k: v.float() for k, v in load_file(mini.REFERENCE).items()}
    held_out, trained = features["test"], features["train"]
    chosen = permutation(len(trained), "real")[: len(held_out)]
    captions = mini.captions("train")
    rows = []
    for name, about, scores, texts, own_scorers in (
        (
            "real, held out",
            "images not used in any training",
            {SCORER: held_out},
            mini.captions("test"),
            replace(scorers, reference=None),  # they are the reference
        ),
        (
            "real, trained on",
            "a random part of the training images",
            {SCORER: trained[chosen], SPECTRUM: features["train_spectrum"][chosen]},
            [captions[i] for i in chosen],
            scorers,
        ),
    ):
        prompts = Prompts(tuple(texts), tuple(range(len(texts))))
        rows.append(Row(name, "real", about, len(texts), measure(own_scorers.combine(scores, prompts))))
    return rows


def compare(
    recipe: Recipe,
    samplers: Sequence[str],
    texts: Sequence[str],
    progress: Progress,
    *,
    out: Path,
    batch: int = 16,
    seed: int = 0,
    speed: bool = True,
    rounds: int = 7,
    each: int = 1,
    scoring: ScoringOptions | None = None,
) -> Outcome:
    """Generate, score and time the images of every sampler; write images, metrics and times to `out`.

    Existing images in `out` from the same samplers and prompts are reused.

    `each`: samples per text, with different seeds; two or more also measure diversity.
    """
    specs = parse_samplers(samplers, recipe)
    _check_names(specs)
    prompts, scoring = Prompts.of(texts, each=each, seed=seed), scoring or ScoringOptions()
    if len(prompts) < distributed.world():
        raise RecipeError(
            f"There are {len(prompts)} images for {distributed.world()} processes; start fewer processes or "
            "pass more prompts."
        )
    family = family_of(recipe.model.folder, recipe.model.family)
    check_scoring(scoring, texts, video=family.video)
    scorers = load_scorers(recipe, scoring, pool=texts, progress=progress)
    scorers.warn_of_few(len(prompts))
    generates = any(spec.kind != "folder" for spec in specs)
    for spec in specs if generates else ():  # find unreadable folders before loading the model
        if spec.kind == "folder":
            with progress(f"reading {spec.name}", 0):
                assert spec.path is not None
                read_folder(spec.path, prompts.captions, numbers=distributed.split(len(prompts)))
    model = setup.load(recipe, ("denoiser", "vae", "text")) if generates else None
    if model:
        check_fit(model, specs)
    if distributed.is_main():
        (out / "timings.json").unlink(missing_ok=True)  # of an earlier comparison
    results, rows = list[Result](), list[Row]()
    for result in evaluate(
        model, specs, prompts, scorers, batch=batch, precision=recipe.train.precision, progress=progress,
        keep=partial(_copy_images, prompts, out / "pictures"),
        storage=partial(_image_storage, recipe, prompts, out / "pictures"),
    ):  # fmt: skip
        results.append(result)
        rows = [r.row for r in results] + (score_real_images(scorers) if scorers.is_mini_default else [])
        save_rows(rows, out)  # after each sampler, so that an interrupted comparison keeps its results
    timings = []
    if speed and model is not None and distributed.is_main():
        timings = time_samplers(model, recipe, specs, texts[0], progress, rounds=rounds)
    if timings:
        write_json(out / "timings.json", timings)
    return Outcome(results, rows, timings)


def time_samplers(
    model: PipelineAdapter,
    recipe: Recipe,
    samplers: Sequence[SamplerSpec],
    caption: str,
    progress: Progress,
    *,
    rounds: int = 7,
) -> list[timing.Timing]:
    """Time all samplers, interleaved, in milliseconds per image at batch sizes 1 and 8."""
    timed = [c for c in samplers if c.kind != "folder"]
    subjects = [timed_sampler(model, c, caption, precision=recipe.train.precision) for c in timed]
    if not subjects:
        return []
    with progress("timing", 2 * (rounds + 1)) as done, torch.no_grad():
        clock = timing.device_clock(str(model.device))
        return timing.bench(subjects, batches=(1, 8), rounds=rounds, clock=clock, done=done)


def _image_storage(
    recipe: Recipe, prompts: Prompts, parent: Path, spec: SamplerSpec
) -> GeneratedImages | None:
    """Return the storage of a sampler's images; None for folders, which are copied instead."""
    if spec.kind == "folder":
        return None
    return GeneratedImages(parent / file_name(spec.name), prompts, sampler_fingerprint(recipe, spec))


def _copy_images(
    prompts: Prompts, parent: Path, spec: SamplerSpec, numbers: Sequence[int], images: np.ndarray
) -> None:
    """Copy this process's part of a folder's images to `parent`, in the order of the prompts."""
    folder = parent / file_name(spec.name)
    if spec.path is None or spec.kind != "folder" or spec.path.resolve() == folder.resolve():
        return  # already stored there
    stored = GeneratedImages(folder, prompts, f"copied from {spec.path.resolve()}")
    stored.prepare()
    stored.write(numbers, images)
    distributed.barrier_without_timeout()


def file_name(name: str) -> str:
    """Return the folder name of a sampler's images."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _check_names(samplers: Sequence[SamplerSpec]) -> None:
    """Raise SamplerError if the images of two samplers would go into the same folder."""
    folders = dict[str, str]()
    for spec in samplers:
        if not file_name(spec.name):
            raise SamplerError(
                f"The label {spec.name!r} gives no folder name for its images; use letters or digits."
            )
        other = folders.setdefault(file_name(spec.name), spec.name)
        if other != spec.name:
            raise SamplerError(
                f"The images of {other!r} and {spec.name!r} would go into the same folder, "
                f"{file_name(other)!r}; change one of the labels."
            )

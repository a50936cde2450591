"""Run a study: train, sample and evaluate its variants. Results are cached, so interrupted studies resume."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalewise import mini
from scalewise.common.checkpoint import write_atomically
from scalewise.common.errors import first_line, resumed_by_same_command
from scalewise.common.images import contact_sheet, to_bytes
from scalewise.common.progress import Progress, ProgressCallback, silent
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data import LatentSet
from scalewise.evaluation.samplers import Prompts, SamplerSpec, count_passes, generate_images, parse_sampler
from scalewise.evaluation.scoring import SCORER, SPECTRUM, Scorers, load_scorers
from scalewise.method.backbone import Backbone
from scalewise.method.noise import NoiseProcess
from scalewise.method.rng import SampleNoise, permutation
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale, upscale_latents
from scalewise.metrics import METRICS, MIN_SAMPLES, ImageFeatures, Interval, Resampled, resample
from scalewise.metrics.base import Gaussian
from scalewise.models import PipelineAdapter
from scalewise.models.lora import StudentError
from scalewise.studies.base import Finding, Start, Study, Variant, Verdict, combine_verdicts, evaluate_claim
from scalewise.studies.work_queue import Task, run_tasks
from scalewise.training import setup
from scalewise.training.run import distill

SHEET_IMAGES = 24
"""Images on the contact sheet of a variant."""
Features = dict[str, Tensor]
"""Features of P images, each [P, ...], by feature extractor."""
CACHE_VERSION = 2
"""Increased when the same recipe gives different students or images, so that older cached files are ignored.
2: all updates of an iteration use one step of the schedule."""


@dataclass(frozen=True)
class StudySettings:
    """Number of seeds, prompts and iterations of a study."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """For each seed, every variant is trained and sampled."""
    count: int = 299
    """Number of held-out prompts."""
    iterations: int | None = None
    """Training iterations of each student (default: those of the recipe)."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise RecipeError(f"seeds must be one or more different integers >= 0; got {list(self.seeds)}.")
        if self.count < MIN_SAMPLES:
            raise RecipeError(f"{self.count} prompts are too few for intervals; use {MIN_SAMPLES} or more.")
        if self.iterations is not None and self.iterations < 1:
            raise RecipeError(f"iterations must be 1 or more; got {self.iterations}.")


@dataclass(frozen=True)
class Outcome:
    """Results of a study."""

    study: Study
    settings: StudySettings
    values: dict[str, dict[str, Interval]]
    """Metrics by variant and metric, over all seeds."""
    findings: list[Finding]
    tokens: dict[str, int]
    """Image tokens processed by the denoiser per image, by variant; empty if variants start from data."""

    def verdict(self, text: str) -> Verdict:
        """Return the verdict of the claim with this text, over all metrics."""
        return combine_verdicts([f for f in self.findings if f.claim.text == text])

    def to_dict(self) -> dict[str, Any]:
        """Return the results as stored in JSON (the keys are part of the file format)."""
        return {
            "study": self.study.name, "source": self.study.source, "seeds": self.settings.seeds,
            "prompts": self.settings.count, "iterations": self.settings.iterations, "figures": self.values,
            "tokens": self.tokens, "findings": self.findings,
            "verdicts": {claim.text: self.verdict(claim.text) for claim in self.study.claims},
        }  # fmt: skip


@dataclass(frozen=True)
class StudyData:
    """Prompts and metrics shared by all variants of a study."""

    captions: list[str]
    scoring: Scorers
    latents: dict[Scale, Tensor] = field(default_factory=dict)
    """Latents [P, C, H, W] to start from, smallest and full scale, in this order."""


def load_held_out(count: int) -> StudyData:
    """Load held-out captions, with the real images of the mini as reference."""
    return StudyData(held_out_captions(count), load_scorers(find_recipe("mini")))


def held_out_captions(count: int) -> list[str]:
    """Return the first `count` held-out captions; RecipeError if there are fewer."""
    captions = mini.captions("test")
    if count > len(captions):
        raise RecipeError(f"There are only {len(captions)} held-out captions, not {count}; reduce --count.")
    return captions[:count]


@torch.no_grad()
def load_starts(count: int, progress: Progress = silent) -> StudyData:
    """Load samples of the shipped dataset to start from, with other samples of it as reference."""
    recipe = find_recipe("mini")
    schedule = recipe.schedule.build()
    stored = setup.open_set(recipe, mini.DATA, (schedule.scales[0], schedule.full), progress)
    rows, reference_rows = choose_rows(stored, count)
    scoring, model = load_scorers(recipe), setup.load(recipe, ("vae",))
    parts = stored.latents(reference_rows, schedule.full).split(16)
    images = np.concatenate([to_bytes(model.decode(part)) for part in parts])
    features = scoring.score_images(images, stored.captions(reference_rows))
    real = {SPECTRUM: Gaussian.fit(features[SPECTRUM])}
    return StudyData(
        stored.captions(rows),
        replace(scoring, reference=features[SCORER], real=real),
        {scale: stored.latents(rows, scale) for scale in (schedule.scales[0], schedule.full)},
    )


def choose_rows(stored: LatentSet, count: int) -> tuple[list[int], list[int]]:
    """Return `count` rows to start from and `count` reference rows, all with different captions.

    RecipeError if the dataset has too few different captions.
    """
    captions = stored.captions(range(len(stored)))
    rows = list({captions[i]: i for i in permutation(len(stored), "upscaling").tolist()}.values())
    if len(rows) < 2 * count:
        raise RecipeError(
            f"The dataset has {len(rows)} different captions, too few for {count} prompts and the same "
            f"number of reference samples; use --count {len(rows) // 2} or less."
        )
    return rows[:count], rows[count : 2 * count]


@torch.no_grad()
def sample_from_start(
    model: PipelineAdapter, recipe: Recipe, start: Start, prompts: Prompts, *,
    latents: Mapping[Scale, Tensor], done: ProgressCallback,
) -> np.ndarray:  # fmt: skip
    """Denoise noised latents of known images with the teacher; returns N images as uint8 [N, H, W, 3]."""
    small, full = latents
    backbone = Backbone(model, precision=recipe.train.precision)
    teacher = recipe.teacher
    timesteps = model.teacher_scheduler(teacher.steps, full, shift=teacher.shift).timesteps
    encode = partial(model.encode_for_teacher, length=teacher.max_sequence_length)
    first_step = int((timesteps - start.t).abs().argmin())
    uncond, parts = encode([teacher.negative_prompt]), list[np.ndarray]()
    for first in range(0, len(prompts), 16):
        batch, rows = prompts[first : first + 16], slice(first, first + 16)
        x_t = noise_latents(
            start.how, latents[small][rows], latents[full][rows], seeds=batch.seeds, process=model.noise,
            t=float(timesteps[first_step]),
        )  # fmt: skip
        x0 = sample_teacher(
            backbone, full, encode(batch.captions), batch.seeds, steps=teacher.steps,
            guidance=teacher.guidance, uncond=uncond, shift=teacher.shift, start=x_t, begin_index=first_step,
        )  # fmt: skip
        parts.append(to_bytes(model.decode(x0)))
        done(first + len(batch))
    return np.concatenate(parts)


def noise_latents(
    how: str, small: Tensor, full: Tensor, *, seeds: Sequence[int], process: NoiseProcess, t: float
) -> Tensor:
    """Add noise at timestep t to clean latents `small` or `full` ([N, C, H, W]) as `Start.how` says.

    Returns x_t at the size of `full`.
    """
    scale, noise = Scale(1, *full.shape[-2:]), SampleNoise(seeds)
    if how == "enlarged, noised":
        full = upscale_latents(small, scale)
    x0 = small if how == "noised, enlarged" else full
    x_t = process.add_noise(x0, noise(x0.shape[1:]), torch.full((len(x0),), t))
    return upscale_latents(x_t, scale)


def load_study_data(study: Study, count: int, progress: Progress) -> StudyData:
    """Load what all variants of a study share."""
    return load_starts(count, progress) if study.starts_from_data else load_held_out(count)


def check_count(study: Study, count: int) -> None:
    """Check that a study has `count` prompts; RecipeError if not. Computes nothing."""
    if study.starts_from_data:
        choose_rows(LatentSet.open(mini.DATA), count)
    else:
        held_out_captions(count)


def run_study(study: Study, out: Path, settings: StudySettings, *, progress: Progress) -> Outcome:
    """Train and sample every variant with every seed, and evaluate the claims."""
    if study.trained and len(settings.seeds) < 2:
        warnings.warn(
            f"{study.name}: with 1 seed, the variation between trainings is unknown and claims about "
            "students stay undecided; repeat --seed to use 2 or more.",
            stacklevel=2,
        )
    data = load_study_data(study, settings.count, progress)
    features = compute_all_features(study, data, out=out, settings=settings, progress=progress)
    prompts = Prompts.of(data.captions)
    values: dict[str, dict[str, Interval]] = {variant: {} for variant in features}
    findings = list[Finding]()
    with progress(f"{study.name}: metrics", len(study.all_metrics) * len(features)) as done:
        for number, metric in enumerate(study.all_metrics):
            resampled, by_seed = dict[str, Resampled](), dict[str, list[float]]()
            for i, (variant, seed_features) in enumerate(features.items(), 1):
                each = [compute_metric(metric, data.scoring.combine(part, prompts)) for part in seed_features]
                resampled[variant] = Resampled.mean(each)
                by_seed[variant] = [one.value for one in each]
                values[variant][metric] = resampled[variant].interval().within(*METRICS[metric].bounds)
                done(number * len(features) + i)
            if metric in study.metrics:
                findings += [
                    evaluate_claim(claim, metric, resampled, by_seed, trained=study.trained)
                    for claim in study.claims
                ]
    tokens = {} if study.starts_from_data else {v.name: count_tokens(v) for v in study.variants}
    return Outcome(study, settings, values, findings, tokens)


def compute_all_features(
    study: Study, data: StudyData, *, out: Path, settings: StudySettings, progress: Progress
) -> dict[str, list[Features]]:
    """Return the features by variant and seed. Processes with the same `out` share the work."""
    get = partial(compute_features, data=data, out=out, settings=settings, progress=progress)
    pairs = [(variant, seed) for seed in settings.seeds for variant in study.variants]
    run_tasks(
        [Task(lock_key(v, seed, settings.iterations), partial(get, v, seed)) for v, seed in pairs],
        out / "locks", progress=progress,
    )  # fmt: skip
    return {variant.name: [get(variant, seed) for seed in settings.seeds] for variant in study.variants}


def compute_metric(metric: str, seen: ImageFeatures) -> Resampled:
    """Compute a metric for the images of one seed, over all prompts and over random halves of them.

    The halves are the same for all seeds and variants.
    """
    statistic = METRICS[metric].statistic(seen)
    assert statistic is not None, f"{metric} must be defined for one image per prompt"
    return resample(statistic, seen.prompts)


def variant_recipe(variant: Variant, seed: int, iterations: int | None) -> Recipe:
    """Return the recipe that trains the student of a variant."""
    changes = [*variant.overrides, f"train.seed={seed}", "train.sample_every=0"]
    if iterations is not None:
        changes.append(f"train.iterations={iterations}")
    return find_recipe("mini").override(changes)


def cache_key(recipe: Recipe, *more: str) -> str:
    """Return a hash of everything that a student or its images depend on, for use in file names."""
    parts = [str(CACHE_VERSION), mini.fingerprint(), recipe.to_yaml(), *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def lock_key(variant: Variant, seed: int, iterations: int | None) -> str:
    """Return the key of a variant's lock, which is the same for variants that share a student."""
    return cache_key(variant_recipe(variant, seed, iterations), variant.sampler, str(variant.start))


def count_tokens(variant: Variant) -> int:
    """Count the image tokens processed by the denoiser per image; guidance counts twice."""
    recipe = variant_recipe(variant, 0, None)
    model = setup.load(recipe, ("denoiser",))
    if not variant.sampler:
        return recipe.override(list(variant.sampling_overrides)).schedule.build().tokens(model.patch)
    sampler = parse_sampler(variant.sampler, recipe)
    assert sampler.schedule is not None, "a folder cannot be a variant"
    if sampler.kind != "teacher":
        return sampler.schedule.tokens(model.patch)
    forwards = count_passes(model, sampler) * (2 if sampler.guidance > 1 else 1)
    return forwards * model.token_count(sampler.schedule.full)


def compute_features(
    variant: Variant, seed: int, data: StudyData, *, out: Path, settings: StudySettings, progress: Progress
) -> Features:
    """Return the features of a variant's P images for one seed; trains and samples unless they are cached."""
    recipe = variant_recipe(variant, seed, settings.iterations)
    extractors = [mini.fingerprint(mini.SCORER), *(extra.name for extra, _ in data.scoring.examiners)]
    key = cache_key(
        recipe, variant.sampler, str(variant.start), *variant.sampling_overrides, *data.captions, *extractors
    )
    path = out / "drawn" / f"{key}.safetensors"
    if path.exists():
        return load_features(path)
    sampler = None if variant.start else prepare_sampler(variant, recipe, out, progress)
    prompts = Prompts.of(data.captions, seed=seed)
    model = setup.load(recipe, ("denoiser", "vae", "text"))
    with progress(f"{variant.name}, seed {seed}: sampling", len(prompts)) as done:
        if sampler:
            images = generate_images(
                model, sampler, prompts, batch=16, precision=recipe.train.precision, done=done
            )
        else:
            assert variant.start
            images = sample_from_start(model, recipe, variant.start, prompts, latents=data.latents, done=done)
    features = data.scoring.score_images(images, prompts.captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(images[:SHEET_IMAGES]), columns=12).save(path.with_suffix(".png"))
    metadata = {"arm": variant.name, "seed": str(seed)}
    write_atomically(path, lambda temporary: save_file(features, temporary, metadata=metadata))
    return features


def load_features(path: Path) -> Features:
    """Load cached features; RecipeError if the file is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{path} is damaged ({first_line(error)}); delete it and run the study again to regenerate it."
        ) from error


def prepare_sampler(variant: Variant, recipe: Recipe, out: Path, progress: Progress) -> SamplerSpec:
    """Return the sampler of a variant; a student is trained first, or its training resumed."""
    if variant.sampler:
        return parse_sampler(variant.sampler, recipe)
    folder = out / "students" / cache_key(recipe)
    if not (folder / "student.safetensors").exists():
        name = f"{variant.name}, seed {recipe.train.seed}: training"
        with resumed_by_same_command(), progress(name, recipe.train.iterations) as done:
            for row in distill(recipe, folder, progress, resume=(folder / "recipe.yaml").exists()):
                done(int(row["iteration"]))
    try:
        sampler = parse_sampler(f"student:{folder}", recipe)
    except StudentError as error:
        raise RecipeError(
            f"{first_line(error).rstrip('.')}. To retrain this student, delete {folder} and run the study "
            "again."
        ) from error
    return replace(sampler, schedule=recipe.override(list(variant.sampling_overrides)).schedule.build())

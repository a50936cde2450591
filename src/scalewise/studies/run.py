"""Run a study: train what is missing, draw, judge; every part is kept, so that a stopped study goes on."""

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
from scalewise.common.progress import Progress, ProgressCallback
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
from scalewise.metrics import FEWEST, METRICS, Interval, Resampled, Seen, resample
from scalewise.metrics.base import Gaussian
from scalewise.models import PipelineAdapter
from scalewise.models.lora import StudentError
from scalewise.studies.base import Arm, Finding, Start, Study, Verdict, find, overall
from scalewise.studies.work_queue import Task, work_off
from scalewise.training import setup
from scalewise.training.run import distill

SHOWN = 24  # pictures on an arm's sheet
Looks = dict[str, Tensor]
"""What judges made of every picture [P, ...], by metric."""
TRAINING = 2  # raised when the same recipe trains or draws something else: what is kept of before is then
# made anew (2: all updates of an iteration have one step of the schedule)


@dataclass(frozen=True)
class Effort:
    """How much is drawn and trained."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Each trains a student of every arm and draws its own pictures."""
    count: int = 299
    """Prompts, held out."""
    iterations: int | None = None
    """Of every student; None = the recipe's."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise RecipeError(f"Give one or more different seeds from 0 on, not {list(self.seeds)}.")
        if self.count < FEWEST:
            raise RecipeError(f"{self.count} prompts have no intervals; give {FEWEST} or more.")
        if self.iterations is not None and self.iterations < 1:
            raise RecipeError(f"A student has 1 iteration or more, not {self.iterations}.")


@dataclass(frozen=True)
class Outcome:
    """A study's figures and findings."""

    study: Study
    effort: Effort
    figures: dict[str, dict[str, Interval]]
    """By arm and metric, over all seeds."""
    findings: list[Finding]
    tokens: dict[str, int]
    """Of the denoiser for a picture, over all passes, by arm; none where the teacher goes on from others."""

    def verdict(self, text: str) -> Verdict:
        """The verdict on a claim, over all figures."""
        return overall([f for f in self.findings if f.claim.text == text])

    def to_dict(self) -> dict[str, Any]:
        """What was found, as stored in JSON."""
        return {
            "study": self.study.name, "source": self.study.source, "seeds": self.effort.seeds,
            "prompts": self.effort.count, "iterations": self.effort.iterations, "figures": self.figures,
            "tokens": self.tokens, "findings": self.findings,
            "verdicts": {claim.text: self.verdict(claim.text) for claim in self.study.claims},
        }  # fmt: skip


@dataclass(frozen=True)
class Material:
    """The prompts that all arms draw, and who judges."""

    texts: list[str]
    judge: Scorers
    latents: dict[Scale, Tensor] = field(default_factory=dict)
    """Of the pictures that arms go on from, full size last."""


def held_out(count: int) -> Material:
    """Captions that nothing was trained on, and real pictures to compare with."""
    return Material(held_out_texts(count), load_scorers(find_recipe("mini")))


def held_out_texts(count: int) -> list[str]:
    """The first held-out captions; raises RecipeError if there are not so many."""
    texts = mini.captions("test")
    if count > len(texts):
        raise RecipeError(f"There are {len(texts)} held-out captions, not {count}; take at most as many.")
    return texts[:count]


@torch.no_grad()
def continued(count: int) -> Material:
    """Samples of the shipped set with different captions to go on from, and others to compare with."""
    recipe, stored = find_recipe("mini"), LatentSet.open(mini.DATA)
    schedule, rows, others = recipe.schedule.build(), *chosen(stored, count)
    judge, model = load_scorers(recipe), setup.load(recipe, ("vae",))
    parts = stored.latents(others, schedule.full).split(16)
    pictures = np.concatenate([to_bytes(model.decode(part)) for part in parts])
    looks = judge.score_images(pictures, stored.captions(others))
    real = {SPECTRUM: Gaussian.fit(looks[SPECTRUM])}
    return Material(
        stored.captions(rows),
        replace(judge, reference=looks[SCORER], real=real),
        {scale: stored.latents(rows, scale) for scale in (schedule.scales[0], schedule.full)},
    )


def chosen(stored: LatentSet, count: int) -> tuple[list[int], list[int]]:
    """Samples with different captions to go on from, and as many others; RecipeError if there are too few."""
    captions = stored.captions(range(len(stored)))
    rows = list({captions[i]: i for i in permutation(len(stored), "upscaling").tolist()}.values())
    if len(rows) < 2 * count:
        raise RecipeError(
            f"The set has {len(rows)} different captions, too few for {count} prompts and as many samples "
            f"to compare with; take at most {len(rows) // 2}."
        )
    return rows[:count], rows[count : 2 * count]


@torch.no_grad()
def go_on(
    model: PipelineAdapter, recipe: Recipe, start: Start, prompts: Prompts, *,
    latents: Mapping[Scale, Tensor], done: ProgressCallback,
) -> np.ndarray:  # fmt: skip
    """Let the teacher finish noised latents of known pictures: bytes [N, H, W, 3]."""
    small, full = latents
    backbone = Backbone(model, precision=recipe.train.precision)
    teacher = recipe.teacher
    levels = model.teacher_scheduler(teacher.steps, full, shift=teacher.shift).timesteps
    encode = partial(model.encode_for_teacher, length=teacher.max_sequence_length)
    begin = int((levels - start.t).abs().argmin())
    uncond, parts = encode([teacher.negative_prompt]), list[np.ndarray]()
    for at in range(0, len(prompts), 16):
        some, part = prompts[at : at + 16], slice(at, at + 16)
        x_t = noised(
            start.how, latents[small][part], latents[full][part], seeds=some.seeds, process=model.noise,
            t=float(levels[begin]),
        )  # fmt: skip
        x0 = sample_teacher(
            backbone, full, encode(some.captions), some.seeds, steps=teacher.steps,
            guidance=teacher.guidance, uncond=uncond, shift=teacher.shift, start=x_t, begin=begin,
        )  # fmt: skip
        parts.append(to_bytes(model.decode(x0)))
        done(at + len(some))
    return np.concatenate(parts)


def noised(
    how: str, small: Tensor, full: Tensor, *, seeds: Sequence[int], process: NoiseProcess, t: float
) -> Tensor:
    """Bring clean latents to the level t: the full-size ones, or the small ones enlarged before or after."""
    scale, noise = Scale(1, *full.shape[-2:]), SampleNoise(seeds)
    if how == "enlarged, noised":
        full = upscale_latents(small, scale)
    x0 = small if how == "noised, enlarged" else full
    x_t = process.add_noise(x0, noise(x0.shape[1:]), torch.full((len(x0),), t))
    return upscale_latents(x_t, scale)


def material_of(study: Study, count: int) -> Material:
    """What all arms of a study have in common."""
    return continued(count) if study.continues else held_out(count)


def refuse_count(study: Study, count: int) -> None:
    """Raise RecipeError for more prompts than a study has, before anything is computed."""
    if study.continues:
        chosen(LatentSet.open(mini.DATA), count)
    else:
        held_out_texts(count)


def run_study(study: Study, out: Path, effort: Effort, *, progress: Progress) -> Outcome:
    """Train and draw every arm with every seed, and judge the claims."""
    if study.trained and len(effort.seeds) < 2:
        warnings.warn(
            f"{study.name}: 1 seed does not tell how trainings differ, so that nothing is decided about "
            "students; give --seed twice or more often.",
            stacklevel=2,
        )
    material = material_of(study, effort.count)
    looks = looks_of_all(study, material, out=out, effort=effort, progress=progress)
    prompts = Prompts.of(material.texts)
    figures: dict[str, dict[str, Interval]] = {arm: {} for arm in looks}
    findings = list[Finding]()
    with progress(f"{study.name}: figures", len(study.figures) * len(looks)) as done:
        for number, metric in enumerate(study.figures):
            sampled, by_seed = dict[str, Resampled](), dict[str, list[float]]()
            for at, (arm, parts) in enumerate(looks.items(), 1):
                each = [figure_of(metric, material.judge.combine(part, prompts)) for part in parts]
                sampled[arm] = Resampled.mean(each)
                by_seed[arm] = [figure.value for figure in each]
                figures[arm][metric] = sampled[arm].interval().within(*METRICS[metric].bounds)
                done(number * len(looks) + at)
            if metric in study.metrics:
                findings += [
                    find(claim, metric, sampled, by_seed, trained=study.trained) for claim in study.claims
                ]
    tokens = {} if study.continues else {arm.name: tokens_of(arm) for arm in study.arms}
    return Outcome(study, effort, figures, findings, tokens)


def looks_of_all(
    study: Study, material: Material, *, out: Path, effort: Effort, progress: Progress
) -> dict[str, list[Looks]]:
    """What the judges made of the pictures, by arm and seed; processes with the same `out` share work."""
    get = partial(looks_of, material=material, out=out, effort=effort, progress=progress)
    every = [(arm, seed) for seed in effort.seeds for arm in study.arms]
    work_off(
        [Task(owner_of(arm, seed, effort.iterations), partial(get, arm, seed)) for arm, seed in every],
        out / "locks", progress=progress,
    )  # fmt: skip
    return {arm.name: [get(arm, seed) for seed in effort.seeds] for arm in study.arms}


def figure_of(metric: str, seen: Seen) -> Resampled:
    """A metric of one seed's pictures, over all prompts and over halves of them, the same for all seeds."""
    statistic = METRICS[metric].statistic(seen)
    assert statistic is not None, f"{metric} can be taken of one picture a prompt"
    return resample(statistic, seen.prompts)


def recipe_of(arm: Arm, seed: int, iterations: int | None) -> Recipe:
    """The recipe that trains an arm's student."""
    changes = [*arm.overrides, f"train.seed={seed}", "train.sample_every=0"]
    if iterations is not None:
        changes.append(f"train.iterations={iterations}")
    return find_recipe("mini").override(changes)


def key_of(recipe: Recipe, *more: str) -> str:
    """A short name of everything that decides a student or its pictures; arms of several studies share it."""
    parts = [str(TRAINING), mini.fingerprint(), recipe.to_yaml(), *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def owner_of(arm: Arm, seed: int, iterations: int | None) -> str:
    """What only one process may make at a time: arms that share a student have the same."""
    return key_of(recipe_of(arm, seed, iterations), arm.contender, str(arm.start))


def tokens_of(arm: Arm) -> int:
    """Image tokens that go through the denoiser for one picture, twice where there is guidance."""
    recipe = recipe_of(arm, 0, None)
    model = setup.load(recipe, ("denoiser",))
    if not arm.contender:
        return recipe.override(list(arm.drawn)).schedule.build().tokens(model.patch)
    contender = parse_sampler(arm.contender, recipe)
    assert contender.schedule is not None, "a folder is no arm"
    if contender.kind != "teacher":
        return contender.schedule.tokens(model.patch)
    forwards = count_passes(model, contender) * (2 if contender.guidance > 1 else 1)
    return forwards * model.token_count(contender.schedule.full)


def looks_of(
    arm: Arm, seed: int, material: Material, *, out: Path, effort: Effort, progress: Progress
) -> Looks:
    """What the judges made of an arm's P pictures of one seed; trained and drawn unless it is there."""
    recipe = recipe_of(arm, seed, effort.iterations)
    judges = [mini.fingerprint(mini.SCORER), *(extra.name for extra, _ in material.judge.examiners)]
    key = key_of(recipe, arm.contender, str(arm.start), *arm.drawn, *material.texts, *judges)
    path = out / "drawn" / f"{key}.safetensors"
    if path.exists():
        return read_looks(path)
    contender = None if arm.start else contender_of(arm, recipe, out, progress)
    prompts = Prompts.of(material.texts, seed=seed)
    model = setup.load(recipe, ("denoiser", "vae", "text"))
    with progress(f"{arm.name}, seed {seed}: drawing", len(prompts)) as done:
        if contender:
            images = generate_images(
                model, contender, prompts, batch=16, precision=recipe.train.precision, done=done
            )
        else:
            assert arm.start
            images = go_on(model, recipe, arm.start, prompts, latents=material.latents, done=done)
    looks = material.judge.score_images(images, prompts.captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(images[:SHOWN]), columns=12).save(path.with_suffix(".png"))
    metadata = {"arm": arm.name, "seed": str(seed)}
    write_atomically(path, lambda temporary: save_file(looks, temporary, metadata=metadata))
    return looks


def read_looks(path: Path) -> Looks:
    """What was kept of an arm's pictures; raises RecipeError for a damaged file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{path} is damaged ({first_line(error)}); delete it, and the study draws those pictures again."
        ) from error


def contender_of(arm: Arm, recipe: Recipe, out: Path, progress: Progress) -> SamplerSpec:
    """Who draws an arm's pictures; a student is trained first, or trained on."""
    if arm.contender:
        return parse_sampler(arm.contender, recipe)
    folder = out / "students" / key_of(recipe)
    if not (folder / "student.safetensors").exists():
        name = f"{arm.name}, seed {recipe.train.seed}: training"
        with resumed_by_same_command(), progress(name, recipe.train.iterations) as done:
            for row in distill(recipe, folder, progress, resume=(folder / "recipe.yaml").exists()):
                done(int(row["iteration"]))
    try:
        contender = parse_sampler(f"student:{folder}", recipe)
    except StudentError as error:
        raise RecipeError(
            f"{first_line(error).rstrip('.')} Here: delete {folder}, and the study trains that student again."
        ) from error
    return replace(contender, schedule=recipe.override(list(arm.drawn)).schedule.build())

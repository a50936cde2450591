"""The spectral survey of a recipe: spectra of its latents, safe scales, its schedule and a proposal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalewise import mini
from scalewise.common.progress import Progress
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data import LatentSet
from scalewise.data.image_folder import ImageEntry, load_pixels, scan_images
from scalewise.data.shards import DataError
from scalewise.method.noise import NoiseProcess
from scalewise.method.rng import permutation
from scalewise.method.scales import Scale, ScaleSchedule
from scalewise.method.spectrum import (
    Spectra,
    Spectrum,
    advice,
    candidates,
    margins,
    propose,
    spaced,
    weights,
    within_budget,
)
from scalewise.models import ModelAdapter
from scalewise.models.meta import skeleton
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.planning.plan import forward_flops
from scalewise.training import setup

DENSE = 100  # steps of the model's own schedule that timesteps are chosen among
BATCH = 8  # pictures encoded at once
FEW = 64


@dataclass(frozen=True)
class Wish:
    """What a proposal has to keep to."""

    steps: int | None = None
    """Number of steps; None = as many as the recipe, at its timesteps."""
    timesteps: tuple[float, ...] = ()
    """The timesteps themselves, instead of `steps`."""
    budget: float | None = None
    """Part of the tokens of as many steps at full scale."""
    margin: float = 1.0
    """By how much noise has to exceed the signal that a scale cannot hold."""
    smallest: float = 0.25
    """No side, and no number of frames, below this part of the full one."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.timesteps:
            raise RecipeError("Give --steps or --timesteps, not both.")
        if not 1 <= self.margin < math.inf:
            raise RecipeError(f"A margin of {self.margin:g} is not safe; it is a number of at least 1.")
        if not 0 < self.smallest <= 1:
            raise RecipeError(f"--smallest {self.smallest:g} must be a part of the full side, in (0, 1].")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise RecipeError(f"--budget {self.budget:g} must be a part of the full-scale cost, in (0, 1].")


def parse_levels(text: str | None) -> tuple[float, ...]:
    """Read noise levels such as "1000 896 737" or "1000,896,737"."""
    try:
        levels = tuple(float(word) for word in (text or "").replace(",", " ").split())
    except ValueError:
        raise RecipeError(
            f"Cannot read the noise levels {text!r}; write numbers, as in '1000 896 737'."
        ) from None
    for t in levels:
        if not 0 < t <= 1000:
            raise RecipeError(f"The noise level {t:g} lies outside (0, 1000]; levels are 1000 x sigma.")
    return levels


@dataclass(frozen=True)
class Judged:
    """A schedule and what there is to say of it."""

    name: str
    schedule: ScaleSchedule
    tokens: int
    token_part: float
    """Of as many steps at full scale."""
    flops: float
    flop_part: float
    margins: tuple[float, ...]
    """Of every step after the first: what noise hides of what upscaling misses."""
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it; a margin without bound is null."""
        return {
            "name": self.name, "timesteps": list(self.schedule.timesteps),
            "scales": [str(s) for s in self.schedule.scales], "tokens": self.tokens,
            "token_part": self.token_part, "flops": self.flops, "flop_part": self.flop_part,
            "margins": [m if math.isfinite(m) else None for m in self.margins], "advice": list(self.advice),
        }  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """Spectra of a number of latents and the schedules judged by them."""

    recipe: Recipe
    wish: Wish
    latents: int
    noise: NoiseProcess
    spectra: Spectra
    sizes: tuple[Scale, ...]
    """Sizes of one frame that a schedule may use, small to large."""
    schedules: tuple[Judged, ...]

    @property
    def axes(self) -> dict[str, Spectrum]:
        """The spectra by axis: space, and time for video."""
        time = self.spectra.time
        return {"space": self.spectra.space} | ({"time": time} if time else {})

    @property
    def options(self) -> dict[str, list[Scale]]:
        """By axis, the scales that differ from full size along it alone, small to large."""
        full = self.spectra.full
        sizes = [Scale(full.frames, *s.size) for s in self.sizes]
        frames = [Scale(n, *full.size) for n in range(1, full.frames + 1)]
        return {"space": sizes} | ({"time": frames} if self.spectra.time else {})

    def smallest_safe(self, axis: str, t: float) -> Scale:
        """Return the smallest option along an axis whose loss the noise at t hides by the wished margin."""
        return next(
            s for s in self.options[axis] if self.spectra.margin(s, t, self.noise) >= self.wish.margin
        )

    def safe_from(self, scale: Scale) -> float | None:
        """Return the lowest t at which a scale has the wished margin."""
        return self.spectra.safe_from(scale, self.noise, margin=self.wish.margin)

    def hidden_from(self, axis: str, t: float) -> float:
        """Return the frequency, in cycles a cell, from which on noise at t exceeds the signal by the wished
        margin.
        """
        alpha, sigma = weights(self.noise, t)
        return self.axes[axis].at_most(sigma**2 / (self.wish.margin * alpha**2) if alpha else math.inf)

    def noisy(self, axis: str, t: float) -> Tensor:
        """Return the expected power [K] along an axis of latents noised to t."""
        alpha, sigma = weights(self.noise, t)
        return alpha**2 * self.axes[axis].power + sigma**2

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        levels = sorted({t for judged in self.schedules for t in judged.schedule.timesteps}, reverse=True)
        return {
            "recipe": self.recipe.name,
            "base": self.recipe.model.base,
            "data": self.recipe.data.path,
            "wish": asdict(self.wish),
            "latents": self.latents,
            "full": str(self.spectra.full),
            "schedules": [judged.to_dict() for judged in self.schedules],
            "axes": {axis: self._axis(axis, levels) for axis in self.axes},
        }

    def _axis(self, axis: str, levels: Sequence[float]) -> dict[str, Any]:
        spectrum, number = self.axes[axis], list(self.axes).index(axis)
        return {
            "cycles_per_cell": spectrum.frequency.tolist(),
            "clean": spectrum.power.tolist(),
            "exponent": spectrum.exponent(),
            "scales": [
                {
                    "scale": str(scale),
                    "holds_cycles_per_cell": self.spectra.limits(scale)[number],
                    "safe_from": self.safe_from(scale),
                }
                for scale in self.options[axis]
            ],
            "levels": [
                {
                    "t": t,
                    "alpha": weights(self.noise, t)[0],
                    "sigma": weights(self.noise, t)[1],
                    "smallest_safe": str(self.smallest_safe(axis, t)),
                    "noisy": self.noisy(axis, t).tolist(),
                }
                for t in levels
            ],
        }


def survey(recipe: Recipe, wish: Wish, *, count: int, progress: Progress) -> Survey:
    """Measure latents of the recipe's data, judge its schedule and propose another; loads no denoiser."""
    base = mini.resolve(recipe.model.base, mini.TEACHER)
    model = skeleton(
        base, max_sequence_length=recipe.model.max_sequence_length, variant=recipe.model.variant,
        family=recipe.model.family,
    )  # fmt: skip
    own = recipe.schedule.build()
    model.check_schedule(own)
    timesteps = chosen_timesteps(model, own, wish)
    latents = gather(recipe, model, count=count, progress=progress)
    if len(latents) < FEW:
        warnings.warn(
            f"{len(latents)} latents are too few for a spectrum of the data; measure {FEW} or more (--count, "
            "--data).",
            stacklevel=2,
        )
    spectra = Spectra.of(latents)
    proposed = proposal(spectra, model, timesteps, wish)
    flops = dict[Scale, float]()
    needed = sorted({*own.scales, *proposed.scales})
    with progress("counting operations", len(needed)) as done:
        for scale in needed:
            flops[scale] = forward_flops(model, scale)
            done(len(flops))
    sizes = {Scale(1, *s.size) for s in needed} | set(
        candidates(own.full, model.patch, smallest=wish.smallest)
    )
    named = {"recipe": own, "proposal": proposed}
    return Survey(
        recipe, wish, len(latents), model.noise, spectra, tuple(sorted(sizes)),
        tuple(judge(name, schedule, model, spectra, flops) for name, schedule in named.items()),
    )  # fmt: skip


def chosen_timesteps(model: PipelineAdapter, own: ScaleSchedule, wish: Wish) -> list[float]:
    """Return the timesteps of the proposal: those given, or so many from 1000 to the recipe's last."""
    if wish.timesteps:
        return list(wish.timesteps)
    if wish.steps in (None, len(own)):
        return list(own.timesteps)
    levels = model.teacher_scheduler(DENSE, own.full).timesteps.tolist()
    return spaced(levels, wish.steps or 0, own.timesteps[-1])


def proposal(
    spectra: Spectra, model: PipelineAdapter, timesteps: Sequence[float], wish: Wish
) -> ScaleSchedule:
    """Return the cheapest schedule of the wished margin, or the most careful one of the wished budget."""

    def schedule_at(margin: float) -> ScaleSchedule:
        return propose(
            spectra, model.noise, timesteps, patch=model.patch, margin=margin, smallest=wish.smallest
        )

    if wish.budget is None:
        return schedule_at(wish.margin)
    return within_budget(schedule_at, model.token_count, budget=wish.budget, least=wish.margin)


def judge(
    name: str, schedule: ScaleSchedule, model: PipelineAdapter, spectra: Spectra, flops: Mapping[Scale, float]
) -> Judged:
    """Weigh a schedule: cost, margins, and where it leaves the paper's advice or is not safe."""
    steps, full = len(schedule), schedule.full
    tokens = sum(model.token_count(s) for s in schedule.scales)
    operations = sum(flops[s] for s in schedule.scales)
    hidden = margins(spectra, model.noise, schedule)
    default = model.teacher_scheduler(steps, full).timesteps.tolist()
    found = advice(schedule, default)
    for step, margin in zip(schedule.steps[1:], hidden, strict=True):
        if margin < 1:
            found.append(
                f"What is enlarged to {step.scale} lacks detail {1 / margin:.2g} times as strong as the "
                f"noise at t = {step.t:g}."
            )
    return Judged(
        name, schedule, tokens, tokens / (steps * model.token_count(full)), operations,
        operations / (steps * flops[full]), tuple(hidden), tuple(found),
    )  # fmt: skip


def gather(recipe: Recipe, model: PipelineAdapter, *, count: int, progress: Progress) -> Tensor:
    """Return up to `count` clean latents [N, C, ...] at full size: of a set, or of pictures, encoded."""
    path, full = Path(mini.resolve(recipe.data.path, mini.DATA)), recipe.schedule.build().full
    if (path / "set.json").exists():
        stored = LatentSet.open(path)
        rows = permutation(len(stored), "spectrum")[:count].tolist()
        return stored.latents(rows, full)
    if not path.is_dir():
        raise DataError(
            f"There are no latents or pictures in {path}; give --data with a set (`scalewise generate`) or "
            "a folder of images."
        )
    if model.video:
        raise RecipeError(
            f"{path} holds no set, and {recipe.model.base} makes videos; `scalewise generate` one."
        )
    entries, skipped = scan_images(path, captions=False)
    skipped.warn(path)
    return encode(setup.load(recipe, ["vae"]), entries, full, count=count, progress=progress)


@torch.no_grad()
def encode(
    model: ModelAdapter, entries: Sequence[ImageEntry], full: Scale, *, count: int, progress: Progress
) -> Tensor:
    """Return latents [N, C, H, W] of pictures, those large enough."""
    height, width = model.pixel_size(full)
    # An enlarged picture has no high frequencies, and would speak for smaller scales than are safe.
    large = [e for e in entries if e.width >= width and e.height >= height]
    if not large:
        raise DataError(
            f"None of the {len(entries)} pictures has the full size of {height}x{width} pixels; give larger "
            "ones."
        )
    if len(large) < len(entries):
        warnings.warn(
            f"{len(entries) - len(large)} of {len(entries)} pictures are smaller than {height}x{width} "
            "pixels and left out.",
            stacklevel=2,
        )
    chosen = [large[i] for i in permutation(len(large), "spectrum")[:count].tolist()]
    parts = []
    with progress("encoding images", len(chosen)) as done:
        for start in range(0, len(chosen), BATCH):
            pixels = torch.stack([load_pixels(e, (height, width)) for e in chosen[start : start + BATCH]])
            parts.append(model.encode(pixels.to(model.device)).float().cpu())
            done(min(start + BATCH, len(chosen)))
    return torch.cat(parts)

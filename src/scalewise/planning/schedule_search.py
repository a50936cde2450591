"""Spectrum of the latents of a recipe, safe scales, margins of its schedule, and a proposed schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scalewise.common.progress import Progress
from scalewise.config.recipe import Recipe, RecipeError
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
from scalewise.models.meta import build_meta_model
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.planning.plan import flops_of
from scalewise.training import setup

DENSE = 100  # steps of the model's schedule from which timesteps are chosen
BATCH = 8  # images encoded at a time
FEW = 64


@dataclass(frozen=True)
class SearchOptions:
    """Constraints on the proposed schedule."""

    steps: int | None = None
    """Number of steps; None = the timesteps of the recipe."""
    timesteps: tuple[float, ...] = ()
    """Timesteps, instead of `steps`."""
    budget: float | None = None
    """Maximum tokens relative to the same number of steps at full scale."""
    margin: float = 1.0
    """Required ratio of noise to the signal that a scale cannot represent."""
    smallest: float = 0.25
    """Smallest side and number of frames relative to the full ones."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.timesteps:
            raise RecipeError("Give --steps or --timesteps, not both.")
        if not 1 <= self.margin < math.inf:
            raise RecipeError(f"--margin must be a finite number of at least 1; got {self.margin:g}.")
        if not 0 < self.smallest <= 1:
            raise RecipeError(
                f"--smallest must be a fraction of the full side in (0, 1]; got {self.smallest:g}."
            )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise RecipeError(
                f"--budget must be a fraction of the full-scale cost in (0, 1]; got {self.budget:g}."
            )


def parse_timesteps(text: str | None) -> tuple[float, ...]:
    """Parse timesteps such as "1000 896 737" or "1000,896,737"; RecipeError if invalid."""
    try:
        timesteps = tuple(float(word) for word in (text or "").replace(",", " ").split())
    except ValueError:
        raise RecipeError(
            f"Cannot parse the timesteps {text!r}; write numbers, as in '1000 896 737'."
        ) from None
    for t in timesteps:
        if not 0 < t <= 1000:
            raise RecipeError(f"Timestep {t:g} is outside (0, 1000]; timesteps are 1000 x sigma.")
    return timesteps


@dataclass(frozen=True)
class RatedSchedule:
    """A schedule with its cost, margins and advice."""

    name: str
    schedule: ScaleSchedule
    tokens: int
    token_part: float
    """Tokens relative to the same number of steps at full scale."""
    flops: float
    flop_part: float
    margins: tuple[float, ...]
    """For every step after the first: ratio of noise to the signal that is missing after upscaling."""
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data; an infinite margin is null."""
        return {
            "name": self.name, "timesteps": list(self.schedule.timesteps),
            "scales": [str(s) for s in self.schedule.scales], "tokens": self.tokens,
            "token_part": self.token_part, "flops": self.flops, "flop_part": self.flop_part,
            "margins": [m if math.isfinite(m) else None for m in self.margins], "advice": list(self.advice),
        }  # fmt: skip


@dataclass(frozen=True)
class SpectrumReport:
    """Spectra of latents, and the rated schedules."""

    recipe: Recipe
    search: SearchOptions
    latents: int
    noise: NoiseProcess
    spectra: Spectra
    sizes: tuple[Scale, ...]
    """Single-frame scales that a schedule may use, in increasing order."""
    schedules: tuple[RatedSchedule, ...]

    @property
    def axes(self) -> dict[str, Spectrum]:
        """Spectra by axis: space and, for video, time."""
        time = self.spectra.time
        return {"space": self.spectra.space} | ({"time": time} if time else {})

    @property
    def axis_scales(self) -> dict[str, list[Scale]]:
        """By axis, the scales that differ from full size only along this axis, in increasing order."""
        full = self.spectra.full
        sizes = [Scale(full.frames, *s.size) for s in self.sizes]
        frames = [Scale(n, *full.size) for n in range(1, full.frames + 1)]
        return {"space": sizes} | ({"time": frames} if self.spectra.time else {})

    def smallest_safe(self, axis: str, t: float) -> Scale:
        """Return the smallest scale along an axis that is safe at t with the required margin."""
        return next(
            s for s in self.axis_scales[axis] if self.spectra.margin(s, t, self.noise) >= self.search.margin
        )

    def safe_from(self, scale: Scale) -> float | None:
        """Return the lowest t at which a scale has the required margin; None if there is none."""
        return self.spectra.safe_from(scale, self.noise, margin=self.search.margin)

    def noise_cutoff(self, axis: str, t: float) -> float:
        """Return the frequency, in cycles per cell, above which the noise at t exceeds the signal by the
        required margin.
        """
        alpha, sigma = weights(self.noise, t)
        return self.axes[axis].at_most(sigma**2 / (self.search.margin * alpha**2) if alpha else math.inf)

    def noisy(self, axis: str, t: float) -> Tensor:
        """Return the expected power [K] of latents noised to t, along an axis."""
        alpha, sigma = weights(self.noise, t)
        return alpha**2 * self.axes[axis].power + sigma**2

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        timesteps = sorted({t for s in self.schedules for t in s.schedule.timesteps}, reverse=True)
        return {
            "recipe": self.recipe.name,
            "base": self.recipe.model.base,
            "data": self.recipe.data.path,
            "wish": asdict(self.search),
            "latents": self.latents,
            "full": str(self.spectra.full),
            "schedules": [schedule.to_dict() for schedule in self.schedules],
            "axes": {axis: self._axis(axis, timesteps) for axis in self.axes},
        }

    def _axis(self, axis: str, timesteps: Sequence[float]) -> dict[str, Any]:
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
                for scale in self.axis_scales[axis]
            ],
            "levels": [
                {
                    "t": t,
                    "alpha": weights(self.noise, t)[0],
                    "sigma": weights(self.noise, t)[1],
                    "smallest_safe": str(self.smallest_safe(axis, t)),
                    "noisy": self.noisy(axis, t).tolist(),
                }
                for t in timesteps
            ],
        }


def measure_spectrum(
    recipe: Recipe, options: SearchOptions, *, count: int, progress: Progress
) -> SpectrumReport:
    """Measure latents of the recipe's data, rate its schedule and propose another; loads no denoiser."""
    base = recipe.model.folder
    model = build_meta_model(
        base, max_sequence_length=recipe.model.max_sequence_length, variant=recipe.model.variant,
        family=recipe.model.family,
    )  # fmt: skip
    own = recipe.schedule.build()
    model.check_schedule(own)
    timesteps = proposal_timesteps(model, own, options)
    latents = load_latents(recipe, model, count=count, progress=progress)
    if len(latents) < FEW:
        warnings.warn(
            f"{len(latents)} latents are too few for a reliable spectrum; measure at least {FEW} (--count, "
            "--data).",
            stacklevel=2,
        )
    spectra = Spectra.of(latents)
    proposed = proposal(spectra, model, timesteps, options)
    flops = flops_of(model, (*own.scales, *proposed.scales), progress)
    sizes = {Scale(1, *s.size) for s in flops} | set(
        candidates(own.full, model.patch, smallest=options.smallest)
    )
    named = {"recipe": own, "proposal": proposed}
    return SpectrumReport(
        recipe, options, len(latents), model.noise, spectra, tuple(sorted(sizes)),
        tuple(rate(name, schedule, model, spectra, flops) for name, schedule in named.items()),
    )  # fmt: skip


def proposal_timesteps(model: PipelineAdapter, own: ScaleSchedule, options: SearchOptions) -> list[float]:
    """Return the timesteps of the proposal: those given, or `steps` from 1000 to the last of the recipe."""
    if options.timesteps:
        return list(options.timesteps)
    if options.steps in (None, len(own)):
        return list(own.timesteps)
    return spaced(timesteps_of(model, DENSE, own.full), options.steps or 0, own.timesteps[-1])


def timesteps_of(model: PipelineAdapter, steps: int, scale: Scale) -> list[float]:
    """Return the timesteps of the model's own schedule, each once: one of second order repeats them."""
    return list(dict.fromkeys(model.teacher_scheduler(steps, scale).timesteps.tolist()))


def proposal(
    spectra: Spectra, model: PipelineAdapter, timesteps: Sequence[float], options: SearchOptions
) -> ScaleSchedule:
    """Return the cheapest schedule with the margin, or the one with the largest margin within the budget."""

    def schedule_at(margin: float) -> ScaleSchedule:
        return propose(
            spectra, model.noise, timesteps, patch=model.patch, margin=margin, smallest=options.smallest
        )

    if options.budget is None:
        return schedule_at(options.margin)
    return within_budget(schedule_at, model.token_count, budget=options.budget, least=options.margin)


def rate(
    name: str, schedule: ScaleSchedule, model: PipelineAdapter, spectra: Spectra, flops: Mapping[Scale, float]
) -> RatedSchedule:
    """Rate a schedule: cost, margins, deviations from the paper's advice, and unsafe scales."""
    steps, full = len(schedule), schedule.full
    tokens = sum(model.token_count(s) for s in schedule.scales)
    operations = sum(flops[s] for s in schedule.scales)
    hidden = margins(spectra, model.noise, schedule)
    found = advice(schedule, timesteps_of(model, steps, full))
    for step, margin in zip(schedule.steps[1:], hidden, strict=True):
        if margin < 1:
            found.append(
                f"The signal missing after upscaling to {step.scale} is {1 / margin:.2g} times as strong as "
                f"the noise at t = {step.t:g}."
            )
    return RatedSchedule(
        name, schedule, tokens, tokens / (steps * model.token_count(full)), operations,
        operations / (steps * flops[full]), tuple(hidden), tuple(found),
    )  # fmt: skip


def load_latents(recipe: Recipe, model: PipelineAdapter, *, count: int, progress: Progress) -> Tensor:
    """Return up to `count` clean latents [N, C, ...] at full size, from a dataset or from encoded images."""
    path, full = recipe.data.folder, recipe.schedule.build().full
    if (path / "set.json").exists():
        stored = setup.open_set(recipe, path, [full], progress)
        rows = permutation(len(stored), "spectrum")[:count].tolist()
        return stored.latents(rows, full)
    if not path.is_dir():
        raise DataError(
            f"No latents or images in {path}; set --data to a dataset (`scalewise generate`) or a folder "
            "of images."
        )
    if model.video:
        raise RecipeError(
            f"{path} contains no dataset, which {recipe.model.base} needs as a video model; create one with "
            "`scalewise generate`."
        )
    entries, skipped = scan_images(path, captions=False)
    skipped.warn(path)
    return encode(setup.load(recipe, ["vae"]), entries, full, count=count, progress=progress)


@torch.no_grad()
def encode(
    model: PipelineAdapter, entries: Sequence[ImageEntry], full: Scale, *, count: int, progress: Progress
) -> Tensor:
    """Encode images that are large enough to latents [N, C, H, W]."""
    height, width = model.pixel_size(full)
    # Enlarged images have no high frequencies, so smaller scales than are safe would look safe.
    large = [e for e in entries if e.width >= width and e.height >= height]
    if not large:
        raise DataError(
            f"None of the {len(entries)} images has at least {height}x{width} pixels; use larger images."
        )
    if len(large) < len(entries):
        warnings.warn(
            f"{len(entries) - len(large)} of {len(entries)} images are smaller than {height}x{width} "
            "pixels and skipped.",
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

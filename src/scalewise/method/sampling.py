"""Sampling: the scale-wise few-step sampler of the student, and the teacher's own scheduler.

Progress bars, previews, pipelines and benchmarks run the very same code: they follow it by `on_step`.
`predict` stands for the model: (x_t, t [N]) -> x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone
from scalewise.method.noise import NoiseProcess
from scalewise.method.rng import SampleNoise
from scalewise.method.roles import TEACHER
from scalewise.method.scales import Scale, ScaleSchedule, upscale_latents

Predict = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], Tensor | None]
"""Called with the number i of a step and its x0 [N, ...]; a tensor that it returns takes the place of x0."""


class Noise(Protocol):
    """Gives the next noise [N, *shape] at every call."""

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor: ...


class Sampler(Protocol):
    """Samples [N, ...] for conditions and seeds, with everything else settled."""

    def __call__(
        self, cond: Condition, uncond: Condition, seeds: Sequence[int], *, on_step: OnStep | None = None
    ) -> Tensor: ...


def sample_scale_wise(
    predict: Predict,
    schedule: ScaleSchedule,
    process: NoiseProcess,
    noise: Noise,
    *,
    channels: int,
    video: bool = False,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample [N, C, H, W] (video [N, C, T, H, W]) along a schedule; `on_step` sees x0 at every s_i.

    `start` are clean latents at s_1 to begin with instead of noise alone. x0 is upscaled (never x_t), then
    noised afresh to the next level, also when the scale does not change (paper, section 4.1).
    """
    shape = schedule[0].scale.shape(1, channels, video=video)[1:]
    x = noise(shape, device)
    if start is not None:
        x = process.add_noise(start, x, torch.full((len(x),), schedule[0].t, device=x.device))
    for i, step in enumerate(schedule):
        x0 = _shown(on_step, i, predict(x, torch.full((len(x),), step.t, device=x.device)))
        if i + 1 < len(schedule):
            after = schedule[i + 1]
            x0 = upscale_latents(x0, after.scale)
            eps = noise(x0.shape[1:], x0.device)
            x = process.add_noise(x0, eps, torch.full((len(x),), after.t, device=x.device))
    return x0


def sample_with_scheduler(
    predict: Predict,
    scheduler: Any,
    process: NoiseProcess,
    noise: Noise,
    *,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    begin: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample [N, *shape] with a diffusers scheduler whose timesteps are set.

    The scheduler gets what the network would have predicted for the x0 given: working on x0 keeps the one
    question to the model. With `start`, latents noised to the level of step `begin`, the steps before that
    one are left out.
    """
    if start is None:
        x = noise(shape, device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    else:
        x = start
        scheduler.set_begin_index(begin)
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        level = torch.full((len(x),), float(t), device=x.device)
        x0 = _shown(on_step, i, predict(x_t, level))
        x = scheduler.step(process.prediction(x0, x_t, level), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def sample_student(
    backbone: Backbone,
    schedule: ScaleSchedule,
    cond: Condition,
    seeds: Sequence[int],
    *,
    role: str = "student",
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with a student: one forward a step, no guidance; sample i depends on its seed alone."""
    model = backbone.model
    return sample_scale_wise(
        partial(backbone.predict_x0, cond=cond, role=role), schedule, model.noise, SampleNoise(seeds),
        channels=model.channels, video=model.video, device=backbone.device, on_step=on_step,
    )  # fmt: skip


@torch.no_grad()
def sample_teacher(
    backbone: Backbone,
    scale: Scale,
    cond: Condition,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    uncond: Condition | None = None,
    shift: float | None = None,
    start: Tensor | None = None,
    begin: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with the teacher: its own schedule of `steps` steps, with guidance; `shift` replaces the
    schedule's own.

    `start` and `begin`: continue from noised latents at a step, as in `sample_with_scheduler`.
    """
    model = backbone.model
    return sample_with_scheduler(
        partial(backbone.predict_x0, cond=cond, role=TEACHER, guidance=guidance, uncond=uncond),
        model.teacher_scheduler(steps, scale, shift=shift), model.noise, SampleNoise(seeds),
        shape=scale.shape(1, model.channels, video=model.video)[1:], device=backbone.device, start=start,
        begin=begin, on_step=on_step,
    )  # fmt: skip


def _shown(on_step: OnStep | None, i: int, x0: Tensor) -> Tensor:
    changed = on_step(i, x0) if on_step else None
    return x0 if changed is None else changed

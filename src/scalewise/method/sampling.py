"""Sampling: the scale-wise few-step sampler of the student, and the teacher with its scheduler.

Training, pipelines and benchmarks use the same functions; progress bars and previews use `on_step`.
`predict` is the model: (x_t [N, C, H, W], t [N]) -> x0 [N, C, H, W].
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
"""Called with the index of a step and its x0 [N, C, H, W]; a returned tensor replaces x0."""


class Noise(Protocol):
    """Function that returns new noise [N, *shape] on every call."""

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor: ...


class Sampler(Protocol):
    """Function that returns samples [N, C, H, W] for conditions and seeds."""

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
    """Sample x0 [N, C, H, W] (video [N, C, T, H, W]) with a schedule; `on_step` gets the x0 of every step.

    `start`: clean latents [N, C, H, W] at the first scale, which are noised to the first timestep; None =
    pure noise. Between steps x0 (never x_t) is upscaled and noised with new noise to the next timestep, also
    if the scale does not change (paper, section 4.1).
    """
    shape = schedule[0].scale.shape(1, channels, video=video)[1:]
    x = noise(shape, device)
    if start is not None:
        x = process.add_noise(start, x, torch.full((len(x),), schedule[0].t, device=x.device))
    for i, step in enumerate(schedule):
        x0 = _after_step(on_step, i, predict(x, torch.full((len(x),), step.t, device=x.device)))
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
    begin_index: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample x0 [N, *shape] with a diffusers scheduler whose timesteps are set.

    `predict` returns x0, which is converted back into the kind of prediction that the scheduler expects.
    `start`: latents [N, *shape] noised to the timestep of step `begin_index`, where sampling then begins.
    """
    if start is None:
        x = noise(shape, device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    else:
        x = start
        scheduler.set_begin_index(begin_index)
    for i, t in enumerate(scheduler.timesteps[begin_index:], begin_index):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        timestep = torch.full((len(x),), float(t), device=x.device)
        x0 = _after_step(on_step, i, predict(x_t, timestep))
        x = scheduler.step(process.prediction(x0, x_t, timestep), t, x, return_dict=False)[0]
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
    """Sample x0 [N, C, H, W] with a student: one forward pass per step, no guidance.

    Sample i depends only on its condition and its seed, not on the batch.
    """
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
    begin_index: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample x0 [N, C, H, W] with the teacher: `steps` steps of its scheduler, with guidance.

    `shift` replaces the timestep shift of the scheduler. `start` [N, C, H, W] and `begin_index`: see
    `sample_with_scheduler`.
    """
    model = backbone.model
    return sample_with_scheduler(
        partial(backbone.predict_x0, cond=cond, role=TEACHER, guidance=guidance, uncond=uncond),
        model.teacher_scheduler(steps, scale, shift=shift), model.noise, SampleNoise(seeds),
        shape=scale.shape(1, model.channels, video=model.video)[1:], device=backbone.device, start=start,
        begin_index=begin_index, on_step=on_step,
    )  # fmt: skip


def _after_step(on_step: OnStep | None, i: int, x0: Tensor) -> Tensor:
    replacement = on_step(i, x0) if on_step else None
    return x0 if replacement is None else replacement

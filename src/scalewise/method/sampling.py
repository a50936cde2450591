"""Sampling: the scale-wise few-step sampler of the student, and the teacher's own scheduler.

Both are iterators over (step index, x0), so that progress bars, previews, pipelines and benchmarks run the
very same code. `predict` stands for the model: (x_t, t [N]) -> x0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
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


class Noise(Protocol):
    """Gives the next noise [N, *shape] at every call."""

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor: ...


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
) -> Generator[tuple[int, Tensor], Tensor | None, None]:
    """Yield (i, x0 at s_i) for every step; the last x0 is the sample.

    `start` are clean latents at s_1 to begin with instead of noise alone. Latents that are sent into the
    generator take the place of the x0 just yielded.

    x0 is upscaled (never x_t), then noised afresh to the next level, also when the scale does not change
    (paper, section 4.1).
    """
    shape = schedule[0].scale.shape(1, channels, video=video)[1:]
    x = noise(shape, device)
    if start is not None:
        x = process.add_noise(start, x, torch.full((len(x),), schedule[0].t, device=x.device))
    for i, step in enumerate(schedule):
        x0 = predict(x, torch.full((len(x),), step.t, device=x.device))
        changed = yield i, x0
        x0 = x0 if changed is None else changed
        if i + 1 < len(schedule):
            after = schedule[i + 1]
            x0 = upscale_latents(x0, after.scale)
            eps = noise(x0.shape[1:], x0.device)
            x = process.add_noise(x0, eps, torch.full((len(x),), after.t, device=x.device))


def sample_teacher(
    predict: Predict,
    scheduler: Any,
    process: NoiseProcess,
    noise: Noise,
    *,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    begin: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, x0) of the steps of a diffusers scheduler with its timesteps set, and last the sample itself.

    `shape` is a sample's. The scheduler gets what the network would have predicted for the x0 given: working
    on x0 keeps the one question to the model. With `start`, latents noised to the level of step `begin`,
    the steps before that one are left out.
    """
    if start is None:
        x = noise(shape, device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    else:
        x = start
        scheduler.set_begin_index(begin)
    final = len(scheduler.timesteps) - 1
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        level = torch.full((len(x),), float(t), device=x.device)
        x0 = predict(x_t, level)
        x = scheduler.step(process.prediction(x0, x_t, level), t, x, return_dict=False)[0]
        yield i, x if i == final else x0


def student_steps(
    backbone: Backbone,
    schedule: ScaleSchedule,
    cond: Condition,
    seeds: Sequence[int],
    *,
    role: str = "student",
) -> Iterator[tuple[int, Tensor]]:
    """Sample with a student: one forward a step, no guidance; sample i depends on its seed alone."""
    predict = partial(_ask, backbone, cond, role=role, guidance=None, uncond=None)
    model = backbone.model
    return _without_gradients(
        sample_scale_wise(
            predict,
            schedule,
            model.noise,
            SampleNoise(seeds),
            channels=model.channels,
            video=model.video,
            device=backbone.device,
        )
    )


def teacher_steps(
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
) -> Iterator[tuple[int, Tensor]]:
    """Sample with the teacher: its own schedule of `steps` steps, with guidance; `shift` replaces the
    schedule's own.

    `start` and `begin`: go on from noised latents at a step, as in `sample_teacher`.
    """
    predict = partial(_ask, backbone, cond, role=TEACHER, guidance=guidance, uncond=uncond)
    model = backbone.model
    return _without_gradients(
        sample_teacher(
            predict,
            model.teacher_scheduler(steps, scale, shift=shift),
            model.noise,
            SampleNoise(seeds),
            shape=scale.shape(1, model.channels, video=model.video)[1:],
            device=backbone.device,
            start=start,
            begin=begin,
        )
    )


def last(steps: Iterator[tuple[int, Tensor]]) -> Tensor:
    """Run a sampler to its end and return the finished latents."""
    newest = deque(steps, maxlen=1)
    assert newest, "a sampler has at least one step"
    return newest[0][1]


def _ask(
    backbone: Backbone,
    cond: Condition,
    x_t: Tensor,
    t: Tensor,
    *,
    role: str,
    guidance: float | None,
    uncond: Condition | None,
) -> Tensor:
    return backbone.predict_x0(x_t, t, cond, role=role, guidance=guidance, uncond=uncond)


def _without_gradients(steps: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    while True:
        with torch.no_grad():  # left at every yield, so that the caller's own setting holds in between
            item = next(steps, None)
        if item is None:
            return
        yield item

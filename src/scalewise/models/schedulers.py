"""Preparing the diffusers scheduler of a base for sampling with the teacher."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from scalewise.common.errors import ModelError
from scalewise.method.noise import FlowMatching, NoiseProcess


def refuse_inverted(config: Mapping[str, Any], base: str | Path) -> None:
    """Raise ModelError for a schedule with inverted sigmas, such as that of Mochi, which is not supported."""
    if config.get("invert_sigmas"):
        raise ModelError(
            f"The scheduler of {base} has invert_sigmas=true, so the noise increases from step to step, "
            "which is not supported. Set invert_sigmas to false in its scheduler/scheduler_config.json."
        )


def flow_matching_scheduler(scheduler: Any, needed: Mapping[str, Any], *, base: str) -> Any:
    """Return a scheduler for sampling with a flow-matching model.

    If `set_timesteps` does not take the `needed` arguments of the pipeline, warn and return a
    FlowMatchEulerDiscreteScheduler instead. Raises ModelError for a scheduler of another noise process.
    """
    config, name = scheduler.config, type(scheduler).__name__
    refuse_inverted(config, base)
    flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if not (name.startswith("FlowMatch") or flow):
        raise ModelError(
            f"The scheduler {name} of {base} is not configured for flow matching, so samples would be noise. "
            "Put a FlowMatchEulerDiscreteScheduler with the shift of the model into the scheduler folder of "
            "the base."
        )
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    rejected = [option for option in needed if option not in accepted]
    if not rejected:
        return scheduler
    shift = config.get("shift", config.get("flow_shift", 1.0))
    euler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    how = "dynamic shifting" if config.get("use_dynamic_shifting") else f"shift {shift:g}"
    warnings.warn(
        f"The scheduler {name} of {base} does not take {' and '.join(rejected)}, which the pipeline of the "
        f"model needs; the teacher samples with FlowMatchEulerDiscreteScheduler, {how}.",
        stacklevel=4,
    )
    return euler


def is_stochastic(scheduler: Any) -> bool:
    """Return whether a step of a scheduler depends on the generator; its timesteps must be set."""
    found = []
    for seed in (0, 1):
        probe, x_t = copy.deepcopy(scheduler), torch.ones(1, 1, 2, 2)
        t, rng = probe.timesteps[0], torch.Generator().manual_seed(seed)
        x_t = probe.scale_model_input(x_t, t) if hasattr(probe, "scale_model_input") else x_t
        found.append(probe.step(torch.zeros_like(x_t), t, x_t, generator=rng, return_dict=False)[0])
    return not torch.equal(*found)


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift mu of a flow-matching schedule that depends on the number of image tokens."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    usual = (256, 4096, 0.5, 1.15)
    return calculate_shift(tokens, *map(config.get, names, usual))


def with_shift(scheduler: Any, shift: float, *, base: str) -> tuple[Any, dict[str, float]]:
    """Return a scheduler with the sigmas shift s / (1 + (shift - 1) s), and the arguments of `set_timesteps`.

    Raises ModelError for a scheduler that is not for flow matching.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):  # mu is the shift or its logarithm
        return scheduler, {"mu": shift if config.get("time_shift_type") == "linear" else math.log(shift)}
    if "shift" in config:
        return type(scheduler).from_config(config, shift=shift), {}
    if config.get("use_flow_sigmas"):
        return type(scheduler).from_config(config, flow_shift=shift), {}
    raise ModelError(
        f"teacher.shift={shift:g} has no effect on the {type(scheduler).__name__} of {base}, which is not a "
        "flow-matching scheduler; set teacher.shift=null."
    )


def prepare_scheduler(
    scheduler: Any, steps: int, process: NoiseProcess, *, base: str, shift: float | None,
    options: Callable[[Any], dict[str, Any]],
) -> Any:  # fmt: skip
    """Return a copy of the scheduler of a base with its timesteps set; raise ModelError if it cannot be used.

    `options(scheduler)` returns the arguments of `set_timesteps` in the pipeline, except the number of steps;
    `shift` replaces the timestep shift of the scheduler.
    """
    scheduler = copy.deepcopy(scheduler)
    if flow := isinstance(process, FlowMatching):
        scheduler = flow_matching_scheduler(scheduler, options(scheduler), base=base)
    chosen = options(scheduler)
    if shift is not None:
        scheduler, own = with_shift(scheduler, shift, base=base)
        chosen |= own
    scheduler.set_timesteps(steps, **chosen)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    usual = "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler or DDIMScheduler"
    if "generator" in inspect.signature(scheduler.step).parameters and is_stochastic(scheduler):
        raise ModelError(
            f"The scheduler {type(scheduler).__name__} of {base} adds random noise, so samples would not be "
            f"reproducible; put a deterministic scheduler, such as {usual}, into the scheduler folder of the "
            "base."
        )
    return scheduler

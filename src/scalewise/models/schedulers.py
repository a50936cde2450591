"""Schedulers (diffusers) that a base brings along for its teacher's sampling."""

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
    """Refuse a schedule that rises from the image to noise, as Mochi's does; no family here samples so."""
    if config.get("invert_sigmas"):
        raise ModelError(
            f"The scheduler of {base} has invert_sigmas=true, so its noise rises from step to step, which "
            "this family was not trained for. Set invert_sigmas to false in its "
            "scheduler/scheduler_config.json."
        )


def for_flow_matching(scheduler: Any, needed: Mapping[str, Any], *, base: str) -> Any:
    """The scheduler to sample a flow-matching model with: its own, or FlowMatchEulerDiscreteScheduler in its
    place, with a warning, if its `set_timesteps` does not take what the family's pipeline has to give it.

    ModelError for a scheduler of another noise process, by which such a model draws noise.
    """
    config, name = scheduler.config, type(scheduler).__name__
    refuse_inverted(config, base)
    flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if not (name.startswith("FlowMatch") or flow):
        raise ModelError(
            f"The scheduler {name} of {base} is set for another noise process than flow matching, so its "
            "samples would be noise. Put FlowMatchEulerDiscreteScheduler with the model's shift into the "
            "base's scheduler folder."
        )
    lacking = [
        option for option in needed if option not in inspect.signature(scheduler.set_timesteps).parameters
    ]
    if not lacking:
        return scheduler
    shift = config.get("shift", config.get("flow_shift", 1.0))
    euler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    how = "dynamic shifting" if config.get("use_dynamic_shifting") else f"shift {shift:g}"
    warnings.warn(
        f"The scheduler {name} of {base} takes no {' and no '.join(lacking)}, which the model's pipeline "
        f"needs; the teacher samples with FlowMatchEulerDiscreteScheduler, {how}.",
        stacklevel=4,
    )
    return euler


def is_stochastic(scheduler: Any) -> bool:
    """Whether a scheduler, whose timesteps are set, draws noise of its own: tried out on its first step."""
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


def shifted(scheduler: Any, shift: float, *, base: str) -> tuple[Any, dict[str, float]]:
    """Return a scheduler (diffusers) whose sigmas are shift s / (1 + (shift - 1) s), and what its
    `set_timesteps` needs for that; ModelError for one that is not of flow matching.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):  # mu stands for the shift, or for its logarithm
        return scheduler, {"mu": shift if config.get("time_shift_type") == "linear" else math.log(shift)}
    if "shift" in config:
        return type(scheduler).from_config(config, shift=shift), {}
    if config.get("use_flow_sigmas"):
        return type(scheduler).from_config(config, flow_shift=shift), {}
    raise ModelError(
        f"teacher.shift={shift:g} has no effect on {type(scheduler).__name__} of {base}, which is not a "
        "scheduler of flow matching; set teacher.shift=null."
    )


def set_for_sampling(
    scheduler: Any, steps: int, process: NoiseProcess, *, base: str, shift: float | None,
    options: Callable[[Any], dict[str, Any]],
) -> Any:  # fmt: skip
    """Return a copy of a base's scheduler with its timesteps set; ModelError for one that cannot be used.

    `options(scheduler)` is what the family's pipeline passes to `set_timesteps` besides the number of steps;
    `shift` takes the place of the scheduler's own.
    """
    scheduler = copy.deepcopy(scheduler)
    if flow := isinstance(process, FlowMatching):
        scheduler = for_flow_matching(scheduler, options(scheduler), base=base)
    chosen = options(scheduler)
    if shift is not None:
        scheduler, own = shifted(scheduler, shift, base=base)
        chosen |= own
    scheduler.set_timesteps(steps, **chosen)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    usual = "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler or DDIMScheduler"
    if "generator" in inspect.signature(scheduler.step).parameters and is_stochastic(scheduler):
        raise ModelError(
            f"The scheduler {type(scheduler).__name__} of {base} draws noise of its own, so samples "
            f"could not be made again; put a deterministic one, such as {usual}, into the base's "
            "scheduler folder."
        )
    return scheduler

"""The shift of a flow-matching schedule: what a recipe asks for in place of a scheduler's own."""

from __future__ import annotations

import math
from typing import Any

from scalewise.method.adapter import ModelError


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

"""Schedulers (diffusers) that a base brings along for its teacher's sampling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch


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
    """The shift mu of a flow-matching schedule that depends on the number of image tokens: a line through
    (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)

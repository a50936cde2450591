"""Offloading for models larger than a GPU: weights are in main memory and move to the GPU when they are
used.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from accelerate import cpu_offload_with_hook  # type: ignore[import-untyped]
from diffusers.hooks import apply_group_offloading
from torch import nn

from scalewise.models.pipeline_adapter import PipelineAdapter

Offload = Literal["none", "components", "blocks"]


def offload(model: PipelineAdapter, how: Offload, device: torch.device, *, denoiser_stays: bool) -> bool:
    """Offload the weights of a loaded model to main memory; return whether they are offloaded.

    "components": text encoders, denoiser and VAE are on the device one at a time, as in diffusers'
    `enable_model_cpu_offload`. "blocks": one block of the denoiser and one layer of a text encoder at a time,
    as in `enable_group_offload`; the VAE, which is small, stays on the device. Both encode and decode samples
    one by one. `denoiser_stays`: keep the denoiser on the device (quantized weights are not offloaded).
    Without an accelerator this only warns.
    """
    if how == "none":
        return False
    if device.type == "cpu":
        warnings.warn(
            f"model.offload={how} has no effect without an accelerator, because the weights are in main "
            "memory anyway. Set it to none.",
            stacklevel=3,
        )
        return False
    install_hooks(model, how, device, denoiser_stays=denoiser_stays)
    return True


def install_hooks(
    model: PipelineAdapter, how: Offload, device: torch.device, *, denoiser_stays: bool
) -> None:
    """Install the offloading hooks on every loaded part."""
    pipeline: Any = model.pipeline
    texts = [name for name in model.text_names if name.startswith("text_encoder")]
    parts = {name: getattr(pipeline, name, None) for name in (*texts, model.denoiser_name, "vae")}
    moving = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if denoiser_stays and model.denoiser_name in moving:
        moving.pop(model.denoiser_name).to(device)
    if how == "components":
        _offload_in_turn(list(moving.values()), device)
    else:
        for name, part in moving.items():
            if name == "vae":
                part.to(device)
                continue
            level = "block_level" if name == model.denoiser_name else "leaf_level"
            apply_group_offloading(
                part, onload_device=device, offload_type=level, num_blocks_per_group=1,
                offload_device=torch.device("cpu"),
            )  # fmt: skip
    if parts["vae"] is not None:
        parts["vae"].enable_slicing()
    model.execution_device = device


def _offload_in_turn(parts: list[nn.Module], device: torch.device) -> None:
    """Make each part offload the previous one before it runs, and the first part the last one."""
    hooks, before = list[Any](), None
    for part in parts:
        _, before = cpu_offload_with_hook(part, device, prev_module_hook=before)
        hooks.append(before)
    if len(hooks) > 1:
        hooks[0].hook.prev_module_hook = hooks[-1]

"""Models larger than a GPU: weights rest in main memory and come over as they run, as diffusers has it."""

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
    """Let a loaded model's weights rest in main memory; tells whether they do.

    "components": text encoders, denoiser and VAE take turns on the device (`enable_model_cpu_offload`).
    "blocks": one block of the denoiser and one layer of a text encoder at a time (`enable_group_offload`);
    the VAE, which is small, stays there. Both decode and encode sample by sample. `denoiser_stays` is for one
    in fewer bits. Warns, and changes nothing, where there is no accelerator.
    """
    if how == "none":
        return False
    if device.type == "cpu":
        warnings.warn(
            f"model.offload={how} has no effect on a machine without an accelerator: the weights are in main "
            "memory anyway.",
            stacklevel=3,
        )
        return False
    attach(model, how, device, denoiser_stays=denoiser_stays)
    return True


def attach(model: PipelineAdapter, how: Offload, device: torch.device, *, denoiser_stays: bool) -> None:
    """Put the hooks onto every part that is loaded."""
    pipeline: Any = model.pipeline
    texts = [name for name in model.text_names if name.startswith("text_encoder")]
    parts = {name: getattr(pipeline, name, None) for name in (*texts, model.denoiser_name, "vae")}
    moving = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if denoiser_stays and model.denoiser_name in moving:
        moving.pop(model.denoiser_name).to(device)
    if how == "components":
        _take_turns(list(moving.values()), device)
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
    model.runs_on = device


def _take_turns(parts: list[nn.Module], device: torch.device) -> None:
    """Each part sends the one before it home; the first sends the last, for the next batch."""
    hooks, before = list[Any](), None
    for part in parts:
        _, before = cpu_offload_with_hook(part, device, prev_module_hook=before)
        hooks.append(before)
    if len(hooks) > 1:
        hooks[0].hook.prev_module_hook = hooks[-1]

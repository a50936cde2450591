"""What diffusers' own pipelines make of given noise, for every family: the truth for the adapters."""

from __future__ import annotations

from typing import Any

import torch

from scalewise.method.scales import Scale
from scalewise.models import PipelineAdapter
from scalewise.models.flux import pack, unpack


def ask_diffusers(
    model: PipelineAdapter, prompts: list[str], noise: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Latents in our layout, or pictures with `output_type`, that the pipeline draws from `noise`."""
    height, width = (model.vae_factor * size for size in noise.shape[-2:])
    options = {"output_type": "latent", "height": height, "width": width} | options
    pipeline: Any = model.pipeline  # type: ignore[attr-defined]
    if model.family == "flux":
        longest = model.max_sequence_length  # type: ignore[attr-defined]
        found = pipeline(prompts, latents=pack(noise), max_sequence_length=longest, **options).images
        return unpack(found, *noise.shape[-2:]) if options["output_type"] == "latent" else found
    if model.family == "sdxl":
        size = model.size_condition(Scale(1, *noise.shape[-2:]))  # type: ignore[attr-defined]
        return pipeline(prompts, latents=noise, original_size=size, target_size=size, **options).images
    options["negative_prompt"] = [""] * len(prompts)
    options["max_sequence_length"] = model.max_sequence_length  # type: ignore[attr-defined]
    if model.family == "wan":
        frames = (noise.shape[2] - 1) * model.frame_factor + 1
        return pipeline(prompts, latents=noise, num_frames=frames, **options).frames
    return pipeline(prompts, latents=noise, **options).images

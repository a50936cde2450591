"""What drawing holds: peak memory of `generate`, `sample` and `evaluate`, counted without weights.

Text encoders, denoiser and VAE run on the meta device as the commands run them; the bytes alive at once are
added up (counting.py). A scorer's own model, kernels' workspaces and the allocator's slack are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalewise.config.recipe import ModelRecipe, Recipe
from scalewise.data.synthetic import encode_all_scales
from scalewise.method.adapter import Condition
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.models.quantization import BYTES, layers
from scalewise.planning.flops import bytes_of, measure

Command = Literal["generate", "sample", "evaluate"]
BATCHES: dict[Command, int] = {"generate": 16, "sample": 8, "evaluate": 16}
"""Samples that a command draws at once unless told otherwise."""
Stage = Literal["text", "denoiser", "vae"]
Run = Literal["text", "guided", "student", "vae"]
"""What runs: text encoders, the teacher's forward, a student's, and the VAE as `generate` runs it: decode,
downscale, encode at every scale. Decoding at full scale holds most of it, and is what the others do."""
RUNS: dict[Command, dict[Stage, Run]] = {
    "generate": {"text": "text", "denoiser": "guided", "vae": "vae"},
    "sample": {"text": "text", "denoiser": "student", "vae": "vae"},
    "evaluate": {"text": "text", "denoiser": "guided", "vae": "vae"},
}


@dataclass(frozen=True)
class Network:
    """Bytes of a denoiser's weights, and what fewer bits and fewer blocks at a time save of them."""

    whole: float
    one_block: float
    """With all blocks but the largest one in main memory."""
    few: int
    """Weights that model.quantize puts into fewer bits."""
    layer: float
    """The largest of those layers, which a product brings back to the computing type."""
    each: int
    """Bytes of such a weight now."""

    def saved(self, bits: str) -> float:
        """Bytes saved by fewer bits."""
        return self.few * (self.each - BYTES[bits]) if bits != "none" else 0.0


@dataclass(frozen=True)
class Drawing:
    """Bytes held, and worked with for each sample at full scale."""

    denoiser: Network
    vae: float
    text: float
    encoder: float
    """The largest text encoder."""
    leaf: float
    """The largest single layer of the text encoders."""
    pixels: float
    """Bytes of one sample's pixels in float32."""
    working: Mapping[Run, float]
    flops: Mapping[Run, float]

    def held(self, stage: Stage, model: ModelRecipe) -> float:
        """Weights on the device during a stage."""
        bits, net = model.quantize, self.denoiser
        denoiser = net.whole - net.saved(bits)
        resting = 0.0 if bits == "none" else denoiser  # in fewer bits it stays on the device
        if model.offload == "components":
            own = {"text": self.text + resting, "denoiser": denoiser, "vae": self.vae + resting}
            return own[stage]
        if model.offload == "blocks":
            own = {
                "text": self.leaf + resting,
                "denoiser": net.one_block if bits == "none" else denoiser,
                "vae": resting,
            }
            return own[stage] + self.vae
        resting_text = self.encoder if stage == "text" else 0.0
        return denoiser + self.vae + (resting_text if model.offload_text else self.text)

    def peak(self, command: Command, batch: int, *, model: ModelRecipe) -> float:
        """Most bytes that a command holds when it draws a batch."""
        found = []
        for stage, run in RUNS[command].items():
            work = batch * self.working[run]
            if stage == "denoiser" and model.quantize != "none":
                work += self.denoiser.layer
            if stage == "vae" and model.offload != "none":
                # Offloading decodes sample by sample: of the others there are pixels, in up to three copies.
                work = self.working[run] + (batch - 1) * 3 * self.pixels
            found.append(self.held(stage, model) + work)
        return max(found)


def drawing_of(recipe: Recipe, model: PipelineAdapter, *, vae: Any, encoders: Sequence[Any]) -> Drawing:
    """Count what drawing with a skeleton takes; its denoiser has no adapters yet."""
    schedule = recipe.schedule.build()
    full, scales = schedule.full, sorted(set(schedule.scales))
    shape = full.shape(1, model.channels, video=model.video)
    model.pipeline.vae = vae
    x_t = torch.empty(shape, device="meta")
    runs: dict[Run, Any] = {
        "guided": partial(_predict_x0, model, x_t, pair=takes_two(recipe, model)),
        "student": partial(_predict_x0, model, x_t, pair=False),
        "vae": partial(encode_all_scales, model, x_t, scales),
    }
    counted = {name: measure(run, [model.denoiser, vae]) for name, run in runs.items()}
    read = [measure(partial(_encode, encoder, model), [encoder]) for encoder in encoders]
    counted["text"] = (max(size for size, _ in read), sum(flops for _, flops in read))
    model.pipeline.vae = None
    sizes = [bytes_of(encoder) for encoder in encoders]
    return Drawing(
        network_of(model), bytes_of(vae), sum(sizes), max(sizes),
        max(bytes_of(m) for encoder in encoders for m in encoder.modules() if not list(m.children())),
        4.0 * 3 * prod(model.pixel_size(full)),
        {name: float(size) for name, (size, _) in counted.items()},
        {name: flops for name, (_, flops) in counted.items()},
    )  # fmt: skip


def takes_two(recipe: Recipe, model: PipelineAdapter) -> bool:
    """Whether the teacher's guidance means two forwards, in one batch."""
    return recipe.teacher.guidance != 1 and model.embedded_guidance is None


def _predict_x0(model: PipelineAdapter, x_t: Tensor, *, pair: bool) -> Tensor:
    """As the backbone asks: conditional and unconditional go through the model as one batch."""
    cond, t = model.empty_condition(1, "meta"), torch.full((1,), 500.0, device="meta")
    if not pair:
        return model.noise.x0(model.predict(x_t, t, cond), x_t, t)
    both = Condition.cat([cond, cond])
    prediction = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    told, untold = model.noise.x0(prediction, torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
    return untold + 2.0 * (told - untold)


def network_of(model: PipelineAdapter) -> Network:
    """Sizes of a skeleton's denoiser, which has no adapters yet."""
    linear = [layer.weight for _, _, layer in layers(model)]
    lists = [c for c in model.denoiser.children() if isinstance(c, nn.ModuleList | nn.Sequential)]
    blocks = [bytes_of(block) for child in lists for block in child]
    whole, each = bytes_of(model.denoiser), linear[0].element_size()
    layer = max(weight.numel() for weight in linear) * each
    one = whole - sum(blocks) + max(blocks, default=0)
    return Network(whole, one, sum(weight.numel() for weight in linear), layer, each)


def _encode(encoder: Any, model: PipelineAdapter) -> Any:
    """One prompt through a text encoder, as long as the family reads."""
    clip = type(encoder).__name__.startswith("CLIP")
    length = encoder.config.max_position_embeddings if clip else model.max_sequence_length
    ids = torch.ones(1, length, dtype=torch.long, device="meta")
    return encoder(ids, output_hidden_states=clip)

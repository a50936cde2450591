"""Peak memory of `generate`, `sample` and `evaluate`, computed without weights.

Text encoders, denoiser and VAE run on the meta device in the same way as in the commands, and flops.py tracks
the bytes of live tensors. Models of metrics, kernel workspaces and memory fragmentation are not included.
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
from scalewise.data.derive import derive_batch, encode_all_scales
from scalewise.method.adapter import Condition
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.models.quantization import BYTES_PER_WEIGHT, linear_layers
from scalewise.planning.flops import bytes_of, measure

Command = Literal["generate", "sample", "evaluate"]
BATCH_SIZES: dict[Command, int] = {"generate": 16, "sample": 8, "evaluate": 16}
"""Default batch sizes of the sampling commands."""
Stage = Literal["text", "denoiser", "vae"]
Workload = Literal["text", "teacher", "student", "vae"]
"""Text encoding, a forward pass of the teacher or of a student, and the VAE that derives the smaller scales
of a sample: it decodes, downscales and encodes at every scale. Its peak is decoding at full scale, which
`sample` and `evaluate` do too."""
WORKLOADS: dict[Command, dict[Stage, Workload]] = {
    "generate": {"text": "text", "denoiser": "teacher"},
    "sample": {"text": "text", "denoiser": "student", "vae": "vae"},
    "evaluate": {"text": "text", "denoiser": "teacher", "vae": "vae"},
}


@dataclass(frozen=True)
class DenoiserSize:
    """Bytes of the weights of a denoiser, with and without quantization and offloading."""

    total: float
    one_block: float
    """Bytes on the device if only the largest block is there and the others are in main memory."""
    quantizable: int
    """Number of weights that model.quantize quantizes."""
    largest_layer: float
    """Bytes of the largest of these layers, which is dequantized for the matrix product."""
    bytes_per_weight: int
    """Bytes of one of these weights without quantization."""

    def quantization_saving(self, bits: str) -> float:
        """Return the bytes saved by quantization."""
        return self.quantizable * (self.bytes_per_weight - BYTES_PER_WEIGHT[bits]) if bits != "none" else 0.0


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of weights, and of activations per sample at full scale."""

    denoiser: DenoiserSize
    vae: float
    text: float
    largest_encoder: float
    """Bytes of the largest text encoder."""
    largest_text_layer: float
    """Bytes of the largest layer of the text encoders."""
    pixels: float
    """Bytes of one sample's pixels in float32."""
    working: Mapping[Workload, float]
    """Peak bytes of activations per sample."""
    flops: Mapping[Workload, float]
    """FLOPs per sample."""

    @property
    def derivation_peak(self) -> float:
        """Peak bytes of deriving smaller scales, with nothing but the VAE on the device."""
        return self.vae + derive_batch(round(self.pixels / 12)) * self.working["vae"]

    def weights_on_device(self, stage: Stage, model: ModelRecipe) -> float:
        """Return the bytes of weights on the device during a stage."""
        bits, net = model.quantize, self.denoiser
        denoiser = net.total - net.quantization_saving(bits)
        always = 0.0 if bits == "none" else denoiser  # a quantized denoiser is not offloaded
        if model.offload == "components":
            return {"text": self.text + always, "denoiser": denoiser, "vae": self.vae + always}[stage]
        if model.offload == "blocks":
            by_stage = {
                "text": self.largest_text_layer + always,
                "denoiser": net.one_block if bits == "none" else denoiser,
                "vae": always,
            }
            return by_stage[stage] + self.vae
        offloaded_text = self.largest_encoder if stage == "text" else 0.0
        return denoiser + self.vae + (offloaded_text if model.offload_text else self.text)

    def peak(self, command: Command, batch: int, *, model: ModelRecipe) -> float:
        """Return the peak bytes of a command for a batch size."""
        found = []
        for stage, workload in WORKLOADS[command].items():
            work = batch * self.working[workload]
            if stage == "denoiser" and model.quantize != "none":
                work += self.denoiser.largest_layer
            if stage == "vae" and model.offload != "none":
                # With offloading, samples are decoded one by one; up to three copies of the pixels of the
                # others
                # exist.
                work = self.working[workload] + (batch - 1) * 3 * self.pixels
            found.append(self.weights_on_device(stage, model) + work)
        return max(found)


def measure_sampling_memory(
    recipe: Recipe, model: PipelineAdapter, *, vae: Any, encoders: Sequence[Any]
) -> SamplingMemory:
    """Measure memory and FLOPs of sampling with a model on the meta device, before adapters are added."""
    schedule = recipe.schedule.build()
    full, scales = schedule.full, sorted(set(schedule.scales))
    shape = full.shape(1, model.channels, video=model.video)
    model.pipeline.vae = vae
    x_t = torch.empty(shape, device="meta")
    runs: dict[Workload, Any] = {
        "teacher": partial(_predict_x0, model, x_t, guided=needs_two_passes(recipe, model)),
        "student": partial(_predict_x0, model, x_t, guided=False),
        "vae": partial(encode_all_scales, model, x_t, scales),
    }
    counted = {name: measure(run, [model.denoiser, vae]) for name, run in runs.items()}
    encoded = [measure(partial(_encode, encoder, model), [encoder]) for encoder in encoders]
    counted["text"] = (max(size for size, _ in encoded), sum(flops for _, flops in encoded))
    model.pipeline.vae = None
    sizes = [bytes_of(encoder) for encoder in encoders]
    return SamplingMemory(
        measure_denoiser(model), bytes_of(vae), sum(sizes), max(sizes),
        max(bytes_of(m) for encoder in encoders for m in encoder.modules() if not list(m.children())),
        4.0 * 3 * prod(model.pixel_size(full)),
        {name: float(size) for name, (size, _) in counted.items()},
        {name: flops for name, (_, flops) in counted.items()},
    )  # fmt: skip


def needs_two_passes(recipe: Recipe, model: PipelineAdapter) -> bool:
    """Return whether guidance of the teacher needs a conditional and an unconditional forward pass."""
    return recipe.teacher.guidance != 1 and model.embedded_guidance is None


def _predict_x0(model: PipelineAdapter, x_t: Tensor, *, guided: bool) -> Tensor:
    """Predict x0 as `Backbone.predict_x0` does: guidance runs both conditions in one batch."""
    cond, t = model.empty_condition(1, "meta"), torch.full((1,), 500.0, device="meta")
    if not guided:
        return model.noise.x0(model.predict(x_t, t, cond), x_t, t)
    both = Condition.cat([cond, cond])
    prediction = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    x0_cond, x0_uncond = model.noise.x0(prediction, torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
    return x0_uncond + 2.0 * (x0_cond - x0_uncond)


def measure_denoiser(model: PipelineAdapter) -> DenoiserSize:
    """Compute the sizes of the denoiser of a model on the meta device, before adapters are added."""
    linear = [layer.weight for _, _, layer in linear_layers(model)]
    lists = [c for c in model.denoiser.children() if isinstance(c, nn.ModuleList | nn.Sequential)]
    blocks = [bytes_of(block) for child in lists for block in child]
    total, bytes_per_weight = bytes_of(model.denoiser), linear[0].element_size()
    return DenoiserSize(
        total,
        one_block=total - sum(blocks) + max(blocks, default=0),
        quantizable=sum(weight.numel() for weight in linear),
        largest_layer=max(weight.numel() for weight in linear) * bytes_per_weight,
        bytes_per_weight=bytes_per_weight,
    )


def _encode(encoder: Any, model: PipelineAdapter) -> Any:
    """Encode one prompt of the maximum length of the model family."""
    clip = type(encoder).__name__.startswith("CLIP")
    length = encoder.config.max_position_embeddings if clip else model.max_sequence_length
    ids = torch.ones(1, length, dtype=torch.long, device="meta")
    return encoder(ids, output_hidden_states=clip)

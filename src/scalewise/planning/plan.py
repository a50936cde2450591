"""Cost of a recipe, computed from the configuration of the model: FLOPs, speed-up, memory, batch size.

Operators are counted, not estimated: the forward and backward pass of the model run on the meta device, and
flops.py adds up the bytes that autograd saves for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from scalewise.common.progress import Progress, ProgressCallback, no_progress
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.method.features import tap
from scalewise.method.roles import Roles
from scalewise.method.scales import Scale
from scalewise.models import Condition
from scalewise.models.meta import build_meta_model, build_text_encoders, build_vae, count_parameters
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.planning.flops import count
from scalewise.planning.footprint import SamplingMemory, measure_sampling_memory, needs_two_passes

GB = 1e9
# Seconds per sample in the paper (A100, batch 8, half precision, compiled, tiny VAE), by base and steps:
# the teacher, full-scale students, scale-wise students.
PAPER_SECONDS: dict[str, tuple[float, dict[int, float], dict[int, float]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (4.8, {4: 0.29, 2: 0.16}, {6: 0.19, 4: 0.17}),
    "stabilityai/stable-diffusion-3.5-large": (8.3, {4: 0.63, 2: 0.33}, {6: 0.41, 4: 0.32}),
    "black-forest-labs/FLUX.1-dev": (10.0, {4: 1.41, 2: 0.72}, {6: 0.97, 4: 0.72}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (137.0, {4: 5.51, 2: 2.97}, {6: 2.61, 4: 1.84}),
}
RESERVED = 0.08  # fraction of device memory for fragmentation and kernel workspaces
# The recipes with the schedules of PAPER_SECONDS.
PAPER_RECIPES = ("sd35-medium", "sd35-medium-4", "sd35-large", "flux-dev", "wan21-1.3b")


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one sample through the denoiser at a scale, with or without an adapter."""

    forward: float
    """Forward pass of the whole network."""
    features: float
    """Forward pass up to the tapped block."""
    gradient: float
    """Forward pass up to the tapped block and backward pass to the latent, as in a loss on features."""


@dataclass(frozen=True)
class ForwardCost:
    """Cost of one sample at a scale."""

    scale: Scale
    tokens: int
    base: PassFlops
    adapted: PassFlops
    train_flops: float
    """Forward and backward pass of the whole network, with gradients of the adapter weights."""
    feature_train_flops: float
    """The same up to the tapped block."""
    activations: float
    """Bytes that autograd saves in an update of the student."""
    checkpointed: float
    """The same with gradient checkpointing."""

    @property
    def flops(self) -> float:
        """FLOPs of a forward pass of the base, and of a student, which is fused into it for sampling."""
        return self.base.forward


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during training."""

    base: float
    adapters: float
    optimizer: float
    activations: float
    """Of one sample at the largest scale."""
    checkpointed: float
    """The same with gradient checkpointing."""
    excluded: dict[str, float] = field(default_factory=dict)
    """Parts that are only in memory while prompts and images are encoded."""

    @property
    def fixed(self) -> float:
        """Bytes of everything except activations."""
        return self.base + self.adapters + self.optimizer

    def total(self, batch: int, *, checkpointing: bool) -> float:
        """Return the bytes for a batch size."""
        return self.fixed + batch * (self.checkpointed if checkpointing else self.activations)

    def batch_that_fits(self, device_bytes: float, *, checkpointing: bool) -> int:
        """Return the largest batch size that fits the device, or 0 if none does."""
        free = device_bytes * (1 - RESERVED) - self.fixed
        return max(0, int(free // (self.checkpointed if checkpointing else self.activations)))


@dataclass(frozen=True)
class Plan:
    """Cost of a recipe."""

    recipe: Recipe
    steps: list[ForwardCost]
    full: ForwardCost
    teacher_forwards: int
    parameters: dict[str, int]
    lora_parameters: int
    iteration: float
    """FLOPs of one training iteration with one sample per update, mean over the steps of the schedule."""
    iteration_full: float
    """The same at full scale."""
    iteration_mmd: float
    """The same with MMD only."""
    memory: Memory
    prompt_bytes: int
    """Size on disk of the embeddings of one prompt."""
    sample_bytes: int
    """Size on disk of one sample of a dataset: its latents at full scale."""
    sampling: SamplingMemory
    """Memory of `generate`, `sample` and `evaluate`."""
    derived_bytes: int
    """Size in the cache of the latents of one sample at the smaller scales."""

    @property
    def tokens(self) -> int:
        """Image tokens of a sample of the student, summed over all steps."""
        return sum(step.tokens for step in self.steps)

    @property
    def full_tokens(self) -> int:
        """The same with all steps at full scale."""
        return len(self.steps) * self.full.tokens

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole training per process."""
        train = self.recipe.train
        return self.iteration * train.batch * train.accumulate * train.iterations

    @property
    def generation_flops(self) -> float:
        """FLOPs of one sample of `generate`: text encoders and teacher."""
        return self.teacher_flops + self.sampling.flops["text"]

    @property
    def derivation_flops(self) -> float:
        """FLOPs of the VAE for the smaller scales of one sample; 0 if the schedule has none."""
        return self.sampling.flops["vae"] if self.derived_bytes else 0.0

    @property
    def student_flops(self) -> float:
        """FLOPs of a sample of the student."""
        return sum(step.flops for step in self.steps)

    @property
    def full_scale_flops(self) -> float:
        """FLOPs of a sample with the same number of steps at full scale."""
        return len(self.steps) * self.full.flops

    @property
    def teacher_flops(self) -> float:
        """FLOPs of a sample of the teacher."""
        return self.teacher_forwards * self.full.flops

    @property
    def paper_speed_up(self) -> tuple[float | None, float | None]:
        """Speed-up in the paper over the teacher, and over as many steps at full scale; None = no value."""
        teacher, full, scale_wise = PAPER_SECONDS.get(self.recipe.model.base, (0.0, {}, {}))
        number = len(self.steps)
        own = scale_wise.get(number)
        same = (self.recipe.model.base, self.recipe.schedule.build())
        published = [find_recipe(name) for name in PAPER_RECIPES]
        if own is None or same not in [(r.model.base, r.schedule.build()) for r in published]:
            return None, None
        return teacher / own, full[number] / own if number in full else None


def scales_to_count(recipe: Recipe) -> list[Scale]:
    """Return the scales that `make_plan` counts, in its order."""
    return sorted(set(recipe.schedule.build().scales))


def make_plan(recipe: Recipe, done: ProgressCallback = no_progress) -> Plan:
    """Compute the cost of a recipe; `done` is called with the number of scales counted so far."""
    base, dtype = recipe.model.folder, getattr(torch, recipe.model.dtype)
    model = build_meta_model(
        base, dtype=dtype, max_sequence_length=recipe.model.max_sequence_length,
        variant=recipe.model.variant, family=recipe.model.family,
    )  # fmt: skip
    schedule, block = recipe.schedule.build(), recipe.loss.feature_block
    model.check_schedule(schedule)
    model.block(block)
    vae, encoders = build_vae(base, dtype=dtype, vae=recipe.model.vae), build_text_encoders(base, dtype=dtype)
    sizes = {
        "denoiser": count_parameters(model.denoiser), "vae": count_parameters(vae),
        "text": sum(map(count_parameters, encoders)),
    }  # fmt: skip
    # Before adapters are added, because they contain linear layers too.
    sampling = measure_sampling_memory(recipe, model, vae=vae, encoders=encoders)
    targets = model.lora_targets if recipe.lora.targets is None else recipe.lora.targets
    roles = Roles(
        model.denoiser, ["student"], rank=recipe.lora.rank, alpha=recipe.lora.alpha, targets=targets
    )
    lora = sum(p.numel() for p in roles.parameters("student").values())
    forwards = {}
    for scale in scales_to_count(recipe):
        forwards[scale] = count_forward(model, scale, block, roles)
        done(len(forwards))
    steps, full = [forwards[scale] for scale in schedule.scales], forwards[schedule.full]
    embedded = model.embedded_guidance is not None
    # A scheduler of second order (Heun's) takes two passes for all steps but the last.
    scheduler = model.teacher_scheduler(recipe.teacher.steps, schedule.full, shift=recipe.teacher.shift)
    forwards_of_teacher = len(scheduler.timesteps) * (2 if needs_two_passes(recipe, model) else 1)
    iteration = partial(iteration_flops, embedded=embedded)
    mmd_only = recipe.override(["loss.mmd.weight=1", "loss.mmd_only=true"])
    condition = model.prompt_shapes().values()
    return Plan(
        recipe, steps, full, forwards_of_teacher, sizes, lora,
        iteration(recipe, steps), iteration(recipe, [full] * len(steps)), iteration(mmd_only, steps),
        training_memory(recipe, sampling, full, lora=lora),
        prompt_bytes=torch.finfo(dtype).bits // 8 * sum(prod(shape) for shape in condition),
        sample_bytes=2 * model.channels * schedule.full.cells,
        sampling=sampling,
        derived_bytes=2 * model.channels * sum(scale.cells for scale in forwards if scale != schedule.full),
    )  # fmt: skip


def training_memory(recipe: Recipe, sampling: SamplingMemory, full: ForwardCost, *, lora: int) -> Memory:
    """Compute the memory of training; `lora` = parameters of one role, `full` = cost at full scale."""
    trained = 2 if recipe.loss.needs_fake else 1
    return Memory(
        base=sampling.denoiser.total - sampling.denoiser.quantization_saving(recipe.model.quantize),
        adapters=trained * lora * 4.0 + (lora * 4.0 if recipe.train.ema else 0.0),
        optimizer=trained * lora * 12.0,  # gradient and two moments in float32
        activations=full.activations,
        checkpointed=full.checkpointed,
        excluded={"vae": sampling.derivation_peak, "text": sampling.text},
    )


def count_forward(model: PipelineAdapter, scale: Scale, block: int, roles: Roles) -> ForwardCost:
    """Count one sample at a scale: all passes through base and adapter in training."""
    run, features = partial(_predict, model, scale), partial(_features, model, scale, block)
    counted = partial(count, network=model.denoiser, blocks=model.repeated_blocks())

    def passes() -> PassFlops:
        with torch.no_grad():
            forward, tapped = (counted(f, backward=False).flops for f in (run, features))
        return PassFlops(forward, tapped, counted(partial(features, gradient=True), backward=True).flops)

    with roles.role("teacher"):
        base = passes()
    with roles.role("student"):
        whole, part = (counted(f, backward=True) for f in (run, features))
        trained = list(roles.parameters("student").values())
        for parameter in trained:
            parameter.requires_grad_(False)
        adapted, held = passes(), counted(partial(features, gradient=True), backward=True)
        for parameter in trained:
            parameter.requires_grad_(True)
    # While a term on the features of x0 is computed, the graph of the student is in memory too.
    return ForwardCost(
        scale, model.token_count(scale), base, adapted, whole.flops, part.flops,
        float(whole.activations + held.activations), float(whole.checkpointed + held.checkpointed),
    )  # fmt: skip


def forward_flops(model: PipelineAdapter, scale: Scale) -> float:
    """Count the FLOPs of a forward pass of one sample through the denoiser at a scale, on the meta device."""
    run = partial(_predict, model, scale)
    with torch.no_grad():
        return count(run, network=model.denoiser, blocks=model.repeated_blocks(), backward=False).flops


def flops_of(model: PipelineAdapter, scales: Iterable[Scale], progress: Progress) -> dict[Scale, float]:
    """Count `forward_flops` at each of some scales."""
    counted, needed = dict[Scale, float](), sorted(set(scales))
    with progress("counting FLOPs", len(needed)) as done:
        for scale in needed:
            counted[scale] = forward_flops(model, scale)
            done(len(counted))
    return counted


def iteration_flops(recipe: Recipe, steps: list[ForwardCost], *, embedded: bool) -> float:
    """Compute the FLOPs of one iteration (all fake updates and the student update), mean over the steps.

    `embedded`: the model takes guidance as an input, so guidance needs one forward pass. With gradient
    checkpointing, every backward pass repeats its forward pass.
    """
    loss, total, recompute = recipe.loss, 0.0, float(recipe.train.gradient_checkpointing)
    for step in steps:
        base, adapted = step.base, step.adapted
        trained = step.train_flops + recompute * adapted.forward
        student = trained
        if loss.mmd.weight:
            passes = base if loss.mmd.features == "teacher" else adapted
            student += passes.features + passes.gradient + recompute * passes.features
        if loss.gan.weight:
            student += adapted.gradient + recompute * adapted.features
        if loss.dmd.weight:
            guided = 1 if embedded or loss.dmd.guidance == 1 else 2
            student += guided * base.forward + adapted.forward
        fake = adapted.forward + trained
        if loss.needs_head:
            fake += step.feature_train_flops + recompute * adapted.features
        total += student + (loss.fake.updates * fake if loss.needs_fake else 0.0)
    return total / len(steps)


def _inputs(model: PipelineAdapter, scale: Scale, gradient: bool) -> tuple[Tensor, Tensor, Condition]:
    x_t = torch.empty(scale.shape(1, model.channels, video=model.video), device="meta")
    x_t.requires_grad_(gradient)
    return x_t, torch.full((1,), 500.0, device="meta"), model.empty_condition(1, "meta")


def _predict(model: PipelineAdapter, scale: Scale, *, gradient: bool = False) -> Tensor:
    return model.predict(*_inputs(model, scale, gradient))


def _features(model: PipelineAdapter, scale: Scale, block: int, *, gradient: bool = False) -> Tensor:
    with tap(model.block(block), model.image_tokens, stop=True) as found:
        model.predict(*_inputs(model, scale, gradient))
    return found.tokens

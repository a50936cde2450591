"""What a recipe will cost, from the model's configuration alone: operations, speed-up, memory, batch.

Operators are counted, not estimated: the model's real forward and backward run on the meta device, and what
autograd keeps for the backward pass is added up (counting.py).
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
from scalewise.models.meta import autoencoder, skeleton, text_encoders
from scalewise.models.meta import count as parameters_of
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.planning.flops import count
from scalewise.planning.footprint import Drawing, drawing_of, takes_two

GB = 1e9
# Seconds per sample in the paper (A100, batch 8, half precision, compiled, tiny VAE), by base and steps:
# the teacher, full-scale students, scale-wise students.
PAPER_SECONDS: dict[str, tuple[float, dict[int, float], dict[int, float]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (4.8, {4: 0.29, 2: 0.16}, {6: 0.19, 4: 0.17}),
    "stabilityai/stable-diffusion-3.5-large": (8.3, {4: 0.63, 2: 0.33}, {6: 0.41, 4: 0.32}),
    "black-forest-labs/FLUX.1-dev": (10.0, {4: 1.41, 2: 0.72}, {6: 0.97, 4: 0.72}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (137.0, {4: 5.51, 2: 2.97}, {6: 2.61, 4: 1.84}),
}
KEPT_FREE = 0.08  # of the device: the allocator's slack and the kernels' workspaces
# The recipes whose schedules these are, by base and steps.
PAPER_RECIPES = ("sd35-medium", "sd35-medium-4", "sd35-large", "flux-dev", "wan21-1.3b")


@dataclass(frozen=True)
class Passes:
    """Operations of one sample through the denoiser at a scale, with an adapter or without."""

    whole: float
    """Forward of the whole network."""
    features: float
    """Forward up to the tapped block."""
    gradient: float
    """Forward up to the tapped block and back to the latent: a loss of features, which trains no weight."""


@dataclass(frozen=True)
class Forward:
    """One sample at a scale, counted."""

    scale: Scale
    tokens: int
    base: Passes
    adapted: Passes
    train_flops: float
    """Forward and backward of the whole network, to an adapter's weights."""
    feature_train_flops: float
    """The same up to the tapped block."""
    activations: float
    """Bytes that autograd keeps in a student's update."""
    checkpointed: float
    """The same with gradient checkpointing."""

    @property
    def flops(self) -> float:
        """Forward of the base; a student is fused into it for sampling."""
        return self.base.whole


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while training."""

    base: float
    adapters: float
    optimizer: float
    activations: float
    """Of one sample, at the largest scale."""
    checkpointed: float
    """The same with gradient checkpointing."""
    not_held: dict[str, float] = field(default_factory=dict)
    """Parts that are in memory only while prompts and pictures are encoded."""

    @property
    def fixed(self) -> float:
        """Everything but activations."""
        return self.base + self.adapters + self.optimizer

    def total(self, batch: int, *, checkpointing: bool) -> float:
        """Bytes for a batch."""
        return self.fixed + batch * (self.checkpointed if checkpointing else self.activations)

    def batch_that_fits(self, device_bytes: float, *, checkpointing: bool) -> int:
        """Largest batch within the device, 0 if none."""
        free = device_bytes * (1 - KEPT_FREE) - self.fixed
        return max(0, int(free // (self.checkpointed if checkpointing else self.activations)))


@dataclass(frozen=True)
class Plan:
    """What a recipe costs."""

    recipe: Recipe
    steps: list[Forward]
    full: Forward
    teacher_forwards: int
    parameters: dict[str, int]
    lora_parameters: int
    iteration: float
    """Operations of one training iteration for one sample of each update, mean over the schedule's steps."""
    iteration_full: float
    """The same at full scale."""
    iteration_mmd: float
    """The same with MMD alone."""
    memory: Memory
    prompt_bytes: int
    """On disk, of one prompt's embeddings."""
    sample_bytes: int
    """On disk, of one sample's latents at every scale."""
    drawing: Drawing
    """What `generate`, `sample` and `evaluate` hold."""

    @property
    def tokens(self) -> int:
        """Image tokens of a sample by the student, over all its steps."""
        return sum(step.tokens for step in self.steps)

    @property
    def full_tokens(self) -> int:
        """The same in as many steps at full scale."""
        return len(self.steps) * self.full.tokens

    @property
    def training_flops(self) -> float:
        """Operations of the whole training by each process."""
        train = self.recipe.train
        return self.iteration * train.batch * train.accumulate * train.iterations

    @property
    def generated_flops(self) -> float:
        """Operations of one sample by `generate`: prompt, teacher, and the VAE at every scale."""
        return self.teacher + self.drawing.flops["text"] + self.drawing.flops["vae"]

    @property
    def scale_wise(self) -> float:
        """Operations of a sample by the student."""
        return sum(step.flops for step in self.steps)

    @property
    def full_scale(self) -> float:
        """Operations of a sample in as many steps at full scale."""
        return len(self.steps) * self.full.flops

    @property
    def teacher(self) -> float:
        """Operations of a sample by the teacher."""
        return self.teacher_forwards * self.full.flops

    @property
    def paper_speed_up(self) -> tuple[float | None, float | None]:
        """Measured in the paper: teacher over scale-wise, and full-scale over scale-wise of as many steps."""
        teacher, full, scale_wise = PAPER_SECONDS.get(self.recipe.model.base, (0.0, {}, {}))
        number = len(self.steps)
        own = scale_wise.get(number)
        same = (self.recipe.model.base, self.recipe.schedule.build())
        published = [find_recipe(name) for name in PAPER_RECIPES]
        if own is None or same not in [(r.model.base, r.schedule.build()) for r in published]:
            return None, None
        return teacher / own, full[number] / own if number in full else None


def scales_to_count(recipe: Recipe) -> list[Scale]:
    """What `make_plan` counts, in its order."""
    return sorted(set(recipe.schedule.build().scales))


def make_plan(recipe: Recipe, done: ProgressCallback = no_progress) -> Plan:
    """Count everything for a recipe; `done` is told how many of the scales are counted."""
    base, dtype = recipe.model.folder, getattr(torch, recipe.model.dtype)
    model = skeleton(
        base, dtype=dtype, max_sequence_length=recipe.model.max_sequence_length,
        variant=recipe.model.variant, family=recipe.model.family,
    )  # fmt: skip
    schedule, block = recipe.schedule.build(), recipe.loss.feature_block
    model.check_schedule(schedule)
    model.block(block)
    vae, encoders = autoencoder(base, dtype=dtype, vae=recipe.model.vae), text_encoders(base, dtype=dtype)
    sizes = {
        "denoiser": parameters_of(model.denoiser), "vae": parameters_of(vae),
        "text": sum(map(parameters_of, encoders)),
    }  # fmt: skip
    # Before adapters bring linear layers of their own.
    drawing = drawing_of(recipe, model, vae=vae, encoders=encoders)
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
    forwards_of_teacher = len(scheduler.timesteps) * (2 if takes_two(recipe, model) else 1)
    iteration = partial(iteration_flops, embedded=embedded)
    alone = recipe.override(["loss.mmd.weight=1", "loss.mmd_only=true"])
    condition = model.prompt_shapes().values()
    return Plan(
        recipe, steps, full, forwards_of_teacher, sizes, lora,
        iteration(recipe, steps), iteration(recipe, [full] * len(steps)), iteration(alone, steps),
        training_memory(recipe, drawing, full, lora=lora),
        prompt_bytes=torch.finfo(dtype).bits // 8 * sum(prod(shape) for shape in condition),
        sample_bytes=2 * model.channels * sum(scale.cells for scale in forwards),
        drawing=drawing,
    )  # fmt: skip


def training_memory(recipe: Recipe, drawing: Drawing, full: Forward, *, lora: int) -> Memory:
    """What a device holds in training; `lora` are a role's parameters, `full` the forward at full scale."""
    trained = 2 if recipe.loss.needs_fake else 1
    return Memory(
        base=drawing.denoiser.whole - drawing.denoiser.saved(recipe.model.quantize),
        adapters=trained * lora * 4.0 + (lora * 4.0 if recipe.train.ema else 0.0),
        optimizer=trained * lora * 12.0,  # gradient and two moments in float32
        activations=full.activations,
        checkpointed=full.checkpointed,
        not_held={"vae": drawing.vae, "text": drawing.text},
    )


def count_forward(model: PipelineAdapter, scale: Scale, block: int, roles: Roles) -> Forward:
    """Count one sample at a scale: all passes of base and adapter that training makes."""
    run, features = partial(_predict, model, scale), partial(_features, model, scale, block)
    counted = partial(count, network=model.denoiser, blocks=model.repeated_blocks())

    def passes() -> Passes:
        with torch.no_grad():
            whole, tapped = (counted(ask, backward=False).flops for ask in (run, features))
        return Passes(whole, tapped, counted(partial(features, gradient=True), backward=True).flops)

    with roles.role("teacher"):
        base = passes()
    with roles.role("student"):
        whole, part = (counted(ask, backward=True) for ask in (run, features))
        for parameter in roles.parameters("student").values():
            parameter.requires_grad_(False)  # until the role is entered anew
        adapted, held = passes(), counted(partial(features, gradient=True), backward=True)
    # The student's graph waits while a term's on the features of its x0 is there.
    return Forward(
        scale, model.token_count(scale), base, adapted, whole.flops, part.flops,
        float(whole.activations + held.activations), float(whole.checkpointed + held.checkpointed),
    )  # fmt: skip


def forward_flops(model: PipelineAdapter, scale: Scale) -> float:
    """Count the operations of one sample's forward through a skeleton's denoiser at a scale."""
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


def iteration_flops(recipe: Recipe, steps: list[Forward], *, embedded: bool) -> float:
    """Operations of one iteration: DistillStep's fake updates and its student update, mean over the steps.

    With gradient checkpointing every backward pass runs its forward once more.
    """
    loss, total, again = recipe.loss, 0.0, float(recipe.train.gradient_checkpointing)
    for step in steps:
        base, adapted = step.base, step.adapted
        trained = step.train_flops + again * adapted.whole
        student = trained
        if loss.mmd.weight:
            seen = base if loss.mmd.features == "teacher" else adapted
            student += seen.features + seen.gradient + again * seen.features
        if loss.gan.weight:
            student += adapted.gradient + again * adapted.features
        if loss.dmd.weight:
            guided = 1 if embedded or loss.dmd.guidance == 1 else 2
            student += guided * base.whole + adapted.whole
        fake = adapted.whole + trained
        if loss.needs_head:
            fake += step.feature_train_flops + again * adapted.features
        total += student + (loss.fake.updates * fake if loss.needs_fake else 0.0)
    return total / len(steps)


def _question(model: PipelineAdapter, scale: Scale, gradient: bool) -> tuple[Tensor, Tensor, Condition]:
    x_t = torch.empty(scale.shape(1, model.channels, video=model.video), device="meta")
    x_t.requires_grad_(gradient)
    return x_t, torch.full((1,), 500.0, device="meta"), model.empty_condition(1, "meta")


def _predict(model: PipelineAdapter, scale: Scale, *, gradient: bool = False) -> Tensor:
    return model.predict(*_question(model, scale, gradient))


def _features(model: PipelineAdapter, scale: Scale, block: int, *, gradient: bool = False) -> Tensor:
    with tap(model.block(block), model.image_tokens, stop=True) as found:
        model.predict(*_question(model, scale, gradient))
    return found.tokens

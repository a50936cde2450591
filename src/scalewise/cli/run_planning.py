"""Output of `scalewise plan`: steps, FLOPs, hours, memory of every command, and commands that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from scalewise.cli.inputs import check_dataset_folder
from scalewise.common import console, distributed
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.planning.fitting import PHOTOS, PROMPTS, Need, TypedRecipe, line, needs_of
from scalewise.planning.plan import GB, RESERVED, Plan, make_plan, scales_to_count
from scalewise.planning.throughput import Card, Throughput, card_named, measured, throughput_of

PROMPT_COMMANDS = ("generate", "evaluate")  # commands that read a prompt file
GENERATED = 1000  # samples for which time and disk space are printed


@dataclass(frozen=True)
class Device:
    """Target of a plan: a named GPU, or this machine."""

    card: Card | None = None
    gigabytes: float | None = None
    """Memory; None = unknown."""

    @classmethod
    def of(cls, card: str | None, gigabytes: float | None) -> Device:
        """Build from command line options; defaults to the GPU of this machine."""
        named = card_named(card) if card else None
        if gigabytes is None and named:
            gigabytes = named.gigabytes
        if gigabytes is None and (own := distributed.device()).type == "cuda":
            gigabytes = torch.cuda.get_device_properties(own).total_memory / GB
        return cls(named, gigabytes)

    def throughput(self, plan: Plan) -> Throughput:
        """Return FLOP/s of the device."""
        if self.card:
            return throughput_of(self.card)
        return measured(plan.recipe, distributed.device())


def run_plan(name: str, overrides: Sequence[str], device: Device, *, gpus: int) -> None:
    """Compute and print the cost of a recipe."""
    recipe = find_recipe(name).override(list(overrides))
    with console.progress("counting FLOPs", len(scales_to_count(recipe))) as done:
        plan = make_plan(recipe, done)
    _print_steps(plan)
    _print_operations(plan)
    _print_hours(plan, device, gpus=gpus)
    _print_memory(plan, gpus=gpus)
    _print_needs(plan, device, typed_as(name, overrides, recipe=recipe))


def _print_steps(plan: Plan) -> None:
    table = Table("step", "t", "scale", "tokens", "TFLOPs", box=None, header_style="bold")
    for i, (step, forward) in enumerate(zip(plan.recipe.schedule.build(), plan.steps, strict=True)):
        tokens, flops = f"{forward.tokens:,}", f"{forward.flops / 1e12:,.3g}"
        table.add_row(str(i + 1), f"{step.t:g}", str(step.scale), tokens, flops)
    table.add_section()
    table.add_row("total", "", "", f"{plan.tokens:,}", f"{plan.student_flops / 1e12:,.3g}")
    table.add_row("full scale", "", "", f"{plan.full_tokens:,}", f"{plan.full_scale_flops / 1e12:,.3g}")
    console.out.print(table)


def _print_operations(plan: Plan) -> None:
    say = partial(console.out.print, soft_wrap=True)
    say(f"\nTFLOPs per sample (denoiser): student {plan.student_flops / 1e12:,.3g}, same steps at full scale "
        f"{plan.full_scale_flops / 1e12:,.3g}, teacher with {plan.teacher_forwards} forward passes "
        f"{plan.teacher_flops / 1e12:,.3g}")  # fmt: skip
    paper = [f" (measured in the paper: {found:.1f}x)" if found else "" for found in plan.paper_speed_up]
    say(f"Expected speed-up: {plan.teacher_flops / plan.student_flops:.1f}x over the teacher{paper[0]}, "
        f"{plan.full_scale_flops / plan.student_flops:.2f}x over full scale{paper[1]}")  # fmt: skip
    less = f", MMD alone {plan.iteration_mmd / plan.iteration:.2f}x"
    alone = less if plan.recipe.loss.needs_fake else ""
    say(f"TFLOPs per training iteration and sample: {plan.iteration / 1e12:,.3g}; full scale "
        f"{plan.iteration_full / plan.iteration:.2f}x{alone}")  # fmt: skip
    say(f"LoRA: {plan.lora_parameters:,} parameters per role; denoiser {plan.parameters['denoiser']:,}, "
        f"VAE {plan.parameters['vae']:,}, text encoders {plan.parameters['text']:,}")  # fmt: skip
    full, smaller, prompts = (
        f"{GENERATED * size / GB:,.3g} GB"
        for size in (plan.sample_bytes, plan.derived_bytes, plan.prompt_bytes)
    )
    say(
        f"Disk space for {GENERATED:,} samples with different prompts: dataset {full} (with --store int8 "
        f"half of it); in the cache, latents of smaller scales {smaller}, prompt embeddings {prompts}"
    )


def _print_hours(plan: Plan, device: Device, *, gpus: int) -> None:
    """Print the time of training and of making its data, which several processes share."""
    speed, train = device.throughput(plan), plan.recipe.train
    generation, derivation = (
        duration(speed.seconds(GENERATED * flops / gpus))
        for flops in (plan.generation_flops, plan.derivation_flops)
    )
    console.out.print(
        f"Time: distill {duration(speed.seconds(plan.training_flops))} for {train.iterations:,} iterations; "
        f"generate {generation} for {GENERATED:,} samples, and once {derivation} for their smaller scales "
        f"({speed.source})",
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """Format with two significant digits: 42 s, 7.5 min, 3.2 h, 12 days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 * length if unit == "days" else length):
            return f"{float(f'{seconds / length:.2g}'):,g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def _print_memory(plan: Plan, *, gpus: int) -> None:
    memory, train, model = plan.memory, plan.recipe.train, plan.recipe.model
    base = model.dtype if model.quantize == "none" else f"{model.quantize}, other layers {model.dtype}"
    rows = {
        f"frozen base ({base})": memory.base,
        "adapters": memory.adapters,
        "gradients and optimizer": memory.optimizer,
        "activations per sample": memory.activations,
        "the same with gradient checkpointing": memory.checkpointed,
    }
    table = Table("memory per device in training", "GB", box=None, header_style="bold")
    for name, size in rows.items():
        table.add_row(name, f"{size / GB:,.3g}")
    for part, size in memory.excluded.items():
        table.add_row(f"{part}: only while data is prepared", f"({size / GB:,.3g})")
    console.out.print(table)
    batch = train.batch * train.accumulate * gpus
    console.out.print(f"batch {train.batch} x {gpus} processes: {batch} samples per update")


def _print_needs(plan: Plan, device: Device, typed: TypedRecipe) -> None:
    """Print the peak memory of every command, whether it fits, and otherwise a command that does."""
    room = None if device.gigabytes is None else device.gigabytes * GB
    needs = needs_of(plan, room)
    fits = f"fits in {device.gigabytes:g} GB" if device.gigabytes else ""
    table = Table("peak memory of", "batch", "GB", fits, box=None, header_style="bold")
    for need in needs:
        verdict = ("yes" if need.fits else "[red]no[/]") if room else ""
        table.add_row(need.command, str(need.batch), f"{need.peak / GB:,.3g}", verdict)
    console.out.print(table)
    say = partial(console.out.print, soft_wrap=True)
    if room is None:
        say("Use --memory GB or --card NAME to see what fits.")
        return
    for checkpointing in (False, True):
        batch = plan.memory.batch_that_fits(room, checkpointing=checkpointing)
        how = "with" if checkpointing else "without"
        say(f"largest training batch in {device.gigabytes:g} GB {how} gradient checkpointing: {batch}")
    missing = [need for need in needs if not need.fits]
    if not missing:
        say(
            f"All four commands fit, with {RESERVED:.0%} of the memory kept free (models of metrics not "
            "included)."
        )
    for need in missing:
        _print_line(need, typed)
    if not plan.recipe.model.is_mini and any(
        need.change for need in missing if need.command in PROMPT_COMMANDS
    ):
        photos = "" if typed.photos != PHOTOS else f"; {PHOTOS}: a folder of real images"
        say(f"{PROMPTS}: your prompts, one per line{photos}. For other metrics see "
            "`scalewise metrics` and --scorer.", highlight=False)  # fmt: skip


def typed_as(name: str, overrides: Sequence[str], *, recipe: Recipe) -> TypedRecipe:
    """Return the recipe as given, with the folder for its dataset or of its real images."""
    folder = recipe.data.path
    if recipe.data.is_mini:
        return TypedRecipe(name, overrides, recipe)
    try:
        check_dataset_folder(Path(folder))
    except RecipeError:  # images of the user, which must not be overwritten
        return TypedRecipe(name, overrides, recipe, photos=folder)
    return TypedRecipe(name, overrides, recipe, set_folder=folder)


def _print_line(need: Need, typed: TypedRecipe) -> None:
    say = partial(console.out.print, soft_wrap=True, highlight=False, markup=False)
    if need.change is None:
        say(f"{need.command} does not fit with any setting; it needs a device with more memory.")
        return
    say(f"{need.command} does not fit; this command does:")
    say(f"  {line(need, typed)}")

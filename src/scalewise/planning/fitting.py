"""Commands that fit into the memory of a device: changes to a recipe, least invasive first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scalewise.config.overrides import key_of, replaced
from scalewise.config.recipe import Recipe
from scalewise.planning.footprint import BATCH_SIZES, WORKLOADS, Command
from scalewise.planning.plan import RESERVED, Memory, Plan, make_plan, training_memory

Planner = Callable[[Recipe], Plan]
PROMPTS, PHOTOS = "prompts.txt", "photos"
"""Placeholders in printed commands for files of the user."""


@dataclass(frozen=True)
class Change:
    """Overrides of a recipe, and the batch size of a sampling command."""

    overrides: tuple[str, ...] = ()
    batch: int | None = None
    """None if unchanged, or for training, whose batch is an override."""


@dataclass(frozen=True)
class Need:
    """Memory of a command with default settings, and the change that makes it fit."""

    command: str
    batch: int
    peak: float
    """Bytes."""
    fits: bool
    change: Change | None
    """Empty if it fits; None if no change makes it fit."""


def needs_of(plan: Plan, device_bytes: float | None, *, planner: Planner = make_plan) -> list[Need]:
    """Return the memory needs of all commands in order of use; without a device everything fits."""
    room = float("inf") if device_bytes is None else device_bytes * (1 - RESERVED)
    train = plan.recipe.train
    found = [_sampling_need(plan, command, room) for command in WORKLOADS]
    own = plan.memory.total(train.batch, checkpointing=train.gradient_checkpointing)
    change: Change | None = Change()
    if own > room:
        overrides = training_changes(plan, room, planner=planner)
        change = None if overrides is None else Change(tuple(overrides))
    found.insert(1, Need("distill", train.batch, own, own <= room, change))
    return found


def _sampling_need(plan: Plan, command: Command, room: float) -> Need:
    batch, model = BATCH_SIZES[command], plan.recipe.model
    own = plan.sampling.peak(command, batch, model=model)
    change = Change() if own <= room else sampling_change(plan, command, room)
    return Need(command, batch, own, own <= room, change)


def sampling_change(plan: Plan, command: Command, room: float) -> Change | None:
    """Return settings with which a sampling command fits `room` bytes, with the largest possible batch.

    In order of cost: a smaller batch, offloading of components, offloading of blocks, and quantization, which
    changes the images.
    """
    model = plan.recipe.model
    steps: list[dict[str, Any]] = [{}]
    if model.offload == "none":
        steps.append({"offload": "components"})
    if model.offload != "blocks":
        steps.append({"offload": "blocks"})
    if model.quantize == "none":
        steps += [{"quantize": bits, "offload": "components"} for bits in ("int8", "nf4")]
    for change in steps:
        changed = model.model_copy(update=change)
        for batch in range(BATCH_SIZES[command], 0, -1):
            if plan.sampling.peak(command, batch, model=changed) <= room:
                own = batch if batch != BATCH_SIZES[command] else None
                return Change(tuple(f"model.{key}={value}" for key, value in change.items()), own)
    return None


def training_changes(plan: Plan, room: float, *, planner: Planner = make_plan) -> list[str] | None:
    """Return overrides with which training fits `room` bytes; None if there are none.

    Samples per update stay the same: accumulation compensates for a smaller batch.
    """
    for changes, memory in _ladder(plan, planner):
        recipe = plan.recipe.override(changes)
        for batch in _divisors(recipe.train.batch):
            if memory.total(batch, checkpointing=recipe.train.gradient_checkpointing) <= room:
                pieces = recipe.train.batch // batch
                split = [f"train.batch={batch}", f"train.accumulate={recipe.train.accumulate * pieces}"]
                return [*changes, *(split if pieces > 1 else [])]
    return None


def _ladder(plan: Plan, planner: Planner) -> Iterator[tuple[list[str], Memory]]:
    """Yield increasing sets of overrides with the memory needed."""
    recipe, changes = plan.recipe, list[str]()

    def step(*overrides: str) -> tuple[list[str], Memory]:
        nonlocal recipe
        changes.extend(overrides)
        recipe = recipe.override(list(overrides))
        lora = plan.lora_parameters * recipe.lora.rank // plan.recipe.lora.rank
        return list(changes), training_memory(recipe, plan.sampling, plan.full, lora=lora)

    if not recipe.train.gradient_checkpointing:
        yield step("train.gradient_checkpointing=true")
    else:
        yield step()
    if recipe.model.dtype == "float32":
        # Activations change, so they are counted again.
        plan = planner(recipe.override(["model.dtype=bfloat16"]))
        yield step("model.dtype=bfloat16")
    if recipe.model.quantize == "none":
        yield step("model.quantize=int8")
        changes.remove("model.quantize=int8")
        yield step("model.quantize=nf4")
    if recipe.loss.needs_fake:
        yield step("loss.mmd_only=true")
    while recipe.lora.rank > 16:
        changes[:] = [change for change in changes if not change.startswith("lora.rank=")]
        yield step(f"lora.rank={recipe.lora.rank // 2}")


def _divisors(number: int) -> list[int]:
    """Return the divisors in decreasing order."""
    return [n for n in range(number, 0, -1) if number % n == 0]


@dataclass(frozen=True)
class TypedRecipe:
    """A recipe as given on the command line."""

    name: str
    """Name or file of the recipe."""
    overrides: Sequence[str]
    recipe: Recipe
    """The recipe with its overrides."""
    set_folder: str | None = None
    """Output folder of `generate`; None for the embedded dataset."""
    photos: str = PHOTOS
    """Folder of real images for metrics."""


def line(need: Need, typed: TypedRecipe) -> str:
    """Return a command that fits, ready to paste, with the given overrides and those of the change.

    Each command gets the overrides that it accepts: `sample` those of `model`, `evaluate` all but the name of
    the recipe. Bases other than the mini have neither captions nor a scorer, so the command contains a prompt
    file (`PROMPTS`) and a metric without weights, which needs real images.
    """
    assert need.change is not None
    recipe = typed.recipe
    overrides = replaced(typed.overrides, need.change.overrides)
    batch = ["--batch", str(need.change.batch)] if need.change.batch else []
    foreign = not recipe.model.is_mini
    prompts = ["--prompts", PROMPTS] if foreign else []
    scorer = ["--metric", "spectrum", "--reference", typed.photos] if foreign else []
    out = ["--out", typed.set_folder] if typed.set_folder else []
    run = f"runs/{recipe.name}"
    of_model = [text for text in overrides if key_of(text).startswith("model.")]
    grouped = [text for text in overrides if "." in key_of(text)]
    words = {
        "generate": ["generate", typed.name, *overrides, *batch, *prompts, *out],
        "distill": ["distill", typed.name, *overrides],
        "sample": ["sample", "a cat", *of_model, "--student", run, *batch],
        "evaluate": [
            "evaluate", typed.name, "teacher", f"student:{run}", *grouped, *batch, *prompts, *scorer
        ],
    }  # fmt: skip
    return shlex.join(["scalewise", *words[need.command]])

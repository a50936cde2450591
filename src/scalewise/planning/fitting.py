"""Commands that fit into a device: what to change, gentlest first, when a recipe as it stands does not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scalewise.config.overrides import key_of, replaced
from scalewise.config.recipe import Recipe
from scalewise.planning.footprint import BATCHES, RUNS, Command
from scalewise.planning.plan import KEPT_FREE, Memory, Plan, make_plan, training_memory

Planner = Callable[[Recipe], Plan]
PROMPTS, PHOTOS = "prompts.txt", "photos"
"""What a printed command names where the user has to bring something."""


@dataclass(frozen=True)
class Change:
    """Overrides of a recipe, and the batch of a command that draws."""

    overrides: tuple[str, ...] = ()
    batch: int | None = None
    """None where training's own batch is among the overrides, or stays."""


@dataclass(frozen=True)
class Need:
    """A command with its standard settings, and what makes it fit."""

    command: str
    batch: int
    peak: float
    """Bytes."""
    fits: bool
    change: Change | None
    """Nothing to change where it fits; None where no setting here makes it fit."""


def needs_of(plan: Plan, device_bytes: float | None, *, planner: Planner = make_plan) -> list[Need]:
    """What the workflow's commands hold, in its order; without a device all are taken to fit."""
    room = float("inf") if device_bytes is None else device_bytes * (1 - KEPT_FREE)
    train = plan.recipe.train
    found = [_drawing(plan, command, room) for command in RUNS]
    own = plan.memory.total(train.batch, checkpointing=train.gradient_checkpointing)
    change: Change | None = Change()
    if own > room:
        overrides = training_changes(plan, room, planner=planner)
        change = None if overrides is None else Change(tuple(overrides))
    found.insert(1, Need("distill", train.batch, own, own <= room, change))
    return found


def _drawing(plan: Plan, command: Command, room: float) -> Need:
    batch, model = BATCHES[command], plan.recipe.model
    own = plan.drawing.peak(command, batch, model=model)
    change = Change() if own <= room else drawing_change(plan, command, room)
    return Need(command, batch, own, own <= room, change)


def drawing_change(plan: Plan, command: Command, room: float) -> Change | None:
    """Settings with which a drawing command stays within `room` bytes, with the largest batch that does.

    A smaller batch costs least, then whole components in main memory, then single blocks; fewer bits change
    what is drawn and come last.
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
        for batch in range(BATCHES[command], 0, -1):
            if plan.drawing.peak(command, batch, model=changed) <= room:
                own = batch if batch != BATCHES[command] else None
                return Change(tuple(f"model.{key}={value}" for key, value in change.items()), own)
    return None


def training_changes(plan: Plan, room: float, *, planner: Planner = make_plan) -> list[str] | None:
    """Overrides with which training stays within `room` bytes; None where nothing here is enough.

    Samples per update stay as they are: a smaller batch is made up for by accumulation.
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
    """Overrides, each step with those before it, and the memory that they leave."""
    recipe, changes = plan.recipe, list[str]()

    def step(*overrides: str) -> tuple[list[str], Memory]:
        nonlocal recipe
        changes.extend(overrides)
        recipe = recipe.override(list(overrides))
        lora = plan.lora_parameters * recipe.lora.rank // plan.recipe.lora.rank
        return list(changes), training_memory(recipe, plan.drawing, plan.full, lora=lora)

    if not recipe.train.gradient_checkpointing:
        yield step("train.gradient_checkpointing=true")
    else:
        yield step()
    if recipe.model.dtype == "float32":
        # Every activation is another one then: counted again.
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
    """Largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


@dataclass(frozen=True)
class Typed:
    """A recipe as it was typed, and what it comes to."""

    name: str
    """Of a recipe or of its file."""
    overrides: Sequence[str]
    recipe: Recipe
    """With the overrides."""
    set_folder: str | None = None
    """Where `generate` writes the set that the recipe reads; None for the embedded one."""
    photos: str = PHOTOS
    """A folder of real images, for metrics."""


def line(need: Need, typed: Typed) -> str:
    """The command that fits, ready to be pasted, with the overrides typed, which its own replace.

    Each command gets those that it takes: `sample` a model's alone, `evaluate` none of the recipe's name. A
    base other than the mini brings neither captions nor a judge along: a file of prompts is named
    (`PROMPTS`), and a metric without weights, which needs real images.
    """
    assert need.change is not None
    recipe = typed.recipe
    overrides = replaced(typed.overrides, need.change.overrides)
    batch = ["--batch", str(need.change.batch)] if need.change.batch else []
    foreign = recipe.model.base != "mini"
    prompts = ["--prompts", PROMPTS] if foreign else []
    judge = ["--metric", "spectrum", "--reference", typed.photos] if foreign else []
    out = ["--out", typed.set_folder] if typed.set_folder else []
    run = f"runs/{recipe.name}"
    of_model = [text for text in overrides if key_of(text).startswith("model.")]
    grouped = [text for text in overrides if "." in key_of(text)]
    words = {
        "generate": ["generate", typed.name, *overrides, *batch, *prompts, *out],
        "distill": ["distill", typed.name, *overrides],
        "sample": ["sample", "a cat", *of_model, "--student", run, *batch],
        "evaluate": [
            "evaluate", typed.name, "teacher", f"student:{run}", *grouped, *batch, *prompts, *judge
        ],
    }  # fmt: skip
    return shlex.join(["scalewise", *words[need.command]])

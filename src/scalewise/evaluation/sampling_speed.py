"""Sampling speed: contenders timed in turns, part by part, beside what counted operations let one expect."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from scalewise.common import distributed, markdown
from scalewise.common.progress import Progress
from scalewise.common.results import write_json, write_text
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.evaluation.evaluate import subject
from scalewise.evaluation.samplers import Contender, check_fit, parse_contenders, passes_of
from scalewise.evaluation.timing import (
    Laps,
    Timing,
    device_clock,
    format_ms,
    format_ratio,
    laps_of,
    rounds_told,
    summarize,
    timings_table,
)
from scalewise.method.backbone import settle
from scalewise.method.scales import Scale
from scalewise.metrics.intervals import Interval, median_interval
from scalewise.models.lora import versions
from scalewise.models.meta import skeleton
from scalewise.planning.plan import flops_of
from scalewise.training import setup

DEFAULT = ("teacher", "full-scale=undistilled:full", "scale-wise=undistilled")
"""A student's operations are those of the undistilled model on its schedule: it is fused into it."""
Name = Literal["honest", "paper"]


@dataclass(frozen=True)
class Protocol:
    """How sampling is timed."""

    name: Name
    batches: tuple[int, ...]
    rounds: int
    compiled: bool
    half: bool
    """float16 on a GPU, bfloat16 on a CPU, whatever the recipe's type is."""


PROTOCOLS = {
    "honest": Protocol("honest", (1, 8), 7, compiled=False, half=False),
    # Appendix G: half precision, torch.compile, tiny autoencoders, batch 8, the mean of 100 runs.
    "paper": Protocol("paper", (8,), 100, compiled=True, half=True),
}


def chosen_protocol(
    name: str, *, batches: Sequence[int] | None, rounds: int | None, compiled: bool | None
) -> Protocol:
    """A protocol by name, with what is given changed."""
    if name not in PROTOCOLS:
        raise RecipeError(f"There is no protocol {name!r}; choose {' or '.join(PROTOCOLS)}.")
    if wrong := [b for b in batches or () if b < 1]:
        raise RecipeError(f"A batch of {wrong[0]} draws nothing; give at least 1.")
    known = PROTOCOLS[name]
    return replace(
        known, batches=tuple(batches or known.batches), rounds=rounds or known.rounds,
        compiled=known.compiled if compiled is None else compiled,
    )  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """How much faster one denoiser is than another at a batch size, and how many fewer operations it has."""

    name: str
    over: str
    batch: int
    measured: Interval
    """Ratio of the denoisers' times, taken within rounds."""
    expected: float
    """Ratio of their operations."""

    @property
    def reached(self) -> Interval:
        """Part of the expected gain that is there in time."""
        return self.measured / self.expected

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the part reached, as stored in JSON."""
        return {**vars(self), "reached": self.reached}


@dataclass(frozen=True)
class Speed:
    """Everything measured, and on what."""

    protocol: Protocol
    setting: dict[str, Any]
    timings: list[Timing]
    gains: list[Gain]

    @property
    def told(self) -> str:
        """On what and how it was measured, in a sentence or two."""
        setting = self.setting
        how = "compiled" if setting["compiled"] else "not compiled"
        return (
            f"{setting['device']}, {setting['dtype']} computed in {setting['precision']}, {how}, VAE: "
            f"{setting['vae']}. {rounds_told(self.protocol.rounds)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, the protocol by name, as stored in JSON."""
        return {**vars(self), "protocol": self.protocol.name}

    def save(self, folder: Path) -> None:
        """Write bench.json and bench.md."""
        write_json(folder / "bench.json", self)
        tables = [timings_table(self.timings), steps_table(self.timings), gains_table(self.gains), self.told]
        write_text(folder / "bench.md", "\n\n".join(tables) + "\n")


def measure_speed(
    recipe: Recipe, contenders: Sequence[str], protocol: Protocol, *, caption: str, progress: Progress
) -> Speed:
    """Time the contenders drawing a caption; the first is what the others are compared with."""
    parsed = parse_contenders(contenders or DEFAULT, recipe)
    if folder := next((c.name for c in parsed if c.kind == "folder"), None):
        raise RecipeError(f"{folder} is a folder of pictures: there is nothing to time in it; leave it out.")
    flops = expected_flops(recipe, parsed, progress)
    device = distributed.device()
    if protocol.half:
        dtype = "float16" if device.type == "cuda" else "bfloat16"
        recipe = recipe.override([f"model.dtype={dtype}", "train.precision=float32"])
    model = setup.load(recipe, ("denoiser", "vae", "text"))
    check_fit(model, parsed)
    if protocol.compiled:
        model.compile_blocks(dynamic=False)
    subjects = [subject(model, c, caption, precision=recipe.train.precision, each_step=True) for c in parsed]
    with progress("timing", len(protocol.batches) * (protocol.rounds + 1)) as done, torch.no_grad():
        found = laps_of(
            subjects, protocol.batches, rounds=protocol.rounds, clock=device_clock(str(device)), done=done
        )
    timings, gains = list[Timing](), list[Gain]()
    for batch, laps in found.items():
        timings += summarize(laps, batch, baseline=parsed[0].name)
        gains += [gain(laps, flops, a, b, batch) for b, a in promising(parsed, flops)]
    setting = setting_of(recipe, device, rounds=protocol.rounds) | {
        "compiled": protocol.compiled, "vae": recipe.model.vae or "the base's own",
    }  # fmt: skip
    return Speed(protocol, setting, timings, gains)


def promising(contenders: Sequence[Contender], flops: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs (more operations, fewer) of contenders' names: where there is a gain to reach."""
    pairs = itertools.combinations([c.name for c in contenders], 2)
    ordered = [(a, b) if flops[a] > flops[b] else (b, a) for a, b in pairs]
    return [(more, fewer) for more, fewer in ordered if flops[more] > flops[fewer]]


def gain(laps: Laps, flops: Mapping[str, float], name: str, over: str, batch: int) -> Gain:
    """Compare two denoisers, round by round."""
    pairs = zip(laps[over]["denoiser"], laps[name]["denoiser"], strict=True)
    measured = median_interval([theirs / own for theirs, own in pairs])
    return Gain(name, over, batch, measured, flops[over] / flops[name])


def expected_flops(recipe: Recipe, contenders: Sequence[Contender], progress: Progress) -> dict[str, float]:
    """Count the denoiser's operations for one image of each contender."""
    model = skeleton(recipe.model.folder, family=recipe.model.family)
    embedded = model.embedded_guidance is not None
    forwards = dict[str, list[Scale]]()
    for c in contenders:
        assert c.schedule is not None
        if c.kind == "teacher":
            each = 2 if c.guidance != 1 and not embedded else 1
            forwards[c.name] = [c.schedule.full] * (passes_of(model, c) * each)
        else:
            forwards[c.name] = list(c.schedule.scales)
    counted = flops_of(model, itertools.chain(*forwards.values()), progress)
    return {name: sum(counted[s] for s in scales) for name, scales in forwards.items()}


def setting_of(recipe: Recipe, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """On what and how often something is timed, as stored with the results."""
    return {
        "base": recipe.model.base, "dtype": recipe.model.dtype,
        "precision": settle(recipe.train.precision, device), "rounds": rounds, "device": machine(device),
        "versions": versions(),
    }  # fmt: skip


def machine(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def steps_table(timings: Sequence[Timing]) -> str:
    """Milliseconds per image of every step of the denoiser, in markdown; of many steps their mean."""
    rows = []
    for timing in timings:
        steps = [spread.value for part, spread in timing.parts.items() if part.startswith("denoiser/")]
        each = " + ".join(map(format_ms, steps))
        if len(steps) > 8:
            each = f"{len(steps)} of {format_ms(sum(steps) / len(steps))}"
        rows.append([timing.name, str(timing.batch), each])
    return markdown.table(["", "batch", "denoiser's steps, ms"], rows)


def gains_table(gains: Sequence[Gain]) -> str:
    """Measured and expected gains of the denoisers, in markdown."""
    rows = [
        [f"{g.name} against {g.over}", str(g.batch), format_ratio(g.measured), f"{g.expected:.3g}x",
         g.reached.show("{:.2f}".format)]
        for g in gains
    ]  # fmt: skip
    return markdown.table(["denoiser", "batch", "faster", "fewer operations", "part reached"], rows)

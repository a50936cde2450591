"""Measure the speed of sampling by part, and compare it with the reduction in FLOPs."""

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
from scalewise.evaluation.evaluate import timed_sampler
from scalewise.evaluation.samplers import SamplerSpec, check_fit, count_passes, parse_samplers
from scalewise.evaluation.timing import (
    Times,
    Timing,
    describe_rounds,
    device_clock,
    format_ms,
    format_ratio,
    measure_times,
    summarize,
    timings_table,
)
from scalewise.method.backbone import choose_precision
from scalewise.method.scales import Scale
from scalewise.metrics.intervals import Interval, median_interval
from scalewise.models.lora import versions
from scalewise.models.meta import build_meta_model
from scalewise.planning.plan import flops_of
from scalewise.training import setup

DEFAULT_SAMPLERS = ("teacher", "full-scale=undistilled:full", "scale-wise=undistilled")
"""Without students: a fused student has the same FLOPs as the undistilled model with its schedule."""
Name = Literal["honest", "paper"]


@dataclass(frozen=True)
class Protocol:
    """Settings for timing sampling."""

    name: Name
    batches: tuple[int, ...]
    rounds: int
    compiled: bool
    half: bool
    """Use float16 on a GPU and bfloat16 on a CPU instead of the dtype of the recipe."""


PROTOCOLS = {
    "honest": Protocol("honest", (1, 8), 7, compiled=False, half=False),
    # Appendix G of the paper: half precision, torch.compile, tiny VAEs, batch 8, mean of 100 runs.
    "paper": Protocol("paper", (8,), 100, compiled=True, half=True),
}


def build_protocol(
    name: str, *, batches: Sequence[int] | None, rounds: int | None, compiled: bool | None
) -> Protocol:
    """Return a protocol by name, with the given settings changed; RecipeError for invalid ones."""
    if name not in PROTOCOLS:
        raise RecipeError(f"Unknown protocol {name!r}; choose {' or '.join(PROTOCOLS)}.")
    if wrong := [b for b in batches or () if b < 1]:
        raise RecipeError(f"The batch size must be at least 1; got {wrong[0]}.")
    known = PROTOCOLS[name]
    return replace(
        known, batches=tuple(batches or known.batches), rounds=rounds or known.rounds,
        compiled=known.compiled if compiled is None else compiled,
    )  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """Speed-up of one denoiser over another at a batch size, measured and expected from FLOPs."""

    name: str
    over: str
    batch: int
    measured: Interval
    """Ratio of the denoiser times, computed within rounds."""
    expected: float
    """Ratio of their FLOPs."""

    @property
    def reached(self) -> Interval:
        """Fraction of the expected speed-up that was measured."""
        return self.measured / self.expected

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the fraction reached, as stored in JSON."""
        return {**vars(self), "reached": self.reached}


@dataclass(frozen=True)
class Speed:
    """Measured times and speed-ups, with the hardware and settings."""

    protocol: Protocol
    setting: dict[str, Any]
    timings: list[Timing]
    gains: list[Gain]

    @property
    def summary(self) -> str:
        """Hardware and settings of the measurement in one or two sentences."""
        setting = self.setting
        compiled = "compiled" if setting["compiled"] else "not compiled"
        return (
            f"{setting['device']}, {setting['dtype']} computed in {setting['precision']}, {compiled}, VAE: "
            f"{setting['vae']}. {describe_rounds(self.protocol.rounds)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with the name of the protocol, as stored in JSON."""
        return {**vars(self), "protocol": self.protocol.name}

    def save(self, folder: Path) -> None:
        """Write bench.json and bench.md to a folder."""
        write_json(folder / "bench.json", self)
        tables = [
            timings_table(self.timings),
            steps_table(self.timings),
            gains_table(self.gains),
            self.summary,
        ]
        write_text(folder / "bench.md", "\n\n".join(tables) + "\n")


def measure_speed(
    recipe: Recipe, samplers: Sequence[str], protocol: Protocol, *, caption: str, progress: Progress
) -> Speed:
    """Time the samplers with one caption; the first is the baseline. RecipeError for a folder."""
    specs = parse_samplers(samplers or DEFAULT_SAMPLERS, recipe)
    if folder := next((c.name for c in specs if c.kind == "folder"), None):
        raise RecipeError(f"{folder} is a folder of images and cannot be timed; remove it.")
    flops = count_flops(recipe, specs, progress)
    device = distributed.device()
    if protocol.half:
        dtype = "float16" if device.type == "cuda" else "bfloat16"
        recipe = recipe.override([f"model.dtype={dtype}", "train.precision=float32"])
    model = setup.load(recipe, ("denoiser", "vae", "text"))
    check_fit(model, specs)
    if protocol.compiled:
        model.compile_blocks(dynamic=False)
    timed = [
        timed_sampler(model, c, caption, precision=recipe.train.precision, each_step=True) for c in specs
    ]
    with progress("timing", len(protocol.batches) * (protocol.rounds + 1)) as done, torch.no_grad():
        found = measure_times(
            timed, protocol.batches, rounds=protocol.rounds, clock=device_clock(str(device)), done=done
        )
    timings, gains = list[Timing](), list[Gain]()
    for batch, times in found.items():
        timings += summarize(times, batch, baseline=specs[0].name)
        gains += [compute_gain(times, flops, a, b, batch) for b, a in pairs_to_compare(specs, flops)]
    setting = describe_setting(recipe, device, rounds=protocol.rounds) | {
        "compiled": protocol.compiled, "vae": recipe.model.vae or "the base's own",
    }  # fmt: skip
    return Speed(protocol, setting, timings, gains)


def pairs_to_compare(samplers: Sequence[SamplerSpec], flops: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return pairs of sampler names (more FLOPs, fewer FLOPs), for which a speed-up is expected."""
    pairs = itertools.combinations([c.name for c in samplers], 2)
    ordered = [(a, b) if flops[a] > flops[b] else (b, a) for a, b in pairs]
    return [(more, fewer) for more, fewer in ordered if flops[more] > flops[fewer]]


def compute_gain(times: Times, flops: Mapping[str, float], name: str, over: str, batch: int) -> Gain:
    """Compute the speed-up of denoiser `name` over denoiser `over`, within rounds."""
    pairs = zip(times[over]["denoiser"], times[name]["denoiser"], strict=True)
    measured = median_interval([theirs / own for theirs, own in pairs])
    return Gain(name, over, batch, measured, flops[over] / flops[name])


def count_flops(recipe: Recipe, samplers: Sequence[SamplerSpec], progress: Progress) -> dict[str, float]:
    """Count the FLOPs of the denoiser per image for each sampler."""
    model = build_meta_model(recipe.model.folder, family=recipe.model.family)
    embedded = model.embedded_guidance is not None
    forwards = dict[str, list[Scale]]()
    for c in samplers:
        assert c.schedule is not None
        if c.kind == "teacher":
            each = 2 if c.guidance != 1 and not embedded else 1
            forwards[c.name] = [c.schedule.full] * (count_passes(model, c) * each)
        else:
            forwards[c.name] = list(c.schedule.scales)
    counted = flops_of(model, itertools.chain(*forwards.values()), progress)
    return {name: sum(counted[s] for s in scales) for name, scales in forwards.items()}


def describe_setting(recipe: Recipe, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Return the hardware, model, precision and rounds of a measurement, as stored with the results."""
    return {
        "base": recipe.model.base, "dtype": recipe.model.dtype,
        "precision": choose_precision(recipe.train.precision, device), "rounds": rounds,
        "device": device_name(device), "versions": versions(),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """Return the name of the device, for a CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def steps_table(timings: Sequence[Timing]) -> str:
    """Return a markdown table of milliseconds per denoiser step; the mean if there are more than 8."""
    rows = []
    for timing in timings:
        steps = [spread.value for part, spread in timing.parts.items() if part.startswith("denoiser/")]
        each = " + ".join(map(format_ms, steps))
        if len(steps) > 8:
            each = f"{len(steps)} x {format_ms(sum(steps) / len(steps))}"
        rows.append([timing.name, str(timing.batch), each])
    return markdown.table(["", "batch", "denoiser steps, ms"], rows)


def gains_table(gains: Sequence[Gain]) -> str:
    """Return a markdown table of measured and expected speed-ups of the denoisers."""
    rows = [
        [f"{g.name} against {g.over}", str(g.batch), format_ratio(g.measured), f"{g.expected:.3g}x",
         g.reached.show("{:.2f}".format)]
        for g in gains
    ]  # fmt: skip
    return markdown.table(["denoiser", "batch", "speed-up", "reduction in FLOPs", "fraction reached"], rows)

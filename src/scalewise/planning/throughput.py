"""FLOP/s: of GPUs from their data sheets, of this machine by timing one block."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from scalewise.config.recipe import Recipe, RecipeError
from scalewise.method.backbone import choose_precision
from scalewise.method.scales import Scale
from scalewise.models.meta import build_meta_model
from scalewise.models.pipeline_adapter import PipelineAdapter
from scalewise.planning.flops import measure

TERA = 1e12
UTILIZATION = 0.4
"""Assumed fraction of the peak. The compiled samplers of the paper reach 0.48 to 0.68 of the peak of an A100
(docs/decisions.md); training here is not compiled."""


@dataclass(frozen=True)
class Card:
    """A GPU, from the data sheet of its vendor."""

    title: str
    peak: float
    """Dense bfloat16 FLOP/s with float32 accumulation, without sparsity."""
    gigabytes: float


CARDS = {
    # NVIDIA A100 80GB data sheet (SXM); GA102 white paper, appendix A (142 there is with float16 sums).
    "a100": Card("NVIDIA A100 80 GB", 312 * TERA, 80),
    "3090": Card("NVIDIA GeForce RTX 3090", 71 * TERA, 24),
    # NVIDIA H100 data sheet (SXM: 1,979 with sparsity).
    "h100": Card("NVIDIA H100 SXM", 989 * TERA, 80),
    # NVIDIA L40S data sheet; Ada white paper, appendix A.
    "l40s": Card("NVIDIA L40S", 362 * TERA, 48),
    "4090": Card("NVIDIA GeForce RTX 4090", 165.2 * TERA, 24),
    # RTX Blackwell white paper, appendix A.
    "5090": Card("NVIDIA GeForce RTX 5090", 209.5 * TERA, 32),
}


@dataclass(frozen=True)
class Throughput:
    """FLOP/s used for estimates."""

    reached: float
    source: str
    """Where the number comes from."""

    def seconds(self, flops: float) -> float:
        """Return the seconds for a number of FLOPs."""
        return flops / self.reached


def card_named(name: str) -> Card:
    """Return a GPU by its short name, ignoring case; RecipeError if unknown."""
    if name.lower() not in CARDS:
        raise RecipeError(f"Unknown card {name!r}; choose one of {', '.join(CARDS)}.")
    return CARDS[name.lower()]


def throughput_of(card: Card) -> Throughput:
    """Return the throughput of a GPU at the assumed utilization."""
    source = (
        f"{card.title}: {card.peak / TERA:,.4g} TFLOPS in bfloat16, assuming {UTILIZATION:.0%} utilization"
    )
    return Throughput(card.peak * UTILIZATION, source)


def measured(recipe: Recipe, device: torch.device, *, seconds: float = 0.5) -> Throughput:
    """Measure this machine: time the forward pass of one block with constant weights for `seconds`.

    Runs at the full scale of the recipe on a GPU, with at most 256 image tokens on a CPU.
    """
    dtype = getattr(torch, recipe.model.dtype)
    model = build_meta_model(recipe.model.folder, dtype=dtype)
    full = recipe.schedule.build().full
    side = min(16 * model.patch, full.height, full.width)
    scale = full if device.type == "cuda" else Scale(1, side, side)
    block, args, options = first_block(model, scale)
    flops = measure(lambda: block(*args, **options), [block])[1]
    bf16 = choose_precision(recipe.train.precision, device) == "bf16"
    block = block.to_empty(device=device)
    for tensor in (*block.parameters(), *block.buffers()):
        _fill(tensor)
    args, options = tree_map(partial(_real, device=device), (args, options))
    times = list[float]()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        # The first run includes loading of kernels; if it takes long anyway, it is enough.
        while len(times) < 4 and sum(times) < seconds:
            _wait(device)
            started = time.perf_counter()
            block(*args, **options)
            _wait(device)
            times.append(time.perf_counter() - started)
    speed = flops / min(times)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
    kind = "bfloat16" if bf16 else recipe.model.dtype
    return Throughput(speed, f"{name}: {speed / TERA:,.3g} TFLOPS in {kind}, measured on one block")


def first_block(model: PipelineAdapter, scale: Scale) -> tuple[nn.Module, Any, Any]:
    """Return the first block of a model without weights, and its arguments for one sample at a scale."""
    found: list[tuple[Any, Any]] = []
    block = model.repeated_blocks()[0]

    def keep(_block: nn.Module, args: Any, options: Any) -> None:
        found.append((args, options))

    x_t = torch.empty(scale.shape(1, model.channels, video=model.video), device="meta")
    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model.predict(x_t, torch.full((1,), 500.0, device="meta"), model.empty_condition(1, "meta"))
    handle.remove()
    return block, *found[0]


def _fill(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.data.fill_(0.01)  # the values do not affect the time
    else:
        tensor.data.zero_()


def _real(value: Any, *, device: torch.device) -> Any:
    """Return a tensor with values in place of a meta tensor."""
    if not isinstance(value, Tensor):
        return value
    made = torch.zeros(value.shape, dtype=value.dtype, device=device)
    return made.fill_(0.5) if made.is_floating_point() else made


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The synthetic set: pictures that the teacher draws, stored as latents of every scale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from scalewise.common import distributed
from scalewise.common.contents import model_fingerprints
from scalewise.config.recipe import Recipe
from scalewise.data import DataError, LatentSetWriter
from scalewise.data.header import CONTENTS
from scalewise.method.backbone import Backbone
from scalewise.method.rng import derive
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale, downscale_video
from scalewise.models import PipelineAdapter

SAFE_SECONDS = 300.0  # the most that a kill can cost, even where a shard takes an hour


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample number `index` of a set, whatever the batch size and however often it stopped."""
    return derive(seed, "synthetic", index)


def weights_key(network: nn.Module) -> int:
    """A number that changes when a network's weights do: a hash of the first values of every parameter."""
    heads = [p.detach().flatten()[:16].float().cpu() for p in network.parameters()]
    return derive(torch.cat(heads).numpy().tobytes().hex())


def contents_of(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the files of a recipe's teacher, the autoencoder it asks for included, by component."""
    base = recipe.model.folder
    return model_fingerprints(base, recipe.model.vae, variant=recipe.model.variant)


def latents_of_all_scales(
    model: PipelineAdapter, latents: Tensor, scales: Sequence[Scale], *, reencode: bool = False
) -> dict[Scale, Tensor]:
    """Latents of every smaller scale, made in pixel space: decode, downscale, encode (section 4.1).

    `reencode`: those of the full scale are encoded from the pixels too (released), not the teacher's own.
    """
    full = max(scales, key=lambda scale: scale.cells)
    pixels = model.decode(latents)
    out = {full: model.encode(pixels) if reencode else latents}
    for scale in scales:
        if scale != full:
            out[scale] = model.encode(downscale_video(pixels, model.pixel_size(scale)))
    return out


def generate(
    model: PipelineAdapter,
    recipe: Recipe,
    prompts: Sequence[str],
    out: Path,
    *,
    count: int,
    batch: int,
    seed: int = 0,
    shard_rows: int = 256,
    also: Sequence[Scale] = (),
) -> Iterator[int]:
    """Draw `count` samples, sample i with prompt i modulo their number, and yield how many are done.

    `also`: further scales to keep latents at, for other schedules of the same full scale.

    A stopped call goes on after its last shard; settings that would change the samples are compared. What is
    drawn is written when a shard is full, every SAFE_SECONDS, and when the call is stopped. A corrupt shard
    that was deleted is drawn again. Several processes draw a batch each at a time; the first one writes.
    """
    backbone = Backbone(model, precision=recipe.train.precision)
    scales = all_scales(recipe, also, patch=model.patch)
    writer = _writer(
        model, backbone.precision, recipe=recipe, prompts=prompts, scales=scales, out=out, seed=seed,
        shard_rows=shard_rows,
    )  # fmt: skip
    draw = _drawing(model, backbone, recipe, scales)
    todo = writer.missing(count)
    yield count - len(todo)
    saved = time.monotonic()
    tokens = recipe.teacher.max_sequence_length or model.stock_sequence()
    try:
        with model.warned_once([prompts[i % len(prompts)] for i in todo], tokens=tokens):
            for start in range(0, len(todo), batch * distributed.world()):
                indices = todo[start : start + batch * distributed.world()]
                captions = [prompts[i % len(prompts)] for i in indices]
                seeds = [sample_seed(seed, i) for i in indices]
                mine = distributed.split(len(indices))
                drawn = {s: torch.empty(s.shape(0, model.channels, video=model.video)) for s in scales}
                if mine:  # the last ones may be fewer than the processes
                    drawn = draw([captions[i] for i in mine], [seeds[i] for i in mine])
                latents = distributed.gather_rows({str(s): rows.float() for s, rows in drawn.items()})
                if latents is not None:
                    writer.add(indices, captions, seeds, {s: latents[str(s)] for s in scales})
                    if time.monotonic() - saved > SAFE_SECONDS:
                        writer.flush()
                        saved = time.monotonic()
                yield count - len(todo) + start + len(indices)
    except (KeyboardInterrupt, GeneratorExit, RuntimeError, DataError):
        # Stopped here or in the caller's loop, out of memory, or NaN was drawn: what is good is kept, also
        # in a shard that is not full. (Processes but the first have nothing to write.)
        writer.flush()
        raise
    if distributed.is_main():
        writer.finish()


def _drawing(
    model: PipelineAdapter, backbone: Backbone, recipe: Recipe, scales: Sequence[Scale]
) -> Callable[[Sequence[str], Sequence[int]], dict[Scale, Tensor]]:
    """The function (captions, seeds) -> latents at every scale of what the recipe's teacher draws."""
    teacher, full = recipe.teacher, recipe.schedule.build().full
    encode = partial(model.encode_for_teacher, length=teacher.max_sequence_length)
    uncond = encode([teacher.negative_prompt])

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> dict[Scale, Tensor]:
        x0 = sample_teacher(
            backbone, full, encode(captions), seeds, steps=teacher.steps, guidance=teacher.guidance,
            uncond=uncond, shift=teacher.shift,
        )  # fmt: skip
        with torch.no_grad():
            return latents_of_all_scales(model, x0, scales, reencode=recipe.data.reencode)

    return draw


def all_scales(recipe: Recipe, also: Sequence[Scale], *, patch: int) -> list[Scale]:
    """The scales of a recipe's schedule and further ones, smallest first.

    Raises ValueError for a scale that does not lie within the full one or that the patch does not divide.
    """
    schedule = recipe.schedule.build()
    for scale in also:
        if not schedule.full.covers(scale) or any(side % patch for side in scale.size):
            raise ValueError(
                f"Latents at {scale} cannot be kept beside those at {schedule.full}: give a scale that is no "
                f"larger on any side, with sides divisible by {patch}."
            )
    return sorted({*schedule.scales, *also})


def _text_tokens(model: PipelineAdapter, recipe: Recipe) -> int | None:
    """T5 tokens that the teacher reads; None where that is what sets without this entry were made with."""
    length = recipe.teacher.max_sequence_length or model.stock_sequence()
    return None if length == model.longest_sequence() else length


def _writer(
    model: PipelineAdapter,
    precision: str,
    *,
    recipe: Recipe,
    prompts: Sequence[str],
    scales: Sequence[Scale],
    out: Path,
    seed: int,
    shard_rows: int,
) -> LatentSetWriter:
    """A writer whose settings hold whatever changes the samples; the base counts by its files' content."""
    return LatentSetWriter(
        out,
        scales=list(scales),
        channels=model.channels,
        kind="synthetic",
        base=recipe.model.base,
        settings={
            "teacher_steps": recipe.teacher.steps,
            "guidance": recipe.teacher.guidance,
            "negative_prompt": recipe.teacher.negative_prompt,
            "shift": recipe.teacher.shift,
            "reencode": recipe.data.reencode or None,
            "text_tokens": _text_tokens(model, recipe),
            "seed": seed,
            "prompts": len(prompts),
            "prompts_key": derive(*prompts),
            "precision": precision,
            "weights": weights_key(model.denoiser),
            CONTENTS: contents_of(recipe),
        },
        shard_rows=shard_rows,
    )

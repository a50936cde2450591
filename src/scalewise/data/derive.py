"""Latents of smaller scales, derived from a dataset's full scale on first use and cached.

Every sample is decoded, downscaled as pixels and encoded (paper, section 4.1). The cache has one dataset per
scale, so another schedule on the same dataset only adds the scales that are new.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from scalewise.common import distributed
from scalewise.common.progress import ProgressCallback, no_progress
from scalewise.data.header import INDEX_FILE, SetHeader
from scalewise.data.latent_set import LatentSet, LatentSetWriter
from scalewise.data.shards import DataError, exclusive
from scalewise.method.scales import Scale, downscale_video
from scalewise.models import PipelineAdapter

BATCH, BATCH_PIXELS = 16, 2**22
"""Most samples, and pixels of all samples, that are decoded at once: four images of 1024 x 1024."""
SHARD_ROWS = 256
SAVE_EVERY_SECONDS = 300.0  # the most work a kill can lose, even if a full shard takes an hour


def encode_all_scales(
    model: PipelineAdapter, latents: Tensor, scales: Sequence[Scale], *, reencode: bool = False
) -> dict[Scale, Tensor]:
    """Make latents [N, C, (T,) h, w] of every scale from those of the full scale, [N, C, (T,) H, W].

    They are decoded, downscaled as pixels and encoded (paper, section 4.1). With `reencode`, the latents of
    the full scale are encoded from pixels too, as in the released code, instead of kept.
    """
    full = max(scales, key=lambda scale: scale.cells)
    pixels = model.decode(latents)
    out = {full: model.encode(pixels) if reencode else latents}
    for scale in scales:
        if scale != full:
            out[scale] = model.encode(downscale_video(pixels, model.pixel_size(scale)))
    return out


def derive_batch(pixels: int) -> int:
    """Return how many samples of a number of pixels are decoded at once.

    It depends on the size alone, not on the device, so that a resumed derivation gives the same bits.
    """
    return max(1, min(BATCH, BATCH_PIXELS // pixels))


def derive_scales(
    data: LatentSet,
    scales: Iterable[Scale],
    folder: Path,
    load: Callable[[], PipelineAdapter],
    *,
    on_progress: ProgressCallback = no_progress,
) -> None:
    """Attach latents at `scales` to a dataset: those it does not store are read from the cache `folder`.

    What is missing there is computed with the VAE of the model that `load` returns. The folder must belong
    to this dataset and VAE alone. A killed derivation resumes after its finished shards, and damaged shards
    are derived again. The processes of a distributed run share the work; of several commands one works and
    the others wait.

    Raises DataError for a scale that is larger than the samples, and for latents with NaN or infinity.
    """
    folders = {scale: folder / str(scale) for scale in data.to_derive(scales)}
    if distributed.any_of(not all(map(_is_finished, folders.values()))):
        with exclusive(folder) if distributed.is_main() else nullcontext():
            if distributed.is_main():
                for path in folders.values():
                    _drop_damaged(path)
            distributed.barrier_without_timeout()  # the first process may have waited for another command
            _derive(data, folders, load, on_progress=on_progress)
            distributed.barrier_without_timeout()  # until it has written the last shard
    # Their contents were just checked or written.
    data.attach({scale: LatentSet.open(path, verify=False) for scale, path in folders.items()})


@torch.no_grad()
def _derive(
    data: LatentSet,
    folders: Mapping[Scale, Path],
    load: Callable[[], PipelineAdapter],
    *,
    on_progress: ProgressCallback,
) -> None:
    """Write the datasets of the scales, or the rows that they do not have yet."""
    writers = {scale: _writer(data, scale, path) for scale, path in folders.items()}
    missing = {scale: set(writer.missing(len(data))) for scale, writer in writers.items()}
    rows = sorted(set[int]().union(*missing.values()))
    before, saved = len(data) - len(rows), time.monotonic()
    model = load() if rows else None
    step = derive_batch(prod(model.pixel_size(data.header.full))) * distributed.world() if model else 1
    for writer in writers.values():
        # Whole groups in every shard, so that a resumed derivation decodes the same samples together.
        writer.shard_rows = step * max(1, SHARD_ROWS // step)
    try:
        for start in range(0, len(rows), step):
            assert model is not None
            on_progress(before + start)
            group = rows[start : start + step]
            latents = _derived_latents(data, group, list(folders), model)
            for scale in latents:
                writer, own = writers[scale], [i for i, row in enumerate(group) if row in missing[scale]]
                kept = [group[i] for i in own]
                values = latents[scale][own].reshape(len(own), *writer.header.shape(scale))
                writer.add(kept, data.captions(kept), data.seeds(kept), {scale: values})
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _flush(writers.values())
                saved = time.monotonic()
    except (KeyboardInterrupt, RuntimeError, DataError):  # stopped, out of memory, NaN or a full disk
        _flush(writers.values())
        raise
    on_progress(len(data))
    if distributed.is_main():
        for writer in writers.values():
            writer.finish()


def _derived_latents(
    data: LatentSet, rows: Sequence[int], scales: Sequence[Scale], model: PipelineAdapter
) -> dict[Scale, Tensor]:
    """Return the latents [N, C, (T,) h, w] of rows by scale; in other processes than the first, none.

    Each process computes a part of the rows.
    """
    full, mine = data.header.full, [rows[i] for i in distributed.split(len(rows))]
    found = {scale: torch.empty(0, *data.header.shape(scale)) for scale in scales}
    if mine:  # the last group may have fewer rows than there are processes
        found = encode_all_scales(model, data.stored(mine, full), [*scales, full], reencode=full in scales)
    gathered = distributed.gather_rows({str(scale): found[scale].float() for scale in scales})
    return {scale: gathered[str(scale)] for scale in scales} if gathered else {}


def _writer(data: LatentSet, scale: Scale, path: Path) -> LatentSetWriter:
    header = data.header
    return LatentSetWriter(
        path, scales=[scale], channels=header.channels, kind=header.kind, base=header.base,
        settings={"derived_from": data.fingerprint, "full": str(header.full)},
    )  # fmt: skip


def _flush(writers: Iterable[LatentSetWriter]) -> None:
    for writer in writers:
        writer.flush()


def _is_finished(folder: Path) -> bool:
    """Return whether a scale is completely derived and none of its shards is damaged."""
    if not (folder / INDEX_FILE).exists():
        return False
    header = SetHeader.read(folder)
    return header.complete and not any(shard.damage(folder) for shard in header.shards)


def _drop_damaged(folder: Path) -> None:
    """Remove damaged shards of a scale, with a warning."""
    if not (folder / INDEX_FILE).exists():
        return
    header, kept = SetHeader.read(folder), []
    for shard in header.shards:
        if damage := shard.damage(folder):
            warnings.warn(f"{folder / shard.file} {damage}; its latents are derived again.", stacklevel=3)
            (folder / shard.file).unlink(missing_ok=True)
        else:
            kept.append(shard)
    if len(kept) < len(header.shards):
        replace(header, shards=tuple(kept), complete=False).write(folder)

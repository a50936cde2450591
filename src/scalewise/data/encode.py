"""Encoding, once, of what training reads many times: image folders at every scale, and prompts."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalewise.common.checkpoint import delete_leftovers, write_atomically
from scalewise.common.progress import ProgressCallback, no_progress
from scalewise.data.header import CONTENTS, INDEX_FILE, SetHeader
from scalewise.data.image_folder import (
    BucketMode,
    ImageEntry,
    assign_buckets,
    bucket_sizes,
    bucket_warnings,
    describe_buckets,
    enlargement_warnings,
    list_files,
    load_pixels,
    scan_images,
)
from scalewise.data.latent_set import LatentSet, LatentSetWriter
from scalewise.data.shards import (
    DataError,
    Shard,
    exclusive,
    explain_disk_full,
    read_json,
    write_json,
)
from scalewise.method.adapter import Condition
from scalewise.method.scales import Scale, downscale_area
from scalewise.models import PipelineAdapter

FOLDER_FILE = "folder.json"
PROMPTS_FILE = "prompts.json"
READER_VERSION = 2
"""Increased whenever a version finds other captions or uses other images of the same folder."""
SHARD_BYTES = 256 * 2**20


def encode_folder(
    adapter: PipelineAdapter,
    folder: Path | str,
    out: Path | str,
    *,
    full: Scale,
    scales_for: Callable[[Scale], Iterable[Scale]],
    vae_key: str,
    mode: BucketMode = "crop",
    batch: int = 8,
    min_images: int = 1,
    caption_from_name: bool = False,
    on_progress: ProgressCallback = no_progress,
    on_note: Callable[[str], None] = lambda _sentence: None,
) -> list[LatentSet]:
    """Encode an image folder into one dataset per bucket, `out/<full size>/`, with latents at every scale.

    Pixels are downscaled (area) before encoding, because downscaling latents is much worse (paper, section
    4.1). `scales_for(size)` returns the scales of a bucket with that full size. `min_images` is the minimum
    number of images in a bucket, such as a training batch. `vae_key` identifies the VAE by its files'
    contents and dtype, so that a changed VAE at the same path is noticed.

    If nothing has changed since the last call, the datasets are only opened; after a kill, encoding resumes.
    If several processes call it, one encodes and the others wait. Every call warns about skipped and enlarged
    images and about a full size without images, and passes the number of images per bucket to `on_note`.
    """
    root, out = Path(folder), Path(out)
    sizes = [full] if mode == "crop" else bucket_sizes(full, adapter.patch)
    plan = {
        "reading": READER_VERSION,
        "vae": vae_key,
        "mode": mode,
        "least": None if mode == "crop" else min_images,
        "caption_from_name": caption_from_name,
        "scales": [list(map(str, scales_for(size))) for size in sizes],
    }
    fingerprint = fingerprint_folder(root, plan)
    if not _is_encoded(out, fingerprint):
        with exclusive(out):
            if not _is_encoded(out, fingerprint):  # may have been encoded while this process waited
                entries, skipped = scan_images(root, caption_from_name=caption_from_name)
                buckets = assign_buckets(entries, full, patch=adapter.patch, mode=mode, min_images=min_images)
                _drop_stale(out, fingerprint)
                settings = {"fingerprint": fingerprint, CONTENTS: {"vae": vae_key}}
                _encode_buckets(
                    adapter, buckets, out, scales_for=scales_for, settings=settings, batch=batch,
                    on_progress=on_progress,
                )  # fmt: skip
                problems, kept = [*skipped.problems, *enlargement_warnings(buckets, adapter.vae_factor)], ""
                if mode == "buckets":
                    problems += bucket_warnings(buckets, full, patch=adapter.patch, min_images=min_images)
                    kept = describe_buckets(buckets)
                index = {"fingerprint": fingerprint, "buckets": list(map(str, buckets))}
                write_json(out / FOLDER_FILE, index | {"kept": kept, "faults": problems})
    index = read_json(out / FOLDER_FILE)
    for sentence in [*index.get("faults", ()), *list_files(root).problems]:
        warnings.warn(f"{root}: {sentence}.", stacklevel=2)
    if index.get("kept"):
        on_note(f"{root}: {index['kept']}")
    return open_sets(out)


def open_sets(path: Path | str, *, verify: bool = True) -> list[LatentSet]:
    """Open a dataset, or all bucket datasets of an encoded image folder."""
    index = Path(path) / FOLDER_FILE
    if not index.exists():
        return [LatentSet.open(path, verify=verify)]
    return [LatentSet.open(Path(path) / name, verify=verify) for name in read_json(index)["buckets"]]


def fingerprint_folder(root: Path, plan: Any) -> str:
    """Hash the names, sizes and times of images and captions, and the encoding plan (any JSON value)."""
    files = list_files(root).all
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([stats, plan]).encode()).hexdigest()


def _encode_buckets(
    adapter: PipelineAdapter,
    buckets: Mapping[Scale, Sequence[ImageEntry]],
    out: Path,
    *,
    scales_for: Callable[[Scale], Iterable[Scale]],
    settings: Mapping[str, Any],
    batch: int,
    on_progress: ProgressCallback,
) -> None:
    """Write the dataset of every bucket, or the part of it that is missing."""
    before = 0
    for size, images in buckets.items():
        writer = LatentSetWriter(
            out / str(size),
            scales=list(scales_for(size)),
            channels=adapter.channels,
            kind="images",
            base=adapter.base,
            settings={**settings, "full": str(size)},
        )
        for number in _encode_bucket(adapter, images, writer, size=size, batch=batch):
            on_progress(before + number)
        before += len(images)


def _encode_bucket(
    adapter: PipelineAdapter,
    images: Sequence[ImageEntry],
    writer: LatentSetWriter,
    *,
    size: Scale,
    batch: int,
) -> Iterator[int]:
    """Encode the images that a writer does not have yet; yields the number of images it has."""
    pixels = size.height * adapter.vae_factor, size.width * adapter.vae_factor
    missing = writer.missing(len(images))
    yield len(images) - len(missing)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(missing), batch):
            rows = missing[start : start + batch]
            chosen = [images[row] for row in rows]
            whole = torch.stack(list(pool.map(lambda image: load_pixels(image, pixels), chosen)))
            latents = {scale: _encode_at(adapter, whole, scale) for scale in writer.header.scales}
            writer.add(rows, [image.caption for image in chosen], rows, latents)
            yield len(images) - len(missing) + start + len(rows)
    writer.finish()


def _encode_at(adapter: PipelineAdapter, pixels: Tensor, scale: Scale) -> Tensor:
    """Encode pixels [N, 3, H, W] as latents [N, C, h, w] at a scale, by downscaling the pixels."""
    size = scale.height * adapter.vae_factor, scale.width * adapter.vae_factor
    return adapter.encode(downscale_area(pixels, size))


def _is_encoded(out: Path, fingerprint: str) -> bool:
    """Return whether the datasets of this fingerprint are complete and none of their shards was deleted."""
    if not (out / FOLDER_FILE).exists() or read_json(out / FOLDER_FILE).get("fingerprint") != fingerprint:
        return False
    folders = [out / name for name in read_json(out / FOLDER_FILE)["buckets"]]
    return all(
        (folder / INDEX_FILE).exists()
        and all((folder / shard.file).exists() for shard in SetHeader.read(folder).shards)
        for folder in folders
    )


def _drop_stale(out: Path, fingerprint: str) -> None:
    """Delete bucket datasets that were encoded from other images or for other scales."""
    (out / FOLDER_FILE).unlink(missing_ok=True)
    for index in out.glob(f"*/{INDEX_FILE}"):
        header = SetHeader.read(index.parent)
        if header.kind != "images":
            raise DataError(
                f"{index.parent} contains a synthetic dataset; choose another folder for the images."
            )
        if header.settings.get("fingerprint") != fingerprint:
            index.unlink()
            for shard in header.shards:
                (index.parent / shard.file).unlink(missing_ok=True)


@dataclass(frozen=True)
class _PromptShard:
    """A file of encoded prompts, and the captions of its rows."""

    shard: Shard
    captions: list[str]

    def to_json(self) -> dict[str, Any]:
        return self.shard.to_json() | {"captions": self.captions}


class PromptCache:
    """Encoded prompts in a folder: every caption once, and "" for the unconditional pass.

    The tensors are stored in memory-mapped safetensors files of about 256 MiB (one T5 prompt takes several
    megabytes); `prompts.json` lists their captions.
    """

    def __init__(self, folder: Path, shards: Sequence[_PromptShard]) -> None:
        self.folder = folder
        self._tensors = [_map_tensors(folder / part.shard.file) for part in shards]
        self._where = {
            caption: (number, row)
            for number, part in enumerate(shards)
            for row, caption in enumerate(part.captions)
        }

    @classmethod
    def open(cls, path: Path | str, *, fingerprint: str) -> PromptCache:
        """Open the cached prompts of a fingerprint, possibly none; `missing` returns those to encode."""
        return cls(Path(path), _usable(Path(path), fingerprint))

    @classmethod
    def build(
        cls,
        load: Callable[[], PipelineAdapter],
        captions: Iterable[str],
        path: Path | str,
        *,
        fingerprint: str,
        batch: int = 16,
        on_progress: ProgressCallback = no_progress,
    ) -> PromptCache:
        """Encode the captions, and "", that are missing from the cache at `path`, and open it.

        `load` returns the model and is called only if something is missing. `fingerprint` identifies all that
        changes the encoding (text encoders, token limit); a cache with another fingerprint is replaced. A
        killed build resumes after its finished files, and damaged files are encoded again. If several
        processes call it, one encodes and the others wait.

        Raises DataError for embeddings with NaN or infinity.
        """
        folder = Path(path)
        with exclusive(folder), ExitStack() as held:
            shards = _usable(folder, fingerprint)
            todo = cls(folder, shards).missing(captions)
            if not shards:
                _clear(folder)
            delete_leftovers(folder)
            model = load() if todo else None
            if model:
                held.enter_context(model.warn_of_truncation_once(todo))
            waiting: list[Condition] = []
            first = 0
            for start in range(0, len(todo), batch):
                assert model is not None
                waiting.append(model.encode_prompts(todo[start : start + batch]).to("cpu"))
                end = min(start + batch, len(todo))
                if end == len(todo) or sum(map(_bytes, waiting)) >= SHARD_BYTES:
                    shards.append(_write_prompts(folder, Condition.cat(waiting), todo[first:end], shards))
                    listed = [shard.to_json() for shard in shards]
                    write_json(folder / PROMPTS_FILE, {"fingerprint": fingerprint, "shards": listed})
                    waiting, first = [], end
                on_progress(end)
            return cls(folder, shards)

    def __len__(self) -> int:
        return len(self._where)

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Return those of the captions, and of "", that are not encoded yet."""
        return [caption for caption in dict.fromkeys(["", *captions]) if caption not in self._where]

    def condition(self, captions: Sequence[str]) -> Condition:
        """Return the conditions of captions: tensors [N, ...] with one row per caption.

        Raises DataError for a caption that is not in the cache.
        """
        if unknown := [caption for caption in captions if caption not in self._where]:
            raise DataError(
                f"The prompt {unknown[0]!r} is not in the cache {self.folder}; build it with every caption."
            )
        rows = [self._where[caption] for caption in captions]
        files = [(self._tensors[number], row) for number, row in rows]
        return Condition(
            {name: torch.stack([file[name][row] for file, row in files]) for name in files[0][0]}
        )

    def uncond(self, count: int) -> Condition:
        """Return the unconditional condition, repeated `count` times: tensors [count, ...]."""
        return self.condition([""] * count)


def _usable(folder: Path, fingerprint: str) -> list[_PromptShard]:
    """Return the undamaged files of a cache if it has this fingerprint, and warn about damaged ones."""
    if not (folder / PROMPTS_FILE).exists():
        return []
    index = read_json(folder / PROMPTS_FILE)
    if index["fingerprint"] != fingerprint:
        return []
    usable = []
    for raw in index["shards"]:
        part = _PromptShard(captions=raw.pop("captions"), shard=Shard(**raw))
        if damage := part.shard.damage(folder):
            warnings.warn(f"{folder / raw['file']} {damage}; its prompts are encoded again.", stacklevel=4)
        else:
            usable.append(part)
    return usable


def _clear(folder: Path) -> None:
    """Create an empty cache, deleting the files of one that cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROMPTS_FILE).unlink(missing_ok=True)
    for path in folder.glob("prompts-*.safetensors"):
        path.unlink()


def _write_prompts(
    folder: Path, cond: Condition, captions: list[str], shards: Sequence[_PromptShard]
) -> _PromptShard:
    for row, caption in enumerate(captions):
        if not all(torch.isfinite(value[row]).all() for value in cond.tensors.values()):
            raise DataError(
                f"The embedding of the prompt {caption!r} has NaN or infinity: the text encoders overflow, "
                "or their weights are damaged. Set model.dtype=bfloat16 or float32, or download the model "
                "again."
            )
    taken = {part.shard.file for part in shards}
    name = next(n for n in map("prompts-{:05d}.safetensors".format, range(len(taken) + 1)) if n not in taken)
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in cond.tensors.items()}
    with explain_disk_full(folder, _bytes(cond), f"The {len(taken)} finished files are safe"):
        write_atomically(folder / name, lambda path: save_file(tensors, path))
    return _PromptShard(Shard.of(folder / name, len(captions)), captions)


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a file; rows are read when they are used."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _bytes(cond: Condition) -> int:
    return sum(tensor.nbytes for tensor in cond.tensors.values())

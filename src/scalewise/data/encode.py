"""Encoding once what training reads many times: image folders at every scale, and prompts."""

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
    bucket_faults,
    bucket_line,
    bucket_sizes,
    enlarged,
    list_files,
    load_pixels,
    scan_images,
)
from scalewise.data.latent_set import LatentSet, LatentSetWriter
from scalewise.data.shards import (
    DataError,
    Shard,
    alone,
    disk_full_explained,
    read_json,
    write_json,
)
from scalewise.method.adapter import Condition
from scalewise.method.scales import Scale, downscale_area
from scalewise.models import PipelineAdapter

FOLDER_FILE = "folder.json"
PROMPTS_FILE = "prompts.json"
READING = 2
"""Rises when the same folder is read otherwise: captions found, images used."""
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
    least: int = 1,
    caption_from_name: bool = False,
    done: ProgressCallback = no_progress,
    say: Callable[[str], None] = lambda _sentence: None,
) -> list[LatentSet]:
    """Encode an image folder into one set per bucket, `out/<full size>/`, with latents at every scale.

    Each scale's latents come from pixels that were downscaled (area) before encoding: downscaling latents
    instead is much worse (paper, section 4.1). `scales_for(size)` lists the scales of a bucket of that full
    size; `least` is the fewest images a bucket may have (a training batch, say); `vae_key` names the VAE by
    its files' content and type, so that another VAE of the same path is noticed. A second call with nothing
    changed only opens what is there; one after a kill goes on; of several processes one encodes, the others
    wait. Every call warns of skipped and enlarged images and of a full size that no image has, and lets
    `say` tell how many images each bucket keeps.
    """
    root, out = Path(folder), Path(out)
    sizes = [full] if mode == "crop" else bucket_sizes(full, adapter.patch)
    plan = {
        "reading": READING,
        "vae": vae_key,
        "mode": mode,
        "least": None if mode == "crop" else least,
        "caption_from_name": caption_from_name,
        "scales": [list(map(str, scales_for(size))) for size in sizes],
    }
    fingerprint = fingerprint_folder(root, plan)
    if not _is_encoded(out, fingerprint):
        with alone(out):
            if not _is_encoded(out, fingerprint):  # by the process that this one waited for
                entries, skipped = scan_images(root, caption_from_name=caption_from_name)
                buckets = assign_buckets(entries, full, patch=adapter.patch, mode=mode, least=least)
                _drop_stale(out, fingerprint)
                settings = {"fingerprint": fingerprint, CONTENTS: {"vae": vae_key}}
                _encode_buckets(
                    adapter, buckets, out, scales_for=scales_for, settings=settings, batch=batch,
                    done=done,
                )  # fmt: skip
                faults, kept = [*skipped.faults, *enlarged(buckets, adapter.vae_factor)], ""
                if mode == "buckets":
                    faults += bucket_faults(buckets, full, patch=adapter.patch, least=least)
                    kept = bucket_line(buckets)
                names = list(map(str, buckets))
                index = {"fingerprint": fingerprint, "buckets": names, "kept": kept, "faults": faults}
                write_json(out / FOLDER_FILE, index)
    index = read_json(out / FOLDER_FILE)
    for sentence in [*index.get("faults", ()), *list_files(root).told]:
        warnings.warn(f"{root}: {sentence}.", stacklevel=2)
    if index.get("kept"):
        say(f"{root}: {index['kept']}")
    return open_sets(out)


def open_sets(path: Path | str, *, verify: bool = True) -> list[LatentSet]:
    """Open one set, or all bucket sets of an encoded image folder."""
    index = Path(path) / FOLDER_FILE
    if not index.exists():
        return [LatentSet.open(path, verify=verify)]
    return [LatentSet.open(Path(path) / name, verify=verify) for name in read_json(index)["buckets"]]


def fingerprint_folder(root: Path, plan: Any) -> str:
    """A hash of the images' and captions' names, sizes and times, and of a plan (anything JSON holds)."""
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
    done: ProgressCallback,
) -> None:
    """Write the set of every bucket, or what it lacks."""
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
            done(before + number)
        before += len(images)


def _encode_bucket(
    adapter: PipelineAdapter,
    images: Sequence[ImageEntry],
    writer: LatentSetWriter,
    *,
    size: Scale,
    batch: int,
) -> Iterator[int]:
    """Fill a writer with the images it lacks; yields the number of images in it."""
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
    """Latents of pixels [N, 3, H, W] at a scale: the pixels are made smaller, not the latents."""
    size = scale.height * adapter.vae_factor, scale.width * adapter.vae_factor
    return adapter.encode(downscale_area(pixels, size))


def _is_encoded(out: Path, fingerprint: str) -> bool:
    """Tell whether the sets of this fingerprint were finished and no shard was deleted since."""
    if not (out / FOLDER_FILE).exists() or read_json(out / FOLDER_FILE).get("fingerprint") != fingerprint:
        return False
    folders = [out / name for name in read_json(out / FOLDER_FILE)["buckets"]]
    return all(
        (folder / INDEX_FILE).exists()
        and all((folder / shard.file).exists() for shard in SetHeader.read(folder).shards)
        for folder in folders
    )


def _drop_stale(out: Path, fingerprint: str) -> None:
    """Delete bucket sets that were encoded from other images or for other scales."""
    (out / FOLDER_FILE).unlink(missing_ok=True)
    for index in out.glob(f"*/{INDEX_FILE}"):
        header = SetHeader.read(index.parent)
        if header.kind != "images":
            raise DataError(f"{index.parent} holds a synthetic set; choose another folder for the images.")
        if header.settings.get("fingerprint") != fingerprint:
            index.unlink()
            for shard in header.shards:
                (index.parent / shard.file).unlink(missing_ok=True)


@dataclass(frozen=True)
class _PromptShard:
    """A file of encoded prompts and the captions of its rows."""

    shard: Shard
    captions: list[str]

    def to_json(self) -> dict[str, Any]:
        return self.shard.to_json() | {"captions": self.captions}


class PromptCache:
    """Encoded prompts in a folder: each caption once, and "" for the unconditional pass.

    The tensors lie in memory-mapped safetensors files of about a quarter of a gigabyte (one T5 prompt takes
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
        """Open what is there for a fingerprint, which may be nothing: ask `missing`."""
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
        done: ProgressCallback = no_progress,
    ) -> PromptCache:
        """Encode the captions, and "", that the cache at `path` lacks, and open it.

        `load` gives the model, and is called only if something is missing. `fingerprint` names whatever
        changes the encoding (text encoders, token limit): a cache with another one is made anew. A killed
        build goes on from its finished files, a damaged file is encoded again. Of several processes one
        encodes while the others wait for it.

        Raises DataError for embeddings with NaN or infinity.
        """
        folder = Path(path)
        with alone(folder), ExitStack() as held:
            shards = _usable(folder, fingerprint)
            todo = cls(folder, shards).missing(captions)
            if not shards:
                _clear(folder)
            delete_leftovers(folder)
            model = load() if todo else None
            if model:
                held.enter_context(model.warned_once(todo))
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
                done(end)
            return cls(folder, shards)

    def __len__(self) -> int:
        return len(self._where)

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those of the captions, and of "", that are not encoded."""
        return [caption for caption in dict.fromkeys(["", *captions]) if caption not in self._where]

    def condition(self, captions: Sequence[str]) -> Condition:
        """Conditions of captions, one row each."""
        if unknown := [caption for caption in captions if caption not in self._where]:
            raise DataError(
                f"The prompt {unknown[0]!r} is not in the cache {self.folder}; build it with every caption."
            )
        places = [self._where[caption] for caption in captions]
        files = [(self._tensors[number], row) for number, row in places]
        return Condition(
            {name: torch.stack([file[name][row] for file, row in files]) for name in files[0][0]}
        )

    def uncond(self, count: int) -> Condition:
        """The unconditional condition, `count` times."""
        return self.condition([""] * count)


def _usable(folder: Path, fingerprint: str) -> list[_PromptShard]:
    """The undamaged files of a cache with this fingerprint."""
    if not (folder / PROMPTS_FILE).exists():
        return []
    index = read_json(folder / PROMPTS_FILE)
    if index["fingerprint"] != fingerprint:
        return []
    usable = []
    for raw in index["shards"]:
        part = _PromptShard(captions=raw.pop("captions"), shard=Shard(**raw))
        if fault := part.shard.fault(folder):
            warnings.warn(f"{folder / raw['file']} {fault}; its prompts are encoded again.", stacklevel=4)
        else:
            usable.append(part)
    return usable


def _clear(folder: Path) -> None:
    """Make an empty cache, deleting the files of one that cannot be used."""
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
                "or their weights are damaged. Set model.dtype=bfloat16 or float32, or fetch the model again."
            )
    taken = {part.shard.file for part in shards}
    name = next(n for n in map("prompts-{:05d}.safetensors".format, range(len(taken) + 1)) if n not in taken)
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in cond.tensors.items()}
    with disk_full_explained(folder, _bytes(cond), f"The {len(taken)} finished files are safe"):
        write_atomically(folder / name, lambda path: save_file(tensors, path))
    return _PromptShard(Shard.of(folder / name, len(captions)), captions)


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped: rows are read when they are used."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _bytes(cond: Condition) -> int:
    return sum(tensor.nbytes for tensor in cond.tensors.values())

"""Datasets of latents on disk, synthetic or from an image folder; smaller scales may be derived (derive.py).

A dataset is a folder of `shard-00000.arrow`, ... and `set.json`, which lists the finished shards. Arrow files
are memory-mapped, so a dataset may be larger than memory. The latents of a row are bytes (storage.py), by
default those of a float16 tensor: 32 random rows of 16x128x128 are read in 6 ms on one core, a third of the
time needed with the Array3D type of `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from scalewise.common.checkpoint import delete_leftovers, write_atomically
from scalewise.data.header import INDEX_FILE, Kind, SetHeader, describe_difference
from scalewise.data.shards import DataError, Shard, explain_disk_full
from scalewise.data.storage import StorageType, is_finite, pack, unpack
from scalewise.method.scales import Scale

LOCK_FILE = ".lock"
"""Lock file, held while a shard is written."""
REGENERATE = (
    "delete it and run `scalewise generate` (for an image folder: the same command) again; it resumes"
)


class LatentSet:
    """A dataset to read from, with rows ordered by their `index`, not by when they were written."""

    def __init__(self, folder: Path, header: SetHeader) -> None:
        self.folder, self.header = folder, header
        import datasets  # here, because `sample` opens no dataset and importing it takes half a second

        parts = [_open_shard(folder, shard) for shard in header.shards]
        self._rows = datasets.concatenate_datasets(parts).with_format("arrow")
        self._latents = {scale: self._rows.select_columns(_column(scale)) for scale in header.scales}
        self._order = np.argsort(_read_column(self._rows, "index"), kind="stable")
        self._captions = self._rows.select_columns("caption")
        self._seeds = _read_column(self._rows, "seed")
        self._derived: dict[Scale, LatentSet] = {}

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> LatentSet:
        """Open a dataset after checking the size of every shard and, unless verify=False, SHA-256 and values.

        Raises DataError for a missing, empty or damaged dataset and for latents with NaN or infinity; warns
        if the dataset is incomplete.
        """
        folder = Path(path)
        header = SetHeader.read(folder)
        if not header.rows:
            raise DataError(f"The dataset {folder} is empty; run `scalewise generate` to fill it.")
        for shard in header.shards:
            if damage := shard.damage(folder, content=verify):
                raise DataError(f"The shard {folder / shard.file} {damage}; {REGENERATE}.")
        if not header.complete:
            warnings.warn(
                f"The dataset {folder} is incomplete: its {header.rows} finished rows are used. "
                "Run the command that makes it again to complete it.",
                stacklevel=2,
            )
        if verify:
            for shard in header.shards:
                _refuse_non_finite(folder, shard, header)
        return cls(folder, header)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def scales(self) -> list[Scale]:
        """The scales at which every sample is stored."""
        return list(self.header.scales)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the dataset was made with."""
        return self.header.settings

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data: changes if any latent, caption, seed or the order of rows changes.

        It is a hash of the recorded SHA-256 of all shards, so no file is read. It does not depend on the
        folder, the name of the base or the settings.
        """
        return self.header.fingerprint

    def to_derive(self, scales: Iterable[Scale]) -> list[Scale]:
        """Return those of the scales that are neither stored nor attached, smallest first.

        Raises DataError for a scale that is larger than the samples.
        """
        wanted = sorted(set(scales) - {*self.header.usable, *self._derived})
        if larger := [scale for scale in wanted if not self.header.full.covers(scale)]:
            raise DataError(
                f"The dataset {self.folder} has samples of {self.header.full}, from which latents at "
                f"{', '.join(map(str, larger))} cannot be derived; use a schedule that ends at "
                f"{self.header.full}, or generate a dataset of this size with `scalewise generate`."
            )
        return wanted

    def attach(self, derived: Mapping[Scale, LatentSet]) -> None:
        """Use the latents of other datasets, with the same rows in the same order, at some scales."""
        for scale, source in derived.items():
            assert len(source) == len(self) and scale in source.header.scales, f"{source.folder} at {scale}"
        self._derived.update(derived)

    def require(self, scales: Iterable[Scale]) -> None:
        """Raise DataError if any of the scales is neither stored nor attached."""
        if lacking := self.to_derive(scales):
            missing = ", ".join(map(str, lacking))
            have = ", ".join(map(str, sorted({*self.header.usable, *self._derived}))) or "no scale yet"
            raise DataError(
                f"The dataset {self.folder} has no latents at {missing}, only at {have}. "
                "Open it with `scalewise.training.setup.open_set`, which derives and caches the others."
            )

    def latents(self, indices: Sequence[int], scale: Scale) -> Tensor:
        """Return the latents of rows at a scale, float32 [N, C, H, W] (video [N, C, T, H, W]).

        Raises DataError for a scale that is neither stored nor attached.
        """
        self.require([scale])
        # A derived dataset of one frame does not know that it belongs to a video.
        source = self._derived.get(scale, self)
        return source.stored(indices, scale).reshape(len(indices), *self.header.shape(scale))

    def stored(self, indices: Sequence[int], scale: Scale) -> Tensor:
        """Return the latents of rows as stored in this dataset itself, float32 [N, C, (T,) H, W]."""
        cells = self._latents[scale][self._stored_rows(indices)].column(0)
        return unpack([c.as_buffer() for c in cells], self.header.dtype, self.header.shape(scale))

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return the captions of rows."""
        return list(self._captions[self._stored_rows(indices)].column(0).to_pylist())

    def unique_captions(self) -> list[str]:
        """Return every caption once, in the order of first use."""
        return list(dict.fromkeys(self.captions(range(len(self)))))

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """Return the seeds of rows; a synthetic sample's seed is the one of its initial noise."""
        return [int(self._seeds[row]) for row in self._stored_rows(indices)]

    def _stored_rows(self, indices: Sequence[int]) -> list[int]:
        """Convert indices, in the order of `index`, to rows in the order of storage."""
        return [int(row) for row in self._order[np.asarray(indices, dtype=np.int64)]]


class LatentSetWriter:
    """Writes a dataset shard by shard; after a kill, a new writer resumes after the finished shards."""

    def __init__(
        self,
        path: Path | str,
        *,
        scales: Sequence[Scale],
        channels: int,
        kind: Kind,
        base: str,
        settings: Mapping[str, Any],
        shard_rows: int = 256,
        dtype: StorageType = "float16",
    ) -> None:
        """Create the dataset at `path`, or resume it; `dtype` "int8" stores latents in 8 bits.

        The rows of a deleted shard are written again: `missing` returns them. Raises DataError if the folder
        has a dataset with other settings, or a damaged shard.
        """
        self.folder, self.shard_rows = Path(path), shard_rows
        plain = json.loads(json.dumps(dict(settings)))  # as read back from JSON: tuples become lists
        wanted = SetHeader(kind, tuple(dict.fromkeys(scales)), channels, base, plain, dtype=dtype)
        exists = (self.folder / INDEX_FILE).exists()
        self._shards_on_disk = SetHeader.read(self.folder).shards if exists else ()
        self.header = self._resume(wanted) if exists else wanted
        parts = [_open_shard(self.folder, shard) for shard in self.header.shards]
        self._added = {int(index) for part in parts for index in _read_column(part, "index")}
        self._buffer: dict[str, list[Any]] = {name: [] for name in self._columns()}

    @property
    def done(self) -> int:
        """Number of rows in finished shards."""
        return self.header.rows

    def missing(self, total: int) -> list[int]:
        """Return the indices below `total` that are neither in a finished shard nor in the buffer."""
        return [index for index in range(total) if index not in self._added]

    def add(
        self,
        indices: Sequence[int],
        captions: Sequence[str],
        seeds: Sequence[int],
        latents: Mapping[Scale, Tensor],
    ) -> None:
        """Add samples with latents {scale: [N, C, (T,) H, W]} at every scale, to be stored as `header.dtype`.

        Raises DataError for duplicate indices, wrong shapes, and values that are not finite in float16.
        """
        self._check(indices, captions, seeds)
        cells = {_column(scale): self._cells(latents, scale, len(indices)) for scale in self.header.scales}
        rows: dict[str, list[Any]] = {
            "index": list(map(int, indices)),
            "caption": list(captions),
            "seed": list(map(int, seeds)),
        }
        columns: dict[str, list[Any]] = {**rows, **cells}
        for name, values in columns.items():
            self._buffer[name].extend(values)
        self._added.update(columns["index"])
        while len(self._buffer["index"]) >= self.shard_rows:
            self._write_shard(self.shard_rows)

    def flush(self) -> None:
        """Write the buffered rows as a shard, even if it is not full."""
        if self._buffer["index"]:
            self._write_shard(len(self._buffer["index"]))

    def finish(self) -> None:
        """Write the buffered rows and mark the dataset complete."""
        self.flush()
        if not self.done:
            raise DataError(f"The dataset {self.folder} would be empty; add samples before finishing it.")
        with FileLock(self.folder / LOCK_FILE):
            self._refuse_other_writers()
            self._commit(replace(self.header, complete=True))

    def _columns(self) -> list[str]:
        return ["index", "caption", "seed", *map(_column, self.header.scales)]

    def _resume(self, wanted: SetHeader) -> SetHeader:
        stored = SetHeader.read(self.folder)
        if difference := describe_difference(stored, wanted):
            raise DataError(
                f"The dataset {self.folder} was started with other settings: {difference}. "
                "Use the same settings to resume it, or choose another folder."
            )
        kept = []
        for shard in stored.shards:
            damage = shard.damage(self.folder)
            if damage == "is missing":
                warnings.warn(f"{shard.file} is missing: its {shard.rows} rows are made again.", stacklevel=3)
            elif damage:
                raise DataError(f"The shard {self.folder / shard.file} {damage}; {REGENERATE}.")
            else:
                kept.append(shard)
        complete = stored.complete and len(kept) == len(stored.shards)
        return replace(stored, shards=tuple(kept), complete=complete)

    def _check(self, indices: Sequence[int], captions: Sequence[str], seeds: Sequence[int]) -> None:
        if not len(indices) == len(captions) == len(seeds):
            raise DataError(
                f"{len(indices)} indices, {len(captions)} captions and {len(seeds)} seeds: the lengths must "
                "match."
            )
        duplicates = [index for index in map(int, indices) if index in self._added]
        if duplicates or len(set(indices)) != len(indices):
            raise DataError(
                f"Samples {duplicates or list(indices)} would be stored twice; add only those in missing()."
            )

    def _cells(self, latents: Mapping[Scale, Tensor], scale: Scale, count: int) -> list[bytes]:
        """Check the latents [N, C, (T,) H, W] of a scale and return the bytes of each sample."""
        if scale not in latents:
            raise DataError(f"The latents at {scale} are missing; give every scale of the dataset.")
        tensor = latents[scale].detach().to("cpu", torch.float32)
        if tuple(tensor.shape) != (count, *self.header.shape(scale)):
            raise DataError(
                f"Latents at {scale} have the shape {list(tensor.shape)} instead of "
                f"{[count, *self.header.shape(scale)]}; check the scales and channels given to the writer."
            )
        finite = torch.isfinite(tensor.half()).flatten(1).all(dim=1)
        if not finite.all():
            raise DataError(
                f"The latents at {scale} of {int((~finite).sum())} of {count} samples have NaN, infinity or "
                f"values beyond float16 and cannot be stored in {self.folder}; generate them in a wider "
                f"dtype (model.dtype bfloat16 or float32), or download {self.header.base} again."
            )
        return pack(tensor, self.header.dtype)

    def _write_shard(self, rows: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK_FILE):
            self._refuse_other_writers()
            self._write_shard_locked(rows)
        self._buffer = {column: values[rows:] for column, values in self._buffer.items()}

    def _write_shard_locked(self, rows: int) -> None:
        taken = {shard.file for shard in self.header.shards}
        name = next(n for n in map("shard-{:05d}.arrow".format, range(len(taken) + 1)) if n not in taken)
        table = pa.table({c: pa.array(v[:rows], _arrow_type(c)) for c, v in self._buffer.items()})
        safe = f"The {self.done} rows in finished shards are safe"
        with explain_disk_full(self.folder, table.nbytes, safe):
            write_atomically(self.folder / name, lambda path: _write_arrow(path, table))
            shards = (*self.header.shards, Shard.of(self.folder / name, rows))
            ordered = tuple(sorted(shards, key=lambda shard: shard.file))
            self._commit(replace(self.header, shards=ordered, complete=False))

    def _refuse_other_writers(self) -> None:
        """Raise DataError if the dataset on disk was changed since this writer opened or wrote it."""
        index = self.folder / INDEX_FILE
        on_disk = SetHeader.read(self.folder).shards if index.exists() else ()
        if on_disk != self._shards_on_disk:
            raise DataError(
                f"Another process is writing the dataset {self.folder} too. Stop all but one process, then "
                "run the command again to resume after the finished shards."
            )
        delete_leftovers(self.folder)

    def _commit(self, header: SetHeader) -> None:
        """Write a header to disk, then use it in this writer."""
        header.write(self.folder)
        self.header, self._shards_on_disk = header, header.shards


def sets_fingerprint(sets: Iterable[LatentSet]) -> str:
    """Return one fingerprint of several datasets (the buckets of an image folder) or of a single one."""
    keys = [data.fingerprint for data in sets]
    return keys[0] if len(keys) == 1 else hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


def _column(scale: Scale) -> str:
    return f"latents_{scale}"


def _arrow_type(column: str) -> Any:
    # Large binary has 64-bit offsets: 256 video latents can exceed the 2 GB limit of plain binary.
    return {"index": pa.int64(), "seed": pa.int64(), "caption": pa.string()}.get(column, pa.large_binary())


def _refuse_non_finite(folder: Path, shard: Shard, header: SetHeader) -> None:
    """Raise DataError if the latents of a shard have NaN or infinity."""
    rows = _open_shard(folder, shard).with_format("arrow")
    for scale in header.scales:
        column, shape = rows.select_columns(_column(scale)), header.shape(scale)
        for start in range(0, len(column), 64):
            for cell in column[start : start + 64].column(0):
                if not is_finite(cell.as_buffer(), header.dtype, shape):
                    raise DataError(
                        f"The shard {folder / shard.file} has NaN or infinity in its latents at {scale} and "
                        f"cannot be used for training; {REGENERATE}."
                    )


def _write_arrow(path: Path, table: Any) -> None:
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def _open_shard(folder: Path, shard: Shard) -> Any:
    import datasets

    try:
        rows = datasets.Dataset.from_file(str(folder / shard.file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"The shard {folder / shard.file} cannot be read ({error}); {REGENERATE}.") from error
    if len(rows) != shard.rows:
        damage = f"has {len(rows)} rows instead of {shard.rows}"
        raise DataError(f"The shard {folder / shard.file} {damage}; {REGENERATE}.")
    return rows


def _read_column(rows: Any, name: str) -> Any:
    """Read a whole column of numbers as a numpy array [N]."""
    return rows.with_format("arrow").select_columns(name)[:].column(0).to_numpy()

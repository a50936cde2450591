"""Latents on disk: the teacher's synthetic sets and encoded image folders, every sample at every scale.

A set is a folder of `shard-00000.arrow`, ... and `set.json`, which lists the finished shards. Arrow files are
memory-mapped, so a set may be larger than memory. A row's latents are the raw bytes of a float16 tensor: 32
random rows of 16x128x128 are read in 6 ms on one core, a third of what the Array3D of datasets takes.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from scalewise.common.checkpoint import delete_leftovers, write_atomically
from scalewise.data.header import INDEX_FILE, Kind, SetHeader, difference
from scalewise.data.shards import DataError, Shard, disk_full_explained
from scalewise.method.scales import Scale

LOCK_FILE = ".lock"
"""Held while a shard is written."""
AGAIN = "delete it and run `scalewise generate` (for an image folder: the same command) again; it resumes"


class LatentSet:
    """A set to read from; rows are in the order of their `index`, in whatever order they were made."""

    def __init__(self, folder: Path, header: SetHeader) -> None:
        self.folder, self.header = folder, header
        parts = [_open_shard(folder, shard) for shard in header.shards]
        self._rows = datasets.concatenate_datasets(parts).with_format("arrow")
        self._latents = {scale: self._rows.select_columns(_column(scale)) for scale in header.scales}
        self._order = np.argsort(_read_column(self._rows, "index"), kind="stable")
        self._captions = self._rows.select_columns("caption")
        self._seeds = _read_column(self._rows, "seed")

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> LatentSet:
        """Open a set, checking every shard's size and, unless verify=False, its SHA-256 and its numbers.

        Raises DataError for a missing, empty or damaged set, and for latents that are NaN or infinite; warns
        if the set is not complete.
        """
        folder = Path(path)
        header = SetHeader.read(folder)
        if not header.rows:
            raise DataError(f"The set {folder} is empty; run `scalewise generate` to fill it.")
        for shard in header.shards:
            if fault := shard.fault(folder, content=verify):
                raise DataError(f"The shard {folder / shard.file} {fault}; {AGAIN}.")
        if not header.complete:
            warnings.warn(
                f"The set {folder} is not complete: using the {header.rows} rows there are. "
                "Run the command that makes it again to complete it.",
                stacklevel=2,
            )
        if verify:
            for shard in header.shards:
                _refuse_non_finite(folder, shard, header.scales)
        return cls(folder, header)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def scales(self) -> list[Scale]:
        """The scales at which every sample is there, as written."""
        return list(self.header.scales)

    @property
    def settings(self) -> dict[str, Any]:
        """What the set was made with."""
        return self.header.settings

    @property
    def fingerprint(self) -> str:
        """What the set holds, wherever it lies: changes when any latent, caption, seed or order of rows does.

        It is a hash of the SHA-256 that every shard was written with (which opening has checked), so nothing
        is read for it; the folder's name, the base's name and the settings do not count.
        """
        return self.header.fingerprint

    def require(self, scales: Iterable[Scale]) -> None:
        """Raise DataError for scales that the set has no latents at."""
        if missing := sorted(set(scales) - set(self._latents)):
            raise DataError(
                f"The set {self.folder} has no latents at {', '.join(map(str, missing))}, only at "
                f"{', '.join(map(str, self.scales))}. Make a set for this schedule with `scalewise generate`"
                ", or choose among its scales."
            )

    def latents(self, indices: Sequence[int], scale: Scale) -> Tensor:
        """Latents [N, C, H, W] (video [N, C, T, H, W]) of rows at a scale, float32."""
        self.require([scale])
        cells = self._latents[scale][self._places(indices)].column(0)
        # Through numpy: each buffer is a view of the file, so this stacking is the only copy.
        rows = np.stack([np.frombuffer(cell.as_buffer(), np.float16) for cell in cells])
        return torch.from_numpy(rows).float().reshape(len(rows), *self.header.shape(scale))

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of rows."""
        return list(self._captions[self._places(indices)].column(0).to_pylist())

    def unique_captions(self) -> list[str]:
        """Every caption once, in the order of first use."""
        return list(dict.fromkeys(self.captions(range(len(self)))))

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """Seeds of rows: of the noise that a synthetic sample was made from."""
        return [int(self._seeds[place]) for place in self._places(indices)]

    def _places(self, indices: Sequence[int]) -> list[int]:
        return [int(place) for place in self._order[np.asarray(indices, dtype=np.int64)]]


class LatentSetWriter:
    """Writes a set shard by shard; after a kill, another writer goes on from the finished shards."""

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
    ) -> None:
        """Begin or resume the set at `path`.

        Raises DataError when a set with other settings is there already, or when a shard of it is damaged. A
        finished shard that was deleted is made again: `missing` lists its rows.
        """
        self.folder, self.shard_rows = Path(path), shard_rows
        plain = json.loads(json.dumps(dict(settings)))  # as it will be read back: tuples become lists
        wanted = SetHeader(kind, tuple(dict.fromkeys(scales)), channels, base, plain)
        begun = (self.folder / INDEX_FILE).exists()
        self._seen = SetHeader.read(self.folder).shards if begun else ()
        self.header = self._resume(wanted) if begun else wanted
        parts = [_open_shard(self.folder, shard) for shard in self.header.shards]
        self._have = {int(index) for part in parts for index in _read_column(part, "index")}
        self._waiting: dict[str, list[Any]] = {name: [] for name in self._columns()}

    @property
    def done(self) -> int:
        """Rows in finished shards."""
        return self.header.rows

    def missing(self, total: int) -> list[int]:
        """Which of the indices 0 to total - 1 are in no finished shard and not waiting for one."""
        return [index for index in range(total) if index not in self._have]

    def add(
        self,
        indices: Sequence[int],
        captions: Sequence[str],
        seeds: Sequence[int],
        latents: Mapping[Scale, Tensor],
    ) -> None:
        """Add samples: latents {scale: [N, C, (T,) H, W]} of every scale of the set, stored as float16."""
        self._check(indices, captions, seeds)
        cells = {_column(scale): self._cells(latents, scale, len(indices)) for scale in self.header.scales}
        rows: dict[str, list[Any]] = {
            "index": list(map(int, indices)),
            "caption": list(captions),
            "seed": list(map(int, seeds)),
        }
        columns: dict[str, list[Any]] = {**rows, **cells}
        for name, values in columns.items():
            self._waiting[name].extend(values)
        self._have.update(columns["index"])
        while len(self._waiting["index"]) >= self.shard_rows:
            self._write_shard(self.shard_rows)

    def flush(self) -> None:
        """Write the rows that wait for a full shard as a shard of their own."""
        if self._waiting["index"]:
            self._write_shard(len(self._waiting["index"]))

    def finish(self) -> None:
        """Write what waits and mark the set complete."""
        self.flush()
        if not self.done:
            raise DataError(f"The set {self.folder} would be empty; add samples before finishing it.")
        with FileLock(self.folder / LOCK_FILE):
            self._refuse_other_writers()
            self._commit(replace(self.header, complete=True))

    def _columns(self) -> list[str]:
        return ["index", "caption", "seed", *map(_column, self.header.scales)]

    def _resume(self, wanted: SetHeader) -> SetHeader:
        there = SetHeader.read(self.folder)
        if fault := difference(there, wanted):
            raise DataError(
                f"The set {self.folder} was begun with other settings: {fault}. "
                "Use the old settings to go on with it, or choose another folder."
            )
        kept = []
        for shard in there.shards:
            fault = shard.fault(self.folder)
            if fault == "is missing":
                warnings.warn(f"{shard.file} is missing: its {shard.rows} rows are made again.", stacklevel=3)
            elif fault:
                raise DataError(f"The shard {self.folder / shard.file} {fault}; {AGAIN}.")
            else:
                kept.append(shard)
        return replace(there, shards=tuple(kept), complete=there.complete and len(kept) == len(there.shards))

    def _check(self, indices: Sequence[int], captions: Sequence[str], seeds: Sequence[int]) -> None:
        if not len(indices) == len(captions) == len(seeds):
            raise DataError(
                f"{len(indices)} indices, {len(captions)} captions, {len(seeds)} seeds: give as many."
            )
        again = [index for index in map(int, indices) if index in self._have]
        if again or len(set(indices)) != len(indices):
            raise DataError(f"Samples {again or list(indices)} would be there twice; add those in missing().")

    def _cells(self, latents: Mapping[Scale, Tensor], scale: Scale, count: int) -> list[bytes]:
        """Check the latents of a scale and return each sample's bytes."""
        if scale not in latents:
            raise DataError(f"The latents at {scale} are missing; give every scale of the set.")
        tensor = latents[scale].detach().to("cpu", torch.float16).contiguous()
        if tuple(tensor.shape) != (count, *self.header.shape(scale)):
            raise DataError(
                f"Latents at {scale} have the shape {list(tensor.shape)} instead of "
                f"{[count, *self.header.shape(scale)]}; check the scales and channels given to the writer."
            )
        fine = torch.isfinite(tensor).flatten(1).all(dim=1)
        if not fine.all():
            raise DataError(
                f"Latents at {scale} of {int((~fine).sum())} of {count} samples hold NaN, infinity or values "
                f"beyond float16, which would spoil the set {self.folder}; make them in a wider dtype "
                f"(model.dtype bfloat16 or float32), or fetch {self.header.base} again."
            )
        return [row.tobytes() for row in tensor.numpy()]

    def _write_shard(self, rows: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK_FILE):
            self._refuse_other_writers()
            self._write_shard_alone(rows)
        self._waiting = {column: values[rows:] for column, values in self._waiting.items()}

    def _write_shard_alone(self, rows: int) -> None:
        taken = {shard.file for shard in self.header.shards}
        name = next(n for n in map("shard-{:05d}.arrow".format, range(len(taken) + 1)) if n not in taken)
        table = pa.table({c: pa.array(v[:rows], _arrow_type(c)) for c, v in self._waiting.items()})
        safe = f"The {self.done} rows in finished shards are safe"
        with disk_full_explained(self.folder, table.nbytes, safe):
            write_atomically(self.folder / name, lambda path: _write_arrow(path, table))
            shards = (*self.header.shards, Shard.of(self.folder / name, rows))
            ordered = tuple(sorted(shards, key=lambda shard: shard.file))
            self._commit(replace(self.header, shards=ordered, complete=False))

    def _refuse_other_writers(self) -> None:
        """Raise DataError if the set on the disk is not as this writer left or found it."""
        index = self.folder / INDEX_FILE
        there = SetHeader.read(self.folder).shards if index.exists() else ()
        if there != self._seen:
            raise DataError(
                f"Another process is writing the set {self.folder} too. Stop all but one of them; run again, "
                "the command goes on from the finished shards."
            )
        delete_leftovers(self.folder)

    def _commit(self, header: SetHeader) -> None:
        """Make a header true on the disk, then here."""
        header.write(self.folder)
        self.header, self._seen = header, header.shards


def sets_fingerprint(sets: Iterable[LatentSet]) -> str:
    """What several sets hold (the buckets of an image folder), in their order; of one set, its own."""
    keys = [data.fingerprint for data in sets]
    return keys[0] if len(keys) == 1 else hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


def _column(scale: Scale) -> str:
    return f"latents_{scale}"


def _arrow_type(column: str) -> Any:
    # Large binary has 64-bit offsets: 256 video latents can exceed the 2 GB of the plain kind.
    return {"index": pa.int64(), "seed": pa.int64(), "caption": pa.string()}.get(column, pa.large_binary())


def _refuse_non_finite(folder: Path, shard: Shard, scales: Sequence[Scale]) -> None:
    """Raise DataError for a shard with latents that are NaN or infinite."""
    rows = _open_shard(folder, shard).with_format("arrow")
    for scale in scales:
        column = rows.select_columns(_column(scale))
        for start in range(0, len(column), 64):
            for cell in column[start : start + 64].column(0):
                # A float16 whose five bits of exponent are all set is none; on the bits, since numpy has no
                # quick test of halves.
                if (np.frombuffer(cell.as_buffer(), np.uint16) & 0x7C00 == 0x7C00).any():
                    raise DataError(
                        f"The shard {folder / shard.file} holds NaN or infinity in its latents at {scale}, "
                        f"with which nothing can be trained; {AGAIN}."
                    )


def _write_arrow(path: Path, table: Any) -> None:
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def _open_shard(folder: Path, shard: Shard) -> Any:
    try:
        rows = datasets.Dataset.from_file(str(folder / shard.file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"The shard {folder / shard.file} cannot be read ({error}); {AGAIN}.") from error
    if len(rows) != shard.rows:
        fault = f"has {len(rows)} rows instead of {shard.rows}"
        raise DataError(f"The shard {folder / shard.file} {fault}; {AGAIN}.")
    return rows


def _read_column(rows: Any, name: str) -> Any:
    """A whole column of numbers, as a numpy array."""
    return rows.with_format("arrow").select_columns(name)[:].column(0).to_numpy()

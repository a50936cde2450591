"""The header of a latent dataset, `set.json`: how the dataset was made, and its finished shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalewise.data.shards import DataError, Shard, read_json, write_json
from scalewise.data.storage import STORAGE_TYPES, StorageType
from scalewise.method.scales import Scale

FORMAT, FORMAT_INT8 = 1, 2
"""Datasets in 8 bits have a number of their own, so that versions that only know float16 reject them."""
INDEX_FILE = "set.json"
CONTENTS = "contents"
"""The setting with the fingerprints of the base's components that made the dataset."""
REENCODE, ON_USE = "reencode", "on use"
"""The setting of datasets whose full scale is to be encoded from pixels too. ON_USE: the samples of the
teacher are stored, and encoded on first use, as are those of the smaller scales. True: they were encoded
before they were stored, by a version that stored all scales."""
Kind = Literal["synthetic", "images"]


@dataclass(frozen=True)
class SetHeader:
    """The contents of `set.json`."""

    kind: Kind
    scales: tuple[Scale, ...]
    channels: int
    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    dtype: StorageType = "float16"

    @property
    def full(self) -> Scale:
        """The full scale: the largest that is stored."""
        return max(self.scales, key=lambda scale: scale.cells)

    @property
    def usable(self) -> tuple[Scale, ...]:
        """The scales whose latents are used as they are stored."""
        return () if self.settings.get(REENCODE) == ON_USE else self.scales

    @property
    def rows(self) -> int:
        """Number of rows in finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the data: the channels, the scales and the checksums of the finished shards."""
        hashed = [self.channels, list(map(str, self.scales)), [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:16]

    def was_made_by(self, base: str, contents: Mapping[str, str]) -> bool:
        """Return whether a base with these fingerprints by component (`contents`) made this dataset.

        VAE and scheduler are not compared, because they do not make it another teacher. If the dataset or the
        base has no fingerprints, the base's name is compared instead.
        """
        own: dict[str, str] = self.settings.get(CONTENTS) or {}
        shared = (own.keys() & contents.keys()) - {"vae", "scheduler"}
        return all(own[part] == contents[part] for part in shared) if shared else self.base == base

    def shape(self, scale: Scale) -> tuple[int, ...]:
        """Return the shape of one sample: [C, H, W], or [C, T, H, W] if any scale has more than one frame."""
        return scale.shape(1, self.channels, video=any(s.frames > 1 for s in self.scales))[1:]

    def write(self, folder: Path) -> None:
        """Write `set.json`."""
        number = FORMAT if self.dtype == "float16" else FORMAT_INT8
        fixed = {"format": number, "dtype": self.dtype, "kind": self.kind, "base": self.base}
        lists = {"scales": list(map(str, self.scales)), "shards": [shard.to_json() for shard in self.shards]}
        rest = {"channels": self.channels, "settings": self.settings, "complete": self.complete}
        write_json(folder / INDEX_FILE, fixed | rest | lists)

    @classmethod
    def read(cls, folder: Path) -> SetHeader:
        """Read `set.json`; raises DataError if it is missing or invalid."""
        if not folder.is_dir():
            raise DataError(
                f"There is no dataset {folder}; make one with `scalewise generate`, or correct the path."
            )
        path = folder / INDEX_FILE
        if not path.exists():
            raise DataError(
                f"{folder} is not a dataset: it has no {INDEX_FILE}. Make one with `scalewise generate`."
            )
        raw = read_json(path)
        try:
            dtype = raw.get("dtype", "float16")
            if raw["format"] not in (FORMAT, FORMAT_INT8) or dtype not in STORAGE_TYPES:
                raise DataError(
                    f"{path} has format {raw['format']} with {dtype}, but this version reads formats "
                    f"{FORMAT} and {FORMAT_INT8} with {' or '.join(STORAGE_TYPES)}; use the version of "
                    "scalewise that wrote it."
                )
            lists: dict[str, Any] = {
                "scales": tuple(map(Scale.parse, raw["scales"])),
                "shards": tuple(Shard(**shard) for shard in raw["shards"]),
            }
            plain: dict[str, Any] = {
                name: raw[name] for name in ("kind", "channels", "base", "settings", "complete")
            }
            return cls(**plain, **lists, dtype=dtype)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} is missing or has an invalid field {error}; delete and regenerate {folder}."
            ) from error


def describe_difference(stored: SetHeader, wanted: SetHeader) -> str:
    """Describe the first setting in which a stored dataset differs from the wanted one; "" if none does.

    If both have fingerprints of the base's components (settings.contents), these are compared instead of the
    base's name, so that a dataset can be resumed after the base was moved.
    """
    old_files, new_files = (header.settings.get(CONTENTS) or {} for header in (stored, wanted))
    shared = old_files.keys() & new_files.keys()
    if changed := sorted(part for part in shared if old_files[part] != new_files[part]):
        return f"the files of {' and '.join(changed)} differ between {stored.base} (stored) and {wanted.base}"
    names = ("kind", "channels", "dtype") if shared else ("kind", "base", "channels", "dtype")
    old, new = ({name: getattr(header, name) for name in names} for header in (stored, wanted))
    old["scales"], new["scales"] = (" ".join(map(str, header.scales)) for header in (stored, wanted))
    for name in [n for n in (*wanted.settings, *stored.settings) if n != CONTENTS]:
        key = f"settings.{name}"
        old[key], new[key] = stored.settings.get(name), wanted.settings.get(name)
    for name, value in new.items():
        if old[name] != value:
            return f"{name} is {old[name]!r} in the stored dataset and {value!r} now"
    return ""

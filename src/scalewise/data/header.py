"""What `set.json` says of a set of latents: how it was made, and its finished shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalewise.data.shards import DataError, Shard, read_json, write_json
from scalewise.method.scales import Scale

FORMAT = 1
INDEX_FILE = "set.json"
CONTENTS = "contents"
"""The setting that holds fingerprints of the files that made a set, by component of the base."""
Kind = Literal["synthetic", "images"]


@dataclass(frozen=True)
class SetHeader:
    """What `set.json` holds."""

    kind: Kind
    scales: tuple[Scale, ...]
    channels: int
    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows in finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """What the finished shards hold: a hash of their checksums, and of how latents lie in them."""
        held = [self.channels, list(map(str, self.scales)), [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]

    def is_made_by(self, base: str, contents: Mapping[str, str]) -> bool:
        """Tell whether this set was drawn by a base of that name or, where both are known, of these files.

        `contents`: fingerprints by component. Another autoencoder or scheduler leaves a teacher what it is.
        """
        own: dict[str, str] = self.settings.get(CONTENTS) or {}
        shared = (own.keys() & contents.keys()) - {"vae", "scheduler"}
        return all(own[part] == contents[part] for part in shared) if shared else self.base == base

    def shape(self, scale: Scale) -> tuple[int, ...]:
        """Shape of one sample: [C, H, W], or [C, T, H, W] if any scale of the set has more than one frame."""
        return scale.shape(1, self.channels, video=any(s.frames > 1 for s in self.scales))[1:]

    def write(self, folder: Path) -> None:
        """Write `set.json`."""
        fixed = {"format": FORMAT, "dtype": "float16", "kind": self.kind, "base": self.base}
        lists = {"scales": list(map(str, self.scales)), "shards": [shard.to_json() for shard in self.shards]}
        rest = {"channels": self.channels, "settings": self.settings, "complete": self.complete}
        write_json(folder / INDEX_FILE, fixed | rest | lists)

    @classmethod
    def read(cls, folder: Path) -> SetHeader:
        """Read `set.json`; DataError when it is missing or not one."""
        if not folder.is_dir():
            raise DataError(
                f"There is no set {folder}; make one with `scalewise generate`, or correct the path."
            )
        path = folder / INDEX_FILE
        if not path.exists():
            raise DataError(
                f"{folder} is no set: it has no {INDEX_FILE}. Make one with `scalewise generate`."
            )
        raw = read_json(path)
        try:
            if raw["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {raw['format']}, not {FORMAT}; use the version of its writer."
                )
            lists: dict[str, Any] = {
                "scales": tuple(map(Scale.parse, raw["scales"])),
                "shards": tuple(Shard(**shard) for shard in raw["shards"]),
            }
            plain: dict[str, Any] = {
                name: raw[name] for name in ("kind", "channels", "base", "settings", "complete")
            }
            return cls(**plain, **lists)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} lacks or misplaces {error}; delete {folder} and make it anew."
            ) from error


def difference(there: SetHeader, wanted: SetHeader) -> str:
    """Name the first setting in which a set differs from the one wanted, or return nothing.

    Where both say what files made them (settings.contents, by component), those decide and not the base's
    name, so that a set goes on with a base that was moved.
    """
    old_files, new_files = (header.settings.get(CONTENTS) or {} for header in (there, wanted))
    shared = old_files.keys() & new_files.keys()
    if changed := sorted(part for part in shared if old_files[part] != new_files[part]):
        return (
            f"the {' and the '.join(changed)} of {there.base} there and {wanted.base} here have other files"
        )
    names = ("kind", "channels") if shared else ("kind", "base", "channels")
    old, new = ({name: getattr(header, name) for name in names} for header in (there, wanted))
    old["scales"], new["scales"] = (" ".join(map(str, header.scales)) for header in (there, wanted))
    for name in [n for n in (*wanted.settings, *there.settings) if n != CONTENTS]:
        old[f"settings.{name}"], new[f"settings.{name}"] = there.settings.get(name), wanted.settings.get(name)
    for name, value in new.items():
        if old[name] != value:
            return f"{name} is {old[name]!r} there and {value!r} here"
    return ""

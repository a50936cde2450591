"""What files hold, as short names: the same model or set is known again wherever it lies, another is not."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = ".safetensors"
READ = {WEIGHTS, ".json", ".txt", ".model", ".jinja"}
"""Suffixes that loading reads: weights, configurations, vocabularies (SentencePiece's is .model)."""
WHOLE = 64 * 2**20
"""Files of other kinds up to this many bytes are read whole; the largest vocabularies have half of it."""
SAMPLE = 64
"""Bytes read of a tensor at its beginning, its middle and its end."""


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of what decides it, without reading all of a large one.

    A .safetensors file counts by its whole header (names, types, shapes, metadata) and, of every tensor, the
    first, middle and last 64 bytes: training, merging, quantizing or exchanging any tensor shows, a value
    changed by hand deep inside one does not. Any other file counts whole up to 64 MiB, and beyond that by a
    third of that at its beginning, middle and end. Neither its name nor its times count.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        for start, length in _pieces(path, size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def files_fingerprint(root: Path, files: Iterable[Path]) -> str:
    """One name of several files under `root`: their names relative to it, and `file_fingerprint` of each."""
    named = sorted((path.relative_to(root).as_posix(), file_fingerprint(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def base_contents(base: str | Path, *, variant: str | None = None) -> dict[str, str]:
    """Fingerprint of every component of a model, such as {"transformer": "3f...", "vae": "9c...", ...}.

    `base` is a folder in diffusers' layout, one component's folder (it has a config.json; its key is ""), or
    a hub id, of which the downloaded files count: a component that was not downloaded is left out, and so is
    all of a model that was not. Counted is what loading reads, files of `READ` in a component's folder; of
    weights the `variant`'s, or without one the plain ones if there are any. A component that lies
    elsewhere under the same files has the same fingerprint; compare components that both sides have.
    """
    root = local_folder(base)
    if root is None:
        return {}
    if (root / "config.json").exists() and not (root / "model_index.json").exists():
        return {"": files_fingerprint(root, _read_files(root, variant))}
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._"):
        if files := _read_files(folder, variant):
            found[folder.name] = files_fingerprint(folder, files)
    return found


def model_contents(
    base: str | Path, vae: str | Path | None = None, *, variant: str | None = None
) -> dict[str, str]:
    """`base_contents` with the files of another autoencoder, `vae` (its folder or a base), for its own."""
    own = base_contents(base, variant=variant)
    if vae is None:
        return own
    other = base_contents(vae)
    return own | {"vae": other[""] if "" in other else other.get("vae", "")}


def part_fingerprint(base: str | Path, *prefixes: str, variant: str | None = None) -> str:
    """One fingerprint of the components whose names begin with one of the prefixes, "" if there are none.

    `part_fingerprint(base, "text_encoder", "tokenizer")` changes when, and only when, the text side's
    files do.
    """
    contents = base_contents(base, variant=variant)
    chosen = {name: key for name, key in contents.items() if name.startswith(prefixes)}
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16] if chosen else ""


def local_folder(base: str | Path) -> Path | None:
    """The folder of a model: itself, or where the hub's cache keeps a hub id's files; None if it has none."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(base), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _read_files(folder: Path, variant: str | None) -> list[Path]:
    """Files of a component that loading reads."""
    files = [p for p in folder.iterdir() if p.suffix in READ and p.name[0] != "." and p.is_file()]
    weights = [p for p in files if p.suffix == WEIGHTS]
    own, plain = ([p for p in weights if variant_of_file(p.name) == v] for v in (variant, None))
    wanted = own or plain or weights
    # Which shards of weights there are, their own headers tell; an index may be another variant's.
    others = [p for p in files if p.suffix != WEIGHTS and not p.name.endswith(".index.json")]
    return wanted + others


def variant_of_file(name: str) -> str | None:
    """The variant in a name such as model.fp16.safetensors or model.fp16-00001-of-00002.safetensors."""
    _, dot, rest = name.removesuffix(WEIGHTS).partition(".")
    return rest.partition("-")[0] if dot else None


def _pieces(path: Path, size: int) -> list[tuple[int, int]]:
    """Where to read: (start, length) in bytes, in rising order."""
    if path.suffix == WEIGHTS and (pieces := _tensor_pieces(path, size)):
        return pieces
    if size <= WHOLE:
        return [(0, size)]
    return _three(0, size, WHOLE // 3)


def _tensor_pieces(path: Path, size: int) -> list[tuple[int, int]]:
    """The header and three places of every tensor; nothing if this is no safetensors file."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
            return []
        try:
            header = json.loads(file.read(length))
            spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
    data = 8 + length
    return [(0, data), *(piece for a, b in spans for piece in _three(data + a, data + b, SAMPLE))]


def _three(start: int, end: int, length: int) -> list[tuple[int, int]]:
    """Beginning, middle and end of a span; all of it if it is short."""
    if end - start <= 3 * length:
        return [(start, end - start)]
    return [(place, length) for place in (start, (start + end - length) // 2, end - length)]

"""Fingerprints of file contents, which identify a model or dataset independently of its path."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = ".safetensors"
LOADED_SUFFIXES = {WEIGHTS, ".json", ".txt", ".model", ".jinja"}
"""Suffixes of files that loading reads: weights, configurations, vocabularies (.model is SentencePiece's)."""
WHOLE_FILE_BYTES = 64 * 2**20
"""Files without tensors are read whole up to this size; the largest vocabularies have half of it."""
SAMPLE_BYTES = 64
"""Bytes read at the beginning, the middle and the end of each tensor."""


def file_fingerprint(path: Path) -> str:
    """Compute the SHA-256 of a file's size and contents, reading only a sample of large files.

    For a .safetensors file that is the whole header (names, types, shapes, metadata) and the first, middle
    and last 64 bytes of every tensor: training, merging, quantizing or replacing any tensor changes the
    fingerprint; editing a single value inside one may not. Other files are read whole up to 64 MiB; of larger
    ones, a third of that is read at the beginning, the middle and the end. The file's name and times are not
    included.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        for start, length in _pieces(path, size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def files_fingerprint(root: Path, files: Iterable[Path]) -> str:
    """Compute one fingerprint of several files from their paths relative to `root` and their contents."""
    named = sorted((path.relative_to(root).as_posix(), file_fingerprint(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def component_fingerprints(base: str | Path, *, variant: str | None = None) -> dict[str, str]:
    """Fingerprint every component of a model, such as {"transformer": "3f...", "vae": "9c...", ...}.

    `base` is a folder in diffusers' layout, the folder of one component (it has a config.json; its key is
    ""), or a hub id. For a hub id only downloaded components are included, so the result may be empty. A
    component's fingerprint covers the files that loading reads: those with `LOADED_SUFFIXES`, and of the
    weights only the `variant`'s or, without one, the plain ones if there are any. It does not depend on the
    path. Compare two models by the components that both have.
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


def model_fingerprints(
    base: str | Path, vae: str | Path | None = None, *, variant: str | None = None
) -> dict[str, str]:
    """Return `component_fingerprints` of a base with another VAE (`vae`: its folder, or a base with one)."""
    own = component_fingerprints(base, variant=variant)
    if vae is None:
        return own
    other = component_fingerprints(vae)
    return own | {"vae": other[""] if "" in other else other.get("vae", "")}


def part_fingerprint(base: str | Path, *prefixes: str, variant: str | None = None) -> str:
    """Compute one fingerprint of all components whose names begin with one of the prefixes; "" if none do.

    `part_fingerprint(base, "text_encoder", "tokenizer")` changes if and only if a file of the text encoders
    or tokenizers does.
    """
    contents = component_fingerprints(base, variant=variant)
    chosen = {name: key for name, key in contents.items() if name.startswith(prefixes)}
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16] if chosen else ""


def local_folder(base: str | Path) -> Path | None:
    """Return a model's folder, for a hub id the one in the hub's cache; None if it was not downloaded."""
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
    """Return the files of a component that loading reads."""
    files = [p for p in folder.iterdir() if p.suffix in LOADED_SUFFIXES and p.name[0] != "." and p.is_file()]
    weights = [p for p in files if p.suffix == WEIGHTS]
    own, plain = ([p for p in weights if variant_of_file(p.name) == v] for v in (variant, None))
    wanted = own or plain or weights
    # The index of sharded weights is left out: it may belong to another variant, and the shards have headers.
    others = [p for p in files if p.suffix != WEIGHTS and not p.name.endswith(".index.json")]
    return wanted + others


def variant_of_file(name: str) -> str | None:
    """Return the variant in a name like model.fp16.safetensors or model.fp16-00001-of-00002.safetensors."""
    _, dot, rest = name.removesuffix(WEIGHTS).partition(".")
    return rest.partition("-")[0] if dot else None


def _pieces(path: Path, size: int) -> list[tuple[int, int]]:
    """Return the spans to read as (start, length) in bytes, in ascending order."""
    if path.suffix == WEIGHTS and (pieces := _tensor_pieces(path, size)):
        return pieces
    if size <= WHOLE_FILE_BYTES:
        return [(0, size)]
    return _sample_span(0, size, WHOLE_FILE_BYTES // 3)


def _tensor_pieces(path: Path, size: int) -> list[tuple[int, int]]:
    """Return the spans of the header and three samples per tensor; none if it is not a safetensors file."""
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
    return [(0, data), *(piece for a, b in spans for piece in _sample_span(data + a, data + b, SAMPLE_BYTES))]


def _sample_span(start: int, end: int, length: int) -> list[tuple[int, int]]:
    """Return the beginning, the middle and the end of a span, or all of it if it is short."""
    if end - start <= 3 * length:
        return [(start, end - start)]
    return [(offset, length) for offset in (start, (start + end - length) // 2, end - length)]

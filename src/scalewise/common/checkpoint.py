"""Checkpoints as plain data: nested state dicts saved atomically as safetensors and JSON, never pickle.

A checkpoint is a folder with four files: `tensors.safetensors`; `state.json`, the nested structure that
refers to tensors by name; `meta.json`; and `manifest.json`, which is written last and holds the size and
SHA-256 of the other three. A folder without a manifest is an interrupted save. All files are written into a
hidden temporary folder, which is then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
TENSORS, STATE, META, MANIFEST = "tensors.safetensors", "state.json", "meta.json", "manifest.json"
RESUME_EARLIER = "Delete it and resume from an earlier one."


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


def save(folder: Path, state: dict[str, object], *, meta: dict[str, Any]) -> None:
    """Write state and meta as the checkpoint `folder`, replacing an existing one only when complete.

    `state` nests dicts (keys of any plain type), lists, tuples, tensors of any shape, numbers, strings, bools
    and None. `load` restores all of it exactly, except devices, requires_grad and memory shared between
    tensors. `meta` is any JSON value.

    Raises CheckpointError for other types, and if the files cannot be written; existing checkpoints are then
    unchanged.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    documents = {STATE: {"format": FORMAT, "state": _encode(state, "", tensors)}, META: meta}
    texts = {name: json.dumps(value, indent=1) for name, value in documents.items()}
    temporary = _temporary(folder)
    _restore(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        _write(temporary, texts, tensors)
        _swap_in(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            needed = sum(map(len, texts.values())) + sum(t.nbytes for t in tensors.values())
            free = shutil.disk_usage(folder.parent).free
            raise CheckpointError(
                f"The disk is full: the checkpoint {folder} needs {needed:,} bytes and {free:,} are free. It "
                "was not saved and earlier checkpoints are unchanged; free space or keep fewer checkpoints, "
                "then resume."
            ) from error
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"The checkpoint {folder} cannot be written ({error}). It was not saved and earlier "
                "checkpoints are unchanged; check the disk, then resume."
            ) from error
        raise


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint as (state, meta), tensors on the CPU, after checking every file's size and SHA-256.

    Raises CheckpointError if the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    verify(folder)
    tensors = load_file(folder / TENSORS)
    skeleton = json.loads((folder / STATE).read_text(encoding="utf-8"))["state"]
    return _decode(skeleton, tensors), json.loads((folder / META).read_text(encoding="utf-8"))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the meta of a checkpoint, after checking that its files have their recorded sizes."""
    folder = Path(folder)
    verify(folder, content=False)
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta


def verify(folder: Path, *, content: bool = True) -> None:
    """Raise CheckpointError unless all files are as they were written; content=False skips the SHA-256."""
    folder = Path(folder)
    _restore(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint {folder}; give the folder of a complete one, such as step-000100."
        )
    for name, expected in _read_manifest(folder).items():
        checksum = expected.get("sha256", "") if content else None
        if damage := describe_damage(folder / name, size=expected.get("bytes", -1), checksum=checksum):
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} {damage}. {RESUME_EARLIER}")


def latest(root: Path, *, prefix: str = "step-") -> Path | None:
    """Return the undamaged checkpoint with the highest step in `root`, or None; warn about those it skips."""
    for folder in _by_step(Path(root), prefix):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"Skipping a checkpoint. {error}", stacklevel=2)
        else:
            return folder
    return None


def newest(root: Path, *, prefix: str = "step-") -> Path | None:
    """Return the checkpoint with the highest step in `root` whose files have the right sizes, or None.

    Unlike `latest`, it does not read the files to verify their SHA-256.
    """
    return next((folder for folder in _by_step(Path(root), prefix) if _looks_complete(folder)), None)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, complete or not."""
    names = (MANIFEST, TENSORS, STATE)
    return folder.is_dir() and any((folder / name).exists() for name in names)


def prune(root: Path, keep: int, *, prefix: str = "step-") -> None:
    """Delete all but the newest `keep` complete checkpoints, and the temporary files of killed saves.

    Damaged checkpoints do not count as kept. Those newer than the oldest kept one remain for inspection.
    """
    if keep < 1:
        raise CheckpointError(f"The number of checkpoints to keep must be at least 1; got {keep}.")
    kept = 0
    for folder in _by_step(Path(root), prefix):
        if kept < keep:
            kept += _looks_complete(folder)
        else:
            # Renamed first, so that an interrupted deletion leaves nothing that looks like a checkpoint.
            shutil.rmtree(_temporary(folder), ignore_errors=True)
            os.replace(folder, _temporary(folder))
    for leftover in Path(root).glob(f".{prefix}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


# --- Atomic writes of single files; the data formats use these too ---


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, flush the file to disk and rename it to `path`.

    Every call uses a different temporary name, so processes that write the same file do not disturb each
    other: the last one to finish wins. A killed call leaves its temporary file; see `delete_leftovers`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def delete_leftovers(folder: Path, *, pattern: str = "*") -> None:
    """Delete temporary files of killed `write_atomically` calls; no other process may be writing to `folder`.

    `pattern` is a glob for the names of the final files.
    """
    for leftover in folder.glob(f".{pattern}.tmp"):
        leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_damage(path: Path, *, size: int, checksum: str | None) -> str:
    """Describe how a file differs from its recorded size in bytes and SHA-256; "" if it does not.

    With checksum=None only the size is compared.
    """
    if not path.exists():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size:,} bytes instead of {size:,}"
    if checksum is not None and sha256(path) != checksum:
        return "does not have the checksum it was written with"
    return ""


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk or the quota is full."""
    if isinstance(error, SafetensorError):  # written in Rust: the error number is only in the text
        return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and orders renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


# --- Writing and replacing a folder ---


def _write(folder: Path, texts: dict[str, str], tensors: dict[str, Tensor]) -> None:
    _unshare(tensors)
    save_file(tensors, folder / TENSORS)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = {}
    for name in (TENSORS, *texts):
        _sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
    write_atomically(folder / MANIFEST, lambda path: path.write_text(manifest, encoding="utf-8"))


def _swap_in(temporary: Path, folder: Path) -> None:
    """Rename a finished temporary folder to `folder`; an existing `folder` is renamed first, then deleted."""
    try:
        if folder.exists():
            os.replace(folder, _replaced(folder))
        os.replace(temporary, folder)
        _sync(folder.parent)
    finally:
        _restore(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    """Finish an interrupted replacement: keep the new checkpoint if it is in place, else the old one."""
    old = _replaced(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):  # another process restored it first
            os.replace(old, folder)


# --- Finding and checking ---


def _by_step(root: Path, prefix: str) -> list[Path]:
    """Return the folders named prefix + number, highest number first."""
    for old in root.glob(f".{prefix}*.old"):
        _restore(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    steps = {p: int(m[1]) for p in root.glob(f"{prefix}*") if (m := pattern.fullmatch(p.name)) and p.is_dir()}
    return sorted(steps, key=lambda p: steps[p], reverse=True)


def _looks_complete(folder: Path) -> bool:
    try:
        verify(folder, content=False)
    except CheckpointError:
        return False
    return True


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"The checkpoint {folder} is incomplete: it has no {MANIFEST}. {RESUME_EARLIER}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {name: dict(manifest["files"][name]) for name in (TENSORS, STATE, META)}
        written_as = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {MANIFEST} is not a valid manifest. {RESUME_EARLIER}"
        ) from error
    if written_as != FORMAT:
        raise CheckpointError(
            f"The checkpoint {folder} has format {written_as}, but this version reads format {FORMAT}; use "
            "the version of scalewise that wrote it."
        )
    return files


# --- Nested state <-> JSON structure and flat tensors ---


def _encode(value: object, path: str, tensors: dict[str, Tensor]) -> Any:
    """Convert nested state to JSON; other types become a dict with one tag, tensors go into `tensors`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):  # finite floats survive JSON exactly
        return value if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"tensor": _store(value, path, tensors)}
    if isinstance(value, dict):
        inner = {key: _encode(item, _join(path, key), tensors) for key, item in value.items()}
        if all(type(key) is str for key in inner):
            return {"dict": inner}
        return {"items": [[_encode(key, path, tensors), item] for key, item in inner.items()]}
    if isinstance(value, list | tuple):
        items = _encode_all(value, path, tensors)
        return items if isinstance(value, list) else {"tuple": items}
    raise CheckpointError(
        f"Cannot save {path or 'the state'}: a {type(value).__name__} is neither a tensor nor plain data; "
        "convert it to tensors, numbers, strings, lists or dicts first."
    )


def _encode_all(values: Sequence[object], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [_encode(item, _join(path, i), tensors) for i, item in enumerate(values)]


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _store(value: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Add a tensor, contiguous and on the CPU, to `tensors` under a unique name; return the name."""
    if value.is_sparse or value.is_meta or value.is_quantized:
        raise CheckpointError(
            f"Cannot save {path}: only dense tensors with values can be saved; convert it first."
        )
    name, copies = path or "tensor", 1
    while name in tensors:  # the path "a/b" may be one key or two nested ones
        name, copies = f"{path}#{copies}", copies + 1
    tensors[name] = value.detach().cpu().contiguous()
    return name


def _unshare(tensors: dict[str, Tensor]) -> None:
    """Copy tensors that share memory with another one, which safetensors refuses to write."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "float":
        return float(content)
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "dict":
        return {key: _decode(item, tensors) for key, item in content.items()}
    return {_decode(key, tensors): _decode(item, tensors) for key, item in content}

"""Metrics that need a model of their own: asked for by name, loaded only then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scalewise.common.errors import first_line
from scalewise.common.paths import expand_home
from scalewise.metrics.base import Examiner, Metric

Device = torch.device | str


@dataclass(frozen=True)
class Extra:
    """A way to judge that `--metric NAME` or `--metric NAME=SOURCE` asks for."""

    name: str
    metrics: tuple[Metric, ...]
    """The figures it gives."""
    load: Callable[[str, Device], Examiner]
    """(hub id or local folder or file, device) -> the model."""
    source: str | None = ""
    """The hub id that is loaded unless another source is named; "" when one has to be named, None when there
    is nothing to load."""
    videos: bool = False
    """Looks at whole videos; others are shown a video's middle frame."""
    real: bool = False
    """Holds the pictures against real ones: needs a reference."""
    frechet: bool = False
    """Fits a covariance to its features, which takes more pictures than features."""
    protocol: str = ""
    """How images are prepared, where that once changed: kept statistics of another protocol are not used."""
    check: Callable[[Sequence[str]], None] | None = None
    """Refuses captions that it cannot judge, before anything is drawn for them."""


def parse_metric(text: str, known: Mapping[str, Extra]) -> tuple[Extra, str]:
    """Read NAME or NAME=SOURCE; returns the metric and where its weights are."""
    name, _, source = text.partition("=")
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(known)}.")
    if known[name].source is None:
        if source:
            raise ValueError(f"The metric {name} has no weights; write it without {'=' + source!r}.")
        return known[name], ""
    if not (source or known[name].source):
        raise ValueError(
            f"The metric {name} has no weights of its own; name a hub id or folder, as in {name}=SOURCE."
        )
    return known[name], expand_home(source) or known[name].source or ""


@contextmanager
def loading(what: str, source: str) -> Iterator[None]:
    """Turn what goes wrong while weights are found and read into one sentence with the remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = "this folder" if Path(source).exists() else "no folder here, and the hub"
        raise ValueError(
            f"Cannot load {what} from {source!r} ({where}: {first_line(error)}). Give a folder that holds it "
            "in transformers' layout with safetensors, or a hub id and a connection."
        ) from error


def image_processor(source: str | Path) -> Any:
    """Load the image processor of a model; it resizes by PIL whatever is installed, so machines agree."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, backend="pil")


def pretrained(kind: Any, source: str | Path) -> tuple[Any, set[str]]:
    """Load a class of transformers in float32; returns the model and the names of weights its files lack."""
    model, found = kind.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model, set(found["missing_keys"])


def refuse_missing(source: str | Path, model: nn.Module, missing: Collection[str]) -> None:
    """Raise ValueError if weights are missing, which would stay random."""
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, for example {min(missing)}; "
            "name a complete model."
        )


def read_weights(file: Path, *, remedy: str = "copy it again") -> dict[str, Tensor]:
    """Read a safetensors file; raises ValueError with the remedy for a damaged one."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Cannot read {file} ({first_line(error)}); {remedy}.") from error


def check_weights(what: str, source: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError that counts what is missing, not known or of another shape among weights found."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    odd = sorted(name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape)
    problems = [
        f"{len(names)} {problem} ({names[0]}{', ...' if names[1:] else ''})"
        for names, problem in ((missing, "missing"), (unknown, "unknown"), (odd, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not hold the {len(wanted)} weights of {what}: {', '.join(problems)}; "
            "give the published weights, and a config.json only where their sizes differ."
        )


def below(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one part of a model, by their names within it."""
    return {
        name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")
    }


@contextmanager
def needing(what: str, remedy: str) -> Iterator[None]:
    """Turn a package that is not installed into one sentence with the remedy."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs a package that is not installed ({first_line(error)}): {remedy}"
        ) from error


def find_file(source: str, name: str) -> Path:
    """A file of a folder, or of a repository on the hub."""
    if Path(source).exists():
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, name))


def stamp(source: str) -> list[tuple[str, int, int]]:
    """What tells a local source, or several joined by commas, from a changed one; a hub id is itself."""
    found = []
    for part in source.split(",") if source else ():
        path = Path(part)
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            size, changed = (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (0, 0)
            found.append((str(file.resolve()) if file.exists() else part, size, changed))
    return found


def in_chunks(
    images: np.ndarray, captions: Sequence[str], size: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Parts of at most `size` images with their captions, in order."""
    for start in range(0, len(images), size):
        yield images[start : start + size], list(captions[start : start + size])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all chunks, float32 on the CPU."""
    return torch.cat([part.float().cpu() for part in parts])

"""Optional metrics with their own model, which is loaded only if the metric is requested; loading of
weights.
"""

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
from scalewise.metrics.base import FeatureExtractor, Metric

Device = torch.device | str


@dataclass(frozen=True)
class Extra:
    """Optional metrics from one feature extractor, selected by `--metric NAME` or `--metric NAME=SOURCE`."""

    name: str
    metrics: tuple[Metric, ...]
    """The metrics computed from its outputs."""
    load: Callable[[str, Device], FeatureExtractor]
    """(hub id, local folder or file; device) -> feature extractor."""
    source: str | None = ""
    """Default hub id; "" if the user must name a source, None if there are no weights to load."""
    videos: bool = False
    """Whether it needs whole videos; others get the middle frame."""
    real: bool = False
    """Whether it compares with real images, so a reference is required."""
    frechet: bool = False
    """Whether it estimates a covariance, which needs more images than features."""
    protocol: str = ""
    """Preprocessing, if it changed between versions; cached statistics of another protocol are not used."""
    check: Callable[[Sequence[str]], None] | None = None
    """Raises ValueError for captions that the metric does not support, before images are generated."""


def parse_metric(text: str, known: Mapping[str, Extra]) -> tuple[Extra, str]:
    """Parse NAME or NAME=SOURCE; return the metric and the source of its weights."""
    name, _, source = text.partition("=")
    if name not in known:
        raise ValueError(f"Unknown metric {name!r}; use one of {', '.join(known)}.")
    if known[name].source is None:
        if source:
            raise ValueError(f"The metric {name} has no weights to choose; remove {'=' + source!r}.")
        return known[name], ""
    if not (source or known[name].source):
        raise ValueError(f"The metric {name} has no default weights; add a hub id or folder: {name}=SOURCE.")
    return known[name], expand_home(source) or known[name].source or ""


@contextmanager
def explain_load_errors(what: str, source: str) -> Iterator[None]:
    """Convert errors while loading weights into a ValueError with a remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = "local folder" if Path(source).exists() else "not a local folder; from the hub"
        raise ValueError(
            f"Cannot load {what} from {source!r} ({where}: {first_line(error)}). Use a folder in "
            "transformers' "
            "layout with safetensors, or a hub id with an internet connection."
        ) from error


def load_image_processor(source: str | Path) -> Any:
    """Load a model's image processor with the PIL backend, so results do not depend on installed packages."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, backend="pil")


def load_pretrained(kind: Any, source: str | Path) -> tuple[Any, set[str]]:
    """Load a transformers class in float32; return the model and the names of weights missing in its
    files.
    """
    model, info = kind.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model, set(info["missing_keys"])


def check_no_weights_missing(source: str | Path, model: nn.Module, missing: Collection[str]) -> None:
    """Raise ValueError if weights are missing, because they would stay random."""
    if missing:
        raise ValueError(
            f"{source} is missing {len(missing)} weights of {type(model).__name__}, for example "
            f"{min(missing)}; "
            "use a complete model."
        )


def read_weights(file: Path, *, remedy: str = "copy it again") -> dict[str, Tensor]:
    """Read a safetensors file; raise ValueError with the remedy if it is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Cannot read {file} ({first_line(error)}); {remedy}.") from error


def check_weights(what: str, source: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError if weights are missing, unknown or have a wrong shape; `wanted` has the right ones."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    mismatched = sorted(
        name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape
    )
    problems = [
        f"{len(names)} {problem} ({names[0]}{', ...' if names[1:] else ''})"
        for names, problem in ((missing, "missing"), (unknown, "unknown"), (mismatched, "with a wrong shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not match the {len(wanted)} weights of {what}: {', '.join(problems)}; use the "
            "published weights, and a config.json only for other model sizes."
        )


def select_part(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one submodule, by their names within it."""
    return {
        name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")
    }


@contextmanager
def require_package(what: str, remedy: str) -> Iterator[None]:
    """Convert an ImportError into a ValueError with a remedy."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs a package that is not installed ({first_line(error)}): {remedy}"
        ) from error


def find_file(source: str, name: str) -> Path:
    """Return the path of a file in a local folder or, downloaded, in a hub repository."""
    if Path(source).exists():
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, name))


def source_stamps(source: str) -> list[tuple[str, int, int]]:
    """Return (path, size, mtime) of all files of a local source, or of several join_chunks by commas.

    It identifies cached statistics. A hub id is returned as its name with zeros.
    """
    stamps = []
    for part in source.split(",") if source else ():
        path = Path(part)
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            size, changed = (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (0, 0)
            stamps.append((str(file.resolve()) if file.exists() else part, size, changed))
    return stamps


def split_chunks(
    images: np.ndarray, captions: Sequence[str], size: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield chunks [<= size, ...] of images [N, ...] with their captions, in order."""
    for start in range(0, len(images), size):
        yield images[start : start + size], list(captions[start : start + size])


def join_chunks(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate outputs of chunks [n, ...] to [N, ...], float32 on the CPU."""
    return torch.cat([part.float().cpu() for part in parts])

"""Scale-wise distillation of diffusion models: few-step students that start small and grow at every step."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("scalewise-diffusion")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # on demand: the command line must not wait for diffusers to be imported
        from scalewise.pipelines import load

        return load
    raise AttributeError(f"module 'scalewise' has no attribute {name!r}")

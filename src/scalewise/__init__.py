"""Scale-wise distillation of diffusion models: few-step students that start small and grow at every step."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("scalewise-diffusion")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

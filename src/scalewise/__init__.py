"""Scale-wise distillation of diffusion models: few-step students that start small and grow at every step."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalewise.api import distill
    from scalewise.config.presets import find_recipe
    from scalewise.config.recipe import Recipe
    from scalewise.method.scales import ScaleSchedule
    from scalewise.models.lora import load_student
    from scalewise.pipelines import load

try:
    __version__ = version("scalewise-diffusion")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Recipe", "ScaleSchedule", "__version__", "distill", "find_recipe", "load", "load_student"]

# Imported on demand: the command line must not wait for diffusers to be imported.
_WHERE = {
    "Recipe": "config.recipe",
    "ScaleSchedule": "method.scales",
    "distill": "api",
    "find_recipe": "config.presets",
    "load": "pipelines",
    "load_student": "models.lora",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'scalewise' has no attribute {name!r}")
    from scalewise.common.optional import quiet_imports

    with quiet_imports():
        found = getattr(import_module(f"scalewise.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__

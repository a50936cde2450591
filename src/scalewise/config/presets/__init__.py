"""Named recipes: functions that return a recipe, found by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scalewise.common.paths import expand_home
from scalewise.config.overrides import nearest
from scalewise.config.presets import mini
from scalewise.config.presets.published import PUBLISHED
from scalewise.config.recipe import Recipe, RecipeError

RECIPES: dict[str, Callable[[], Recipe]] = {
    "mini": mini.full,
    "mini-paper": mini.paper,
    "mini-mmd": mini.mmd_only,
    "mini-full-scale": mini.full_scale,
    "mini-full-scale-2": mini.full_scale_two,
    "mini-demo": mini.demo,
    **PUBLISHED,
}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name or from a YAML file; RecipeError if there is none."""
    if name in RECIPES:
        return RECIPES[name]()
    name = expand_home(name)
    if name.endswith((".yaml", ".yml")):
        if not Path(name).exists():
            raise RecipeError(f"Recipe file {name} not found.")
        return Recipe.from_yaml(Path(name))
    raise RecipeError(
        f"Unknown recipe {name!r}; {nearest(name, list(RECIPES))} `scalewise recipes` lists them all."
    )

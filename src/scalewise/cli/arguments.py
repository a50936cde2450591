"""Arguments that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from scalewise.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (see `scalewise recipes`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides such as train.iterations=200 loss.dmd.weight=0.")
]


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe that a command was given."""
    from scalewise.recipes import find_recipe

    return find_recipe(name).override(overrides or [])

"""Arguments that several commands share."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from scalewise.common.paths import expand_home

if TYPE_CHECKING:
    from scalewise.config.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (see `scalewise recipes`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides such as train.iterations=200 loss.dmd.weight=0.")
]


OldOverrides = Annotated[
    list[str] | None, typer.Option("--set", hidden=True, help="Deprecated: write key=value by itself.")
]


class HomeCommand(typer.core.TyperCommand):
    """A command that reads "~" in all its paths and names of models, for `--out=~/x` reaches it unexpanded,
    and refuses numbers that are not finite.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Lists are left: prompts stay as typed, and what holds a path is read elsewhere."""
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name} {value} is no finite number; give one that is.")
        ctx.params = {
            name: type(value)(expand_home(str(value)))
            if isinstance(value, str | Path) and name != "prompt"
            else value
            for name, value in ctx.params.items()
        }
        return super().invoke(ctx)


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe that a command was given."""
    from scalewise.config.presets import find_recipe

    return find_recipe(name).override(overrides or [])


def split_overrides(words: list[str], old: list[str] | None) -> tuple[list[str], list[str]]:
    """Divide the words behind a recipe into samplers to compare and overrides, those given with --set last.

    A word is an override if its part before "=" is a key of recipes, or looks like one (it has a dot) and no
    sampler stands behind the "=": labels of samplers have the same form, as in "first=student:runs/a".
    """
    from scalewise.config.overrides import field_names
    from scalewise.config.recipe import Recipe
    from scalewise.evaluation.samplers import is_contender

    if old:
        warnings.warn("--set is deprecated; write key=value by itself, as for `distill`.", stacklevel=2)
    known = {name for name in field_names(Recipe) if "." in name}
    overrides = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign and (key.strip() in known or ("." in key and ":" not in key and not is_contender(value))):
            overrides.append(word)
    return [word for word in words if word not in overrides], [*overrides, *(old or ())]


def model_overrides(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Divide prompts and overrides of a recipe's `model`; a prompt with an "=" has no key before it."""
    from scalewise.config.recipe import Recipe

    overrides = []
    for word in words:
        key, sign, _ = word.partition("=")
        group, dot, name = key.strip().partition(".")
        if not (sign and dot and name.replace("_", "").replace(".", "").isalpha()):
            continue
        if group in Recipe.model_fields and group != "model":
            raise typer.BadParameter(
                f"{word!r}: a student draws as it was trained; `sample` takes overrides of model alone, such "
                "as model.offload=components."
            )
        if group == "model":
            overrides.append(word)
    texts = [word for word in words if word not in overrides]
    if not texts:
        raise typer.BadParameter("There is no prompt among the words given; write what to draw.")
    return texts, tuple(overrides)

"""Arguments shared by several commands."""

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
    list[str] | None,
    typer.Argument(help="Overrides of recipe keys, such as train.iterations=200 loss.dmd.weight=0."),
]


OldOverrides = Annotated[
    list[str] | None, typer.Option("--set", hidden=True, help="Deprecated: write key=value without --set.")
]


class HomeCommand(typer.core.TyperCommand):
    """Command that expands "~" in paths (shells leave it in `--out=~/x`) and rejects non-finite numbers."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Lists are not changed: prompts stay as typed, paths in them are expanded later."""
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name} must be a finite number; got {value}.")
        ctx.params = {
            name: type(value)(expand_home(str(value)))
            if isinstance(value, str | Path) and name != "prompt"
            else value
            for name, value in ctx.params.items()
        }
        return super().invoke(ctx)


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """Return the recipe of a command with its overrides applied."""
    from scalewise.config.presets import find_recipe

    return find_recipe(name).override(overrides or [])


def split_overrides(words: list[str], old: list[str] | None) -> tuple[list[str], list[str]]:
    """Split the arguments after a recipe into samplers and overrides; those of --set come last.

    An argument is an override if the text before "=" is a recipe key, or contains a dot while the text after
    "=" is not a sampler: labelled samplers have the same form, as in "first=student:runs/a".
    """
    from scalewise.config.overrides import field_names
    from scalewise.config.recipe import Recipe
    from scalewise.evaluation.samplers import is_sampler

    if old:
        warnings.warn("--set is deprecated; write key=value without it, as for `distill`.", stacklevel=2)
    known = {name for name in field_names(Recipe) if "." in name}
    overrides = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign and (key.strip() in known or ("." in key and ":" not in key and not is_sampler(value))):
            overrides.append(word)
    return [word for word in words if word not in overrides], [*overrides, *(old or ())]


def model_overrides(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split arguments into prompts and overrides of `model` keys; a prompt with "=" has no key before it.

    BadParameter for overrides of other keys, or if there is no prompt.
    """
    from scalewise.config.recipe import Recipe

    overrides = []
    for word in words:
        key, sign, _ = word.partition("=")
        group, dot, name = key.strip().partition(".")
        if not (sign and dot and name.replace("_", "").replace(".", "").isalpha()):
            continue
        if group in Recipe.model_fields and group != "model":
            raise typer.BadParameter(
                f"{word!r}: `sample` only accepts overrides of model, such as model.offload=components; "
                "everything else is fixed by the training of the student."
            )
        if group == "model":
            overrides.append(word)
    texts = [word for word in words if word not in overrides]
    if not texts:
        raise typer.BadParameter("No prompt given; add at least one.")
    return texts, tuple(overrides)

"""`scalewise.distill`: a training run in one call."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from scalewise.common.progress import Progress, silent
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.training.run import distill as rows_of


def distill(
    recipe: Recipe | str | Path, out: str | Path, *, progress: Progress | None = None, resume: bool = False
) -> Path:
    """Train a student and return the path of its file, for `scalewise.load(base, student=...)`.

    `recipe`: a Recipe, its name, or a YAML file. `out`: folder of the run. `progress(what, total)`: a context
    manager that returns a callback for the number of finished iterations, such as
    `scalewise.common.console.progress`; None shows nothing. `resume`: continue from the last checkpoint in
    `out`. RecipeError if the recipe does not match the base or the data, or if `out` contains another run.
    """
    recipe = find_recipe(fspath(recipe)) if isinstance(recipe, str | PathLike) else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe must be a Recipe, the name of one or a YAML file; got {recipe!r}. Use "
            "Recipe.from_mapping for a dict."
        )
    if not isinstance(out, str | PathLike):
        raise RecipeError(f"out must be a path, as in 'runs/mine'; got {out!r}.")
    shown, out = progress or silent, Path(out).expanduser()
    with shown("distilling", recipe.train.iterations) as done:
        for row in rows_of(recipe, out, shown, resume=resume):
            done(int(row["iteration"]))
    return out / "student.safetensors"

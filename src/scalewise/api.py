"""What `import scalewise` offers for training: a distillation from its first iteration to the student."""

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
    """Train a student to the end and return its file, for `scalewise.load(base, student=...)`.

    `recipe`: a Recipe, the name of one, or a YAML file. `out`: the run's folder. `progress(what, total)`: a
    context whose value is called with the number done so far, such as `scalewise.common.console.progress`;
    None shows nothing. `resume`: continue from the last checkpoint in `out`. Raises RecipeError for a recipe
    that fits neither base nor data, or a folder that holds a run already.
    """
    recipe = find_recipe(fspath(recipe)) if isinstance(recipe, str | PathLike) else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{recipe!r} is no recipe; give a Recipe, the name of one or a YAML file. Recipe.from_mapping "
            "reads a dict."
        )
    if not isinstance(out, str | PathLike):
        raise RecipeError(f"The folder of the run is {out!r}; give out a path, as in 'runs/mine'.")
    shown, out = progress or silent, Path(out).expanduser()
    with shown("distilling", recipe.train.iterations) as done:
        for row in rows_of(recipe, out, shown, resume=resume):
            done(int(row["iteration"]))
    return out / "student.safetensors"

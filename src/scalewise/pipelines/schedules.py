"""Reading a schedule from the name of a recipe or from text."""

from __future__ import annotations

from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.method.scales import ScaleSchedule


def read_schedule(schedule: str | ScaleSchedule) -> ScaleSchedule:
    """Return a schedule from the name of a recipe or from text; raise RecipeError for an unknown name."""
    if isinstance(schedule, ScaleSchedule):
        return schedule
    if "@" in schedule:
        return ScaleSchedule.parse(schedule)
    try:
        return find_recipe(schedule).schedule.build()
    except RecipeError as error:
        known = ", ".join(RECIPES)
        raise RecipeError(
            f"There is no schedule {schedule!r}; use timesteps with scales, or one of the recipes {known}."
        ) from error

"""Schedules as users name them."""

from __future__ import annotations

from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.method.scales import ScaleSchedule


def read_schedule(schedule: str | ScaleSchedule) -> ScaleSchedule:
    """A schedule from a recipe's name or from text."""
    if isinstance(schedule, ScaleSchedule):
        return schedule
    if "@" in schedule:
        return ScaleSchedule.parse(schedule)
    try:
        return find_recipe(schedule).schedule.build()
    except RecipeError as error:
        known = ", ".join(RECIPES)
        raise RecipeError(f"There is no schedule {schedule!r}; known are those of {known}.") from error

"""What a training iteration saves by not computing anything twice, in counted operations.

    python scripts/savings.py mini sd35-medium

Each row is the iteration with one of the savings undone, over the iteration as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from scalewise.common import console
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.planning.plan import ForwardCost, PassFlops, iteration_flops, make_plan, scales_to_count


def undone(recipe: Recipe, steps: list[ForwardCost], *, embedded: bool) -> dict[str, float]:
    """Operations without each saving, relative to those with all."""
    now = iteration_flops(recipe, steps, embedded=embedded)
    to_the_end = [
        replace(s, base=whole(s.base), adapted=whole(s.adapted), feature_train_flops=s.train_flops)
        for s in steps
    ]
    seen = [s.base if recipe.loss.mmd.features == "teacher" else s.adapted for s in steps]
    real_graph = now + sum(p.gradient - p.features for p in seen) / len(steps) * bool(recipe.loss.mmd.weight)
    # The student's x0 is made once for all terms; each term would need its own forward and backward.
    terms = sum(1 for w in (recipe.loss.mmd.weight, recipe.loss.dmd.weight, recipe.loss.gan.weight) if w)
    each_term = now + (terms - 1) * sum(s.train_flops for s in steps) / len(steps)
    return {
        "features by whole forwards": iteration_flops(recipe, to_the_end, embedded=embedded) / now,
        "a graph for the real features": real_graph / now,
        "a student's forward for every term": each_term / now,
    }


def whole(passes: PassFlops) -> PassFlops:
    """Passes whose features are taken by forwards to the end; the way back is as long as before."""
    return replace(
        passes, features=passes.forward, gradient=passes.gradient + passes.forward - passes.features
    )


def main(names: list[str]) -> None:
    """Print a table for every recipe, with the full loss and with MMD alone."""
    for name in names:
        for loss in ("full loss", "MMD alone"):
            recipe = find_recipe(name)
            if loss == "MMD alone":
                recipe = recipe.override(["loss.mmd_only=true"])
            with console.progress(f"{name}: counting", len(scales_to_count(recipe))) as done:
                plan = make_plan(recipe, done)
            embedded = plan.teacher_forwards == recipe.teacher.steps and recipe.teacher.guidance != 1
            for what, ratio in undone(recipe, plan.steps, embedded=embedded).items():
                console.out.print(f"{name}, {loss}: {what}: {ratio:.2f}x")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipes", nargs="+")
    main(parser.parse_args().recipes)

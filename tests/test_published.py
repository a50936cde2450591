"""The published set-ups: numbers of the paper and of the released scripts, one by one."""

from __future__ import annotations

import pytest

from scalewise.config.presets import find_recipe


@pytest.mark.parametrize(
    ("name", "batch", "iterations", "lr", "penalty"),
    [
        ("sd35-large", 3, 3000, 4e-6, "squared"),
        ("sd35-large-released", 4, 4000, 5e-6, "huber"),
        ("sd35-medium", 8, 3000, 4e-6, "squared"),
        ("sd35-medium-released", 8, 3000, 5e-6, "huber"),
    ],
)
def test_the_released_script_differs_from_the_paper_in_batch_iterations_rate_and_loss(
    name, batch, iterations, lr, penalty
):
    recipe = find_recipe(name)
    found = (recipe.train.batch, recipe.train.iterations, recipe.optimizer.lr, recipe.loss.mmd.penalty)
    assert found == (batch, iterations, lr, penalty)

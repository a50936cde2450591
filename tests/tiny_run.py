"""A miniature teacher, its synthetic set and a recipe for both, small enough to train within seconds."""

from __future__ import annotations

import os
from pathlib import Path

from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.data.synthetic import generate
from scalewise.models import SD3
from scalewise.training import setup

PROMPTS = ["a dog", "a cat", "a fish"]


def make_tiny(folder: Path) -> Recipe:
    """Write the teacher and its set under `folder`, and return a recipe that distils it in six iterations."""
    os.environ["SCALEWISE_CACHE"] = str(folder / "cache")
    SD3.tiny().save(folder / "tiny")
    recipe = find_recipe("mini").override(
        [
            f"model.base={folder / 'tiny'}",
            f"data.path={folder / 'set'}",
            "schedule.scales=['4', '6', '6', '8']",
            "lora.rank=4",
            "loss.feature_block=1",
            "loss.fake.updates=2",
            "teacher.steps=2",
            "train.iterations=6",
            "train.batch=4",
            "train.precision=float32",
            "train.checkpoint_every=2",
            "train.sample_every=0",
            "train.sample_prompts=['a dog']",
        ]
    )
    model = setup.teacher(recipe)
    for _ in generate(model, recipe, PROMPTS, folder / "set", count=12, batch=6):
        pass
    return recipe

"""Recipes for the mini: full loss, MMD alone, full-scale baselines, and the short run of the demo."""

from __future__ import annotations

from typing import Any

from scalewise.config.presets.losses import paper_loss, released_loss
from scalewise.config.recipe import Recipe

# Four entries of the 28-step schedule with shift 3 (0, 7, 14, 18), and the scales of SD3.5's released 4-step
# students (64 80 96 128) divided by 8, so that token counts have the same ratios.
_TIMESTEPS = (1000.0, 895.9003, 737.0558, 602.1506)
_SCALES = ("8x8", "10x10", "12x12", "16x16")
_BLOCK = 3  # of 6: the middle

_PROMPTS = (
    "a red apple, fluent style",
    "a dog face, noto style",
    "a red crab, fluent style",
    "a sunflower, fluent style",
    "a rocket, flat fluent style",
    "a guitar, noto style",
    "a house, fluent style",
    "a crying face, noto style",
)


def _recipe(name: str, about: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "about": about,
        "model": {"family": "sd3"},
        "schedule": {"timesteps": _TIMESTEPS, "scales": _SCALES},
        "lora": {"rank": 64},
        "loss": released_loss(_BLOCK),
        # The mini is small and starts far from a few-step student: learning rates of large models would take
        # days.
        "optimizer": {"lr": 3e-4, "warmup": 10, "clip": 10.0, "betas": (0.9, 0.99)},
        "train": {
            "iterations": 120,
            "batch": 8,
            "ema": 0.98,
            "checkpoint_every": 50,
            "sample_every": 100,
            "sample_prompts": _PROMPTS,
        },
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Recipe.from_mapping(values, origin=name)


def full() -> Recipe:
    """Scale-wise, four steps, full loss (MMD + DMD + GAN) in the released form."""
    return _recipe("mini", "scale-wise, 4 steps, full loss in the released form")


def paper() -> Recipe:
    """Scale-wise, four steps, full loss in the paper's form."""
    return _recipe(
        "mini-paper",
        "scale-wise, 4 steps, full loss in the paper's form",
        loss=paper_loss(_BLOCK),
        train={"step_choice": "sampled"},
    )


def mmd_only() -> Recipe:
    """Scale-wise, four steps, MMD alone on the teacher's features: no fake model, no discriminator."""
    loss = released_loss(_BLOCK) | {"mmd_only": True}
    # A sample costs a seventh of one with the full loss, so seven times as many take the same time.
    about = "scale-wise, 4 steps, MMD alone: no fake model, no discriminator"
    return _recipe("mini-mmd", about, loss=loss, train={"iterations": 400, "batch": 16})


def full_scale() -> Recipe:
    """Full-scale baseline: the same four timesteps, all at 16 x 16."""
    return _recipe("mini-full-scale", "full scale, 4 steps, full loss", schedule={"full_scale": True})


def full_scale_two() -> Recipe:
    """Full-scale baseline with the same sampling time: two steps at 16 x 16."""
    schedule = {"timesteps": (_TIMESTEPS[0], _TIMESTEPS[2]), "scales": ("16x16", "16x16")}
    return _recipe("mini-full-scale-2", "full scale, 2 steps, full loss", schedule=schedule)


def demo() -> Recipe:
    """MMD alone, a few minutes on two cores."""
    changes = mmd_only()
    loss = changes.loss.model_dump(mode="json")
    return _recipe(
        "mini-demo",
        "recipe of `scalewise demo`: MMD alone, a few minutes on two cores",
        loss=loss,
        train={"iterations": 300, "batch": 16, "sample_every": 0, "checkpoint_every": 50},
    )

"""Recipes of the paper (appendices A and F) and of the released trainer for the models they cover.

`<name>` is the paper's form, `<name>-released` that of the released code or weights. Two variants of each
need one override: `schedule.full_scale=true` and `loss.mmd_only=true`. Batch sizes are per process, for eight
processes (SD3.5 Large: 24 in total in the paper, 4 per process in the released script).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from scalewise.config.presets.losses import paper_loss, released_loss
from scalewise.config.recipe import Recipe
from scalewise.method.scales import shifted_sigmas

Build = Callable[[], Recipe]

PREVIEW_PROMPTS = (
    "a red fox sitting in fresh snow, photograph",
    "a glass of orange juice on a wooden table by a window",
    "an old lighthouse on a cliff in a storm, oil painting",
    "a shop window with a neon sign that says OPEN",
)
"""Prompts of the previews of all full-size models: a photograph, materials, a style, lettering."""


def entries(*numbers: int) -> tuple[float, ...]:
    """Timesteps of the 28-step schedule with shift 3: 0 4 7 12 14 18 are 1000 945 896 790 737 602."""
    sigmas = shifted_sigmas(28, 3.0)
    return tuple(round(1000 * sigmas[i], 4) for i in numbers)


def _recipe(
    name: str, about: str, *, base: str, family: str, timesteps: Sequence[float],
    scales: Sequence[str | int], block: int, released: bool = False, **changes: dict[str, Any],
) -> Recipe:  # fmt: skip
    values: dict[str, Any] = {
        "name": name,
        "about": about,
        "model": {"base": base, "family": family, "dtype": "bfloat16"},
        "teacher": {"steps": 28, "guidance": 4.5},
        "schedule": {"timesteps": timesteps, "scales": [str(scale) for scale in scales]},
        "lora": {"rank": 64},
        "loss": released_loss(block) if released else paper_loss(block),
        "data": {"path": f"synthetic/{name.removesuffix('-released')}"},
        "optimizer": {"lr": 5e-6 if released else 4e-6},
        "train": {
            "iterations": 3000,
            "batch": 3,
            "gradient_checkpointing": True,
            "sample_every": 250,
            "sample_prompts": PREVIEW_PROMPTS,
            "step_choice": "round-robin" if released else "sampled",
        },
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value}
    return Recipe.from_mapping(values, origin=name)


def _medium(
    name: str, about: str, timesteps: Sequence[float], scales: Sequence[int], *, released: bool = False
) -> Recipe:
    recipe = _recipe(
        name, about, base="stabilityai/stable-diffusion-3.5-medium", family="sd3", timesteps=timesteps,
        scales=scales, block=11, released=released, teacher={"steps": 40}, train={"batch": 8},
    )  # fmt: skip
    # The released script uses more guidance for the real score than the paper.
    return recipe.with_values({"loss.dmd.guidance": 7.0}) if released else recipe


def _large(name: str, about: str, *, released: bool = False) -> Recipe:
    return _recipe(
        name, about, base="stabilityai/stable-diffusion-3.5-large", family="sd3",
        timesteps=entries(0, 7, 14, 18), scales=(64, 80, 96, 128), block=20, released=released,
        train={"batch": 4, "iterations": 4000} if released else {},
    )  # fmt: skip


def _flux(name: str, about: str, timesteps: Sequence[float], scales: Sequence[int]) -> Recipe:
    return _recipe(
        name, about, base="black-forest-labs/FLUX.1-dev", family="flux", timesteps=timesteps, scales=scales,
        block=15,
        model={"embedded_guidance": 4.5}, teacher={"steps": 30, "guidance": 5.0}, lora={"rank": 128},
        data={"path": f"synthetic/{name}"},  # the two forms have different scales
    )  # fmt: skip


# `sample_neg_prompt` of the Wan2.1 code, used by its authors for T2V-1.3B with guidance 6 and shift 8.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def _wan(name: str, about: str, scales: Sequence[str]) -> Recipe:
    return _recipe(
        name, about, base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", family="wan", timesteps=entries(0, 7, 14, 18),
        scales=scales, block=15, lora={"rank": 128},
        teacher={"steps": 50, "guidance": 6.0, "shift": 8.0, "negative_prompt": WAN_NEGATIVE_PROMPT},
    )  # fmt: skip


def _sdxl() -> Recipe:
    """SDXL: the released code states timesteps, scales and MMD alone; rank, batch, timesteps of the loss and
    teacher settings are ours.
    """
    return _recipe(
        "sdxl", "SDXL, 4 steps; timesteps, scales and MMD alone as released, other settings by this project",
        base="stabilityai/stable-diffusion-xl-base-1.0", family="sdxl",
        timesteps=(1000, 800, 600, 400), scales=(64, 80, 96, 128), block=0, released=True,
        teacher={"steps": 50, "guidance": 5.0}, loss={"mmd_only": True},
        train={"gradient_checkpointing": False},
    )  # fmt: skip


_SIX, _FOUR = entries(0, 4, 7, 12, 14, 18), entries(0, 7, 14, 18)

PUBLISHED: dict[str, Build] = {
    "sd35-medium": partial(
        _medium, "sd35-medium", "SD3.5 Medium, 6 steps, settings of the paper", _SIX,
        (32, 48, 64, 80, 96, 128),
    ),
    "sd35-medium-released": partial(
        _medium, "sd35-medium-released", "SD3.5 Medium, 6 steps, as released", _SIX,
        (32, 48, 64, 80, 96, 128), released=True,
    ),
    "sd35-medium-4": partial(
        _medium, "sd35-medium-4", "SD3.5 Medium, 4 steps, losses of the paper, released schedule",
        _FOUR, (64, 80, 96, 128),
    ),
    "sd35-medium-4-released": partial(
        _medium, "sd35-medium-4-released", "SD3.5 Medium, 4 steps, as released", _FOUR, (64, 80, 96, 128),
        released=True,
    ),
    "sd35-medium-2": partial(
        _medium, "sd35-medium-2", "SD3.5 Medium, 2 steps, schedule chosen by this project",
        entries(0, 14), (64, 128),
    ),
    "sd35-large": partial(_large, "sd35-large", "SD3.5 Large, 4 steps, settings of the paper"),
    "sd35-large-released": partial(
        _large, "sd35-large-released", "SD3.5 Large, 4 steps, as released", released=True
    ),
    "flux-dev": partial(
        _flux, "flux-dev", "FLUX.1-dev, 4 steps, settings of the paper", entries(0, 4, 12, 18),
        (32, 64, 96, 128),
    ),
    "flux-dev-released": partial(
        _flux, "flux-dev-released",
        "FLUX.1-dev, 4 steps; schedule of the released weights, other settings of the paper",
        (1000, 895.6, 736.3, 600.7), (64, 80, 96, 128),
    ),
    "wan21-1.3b": partial(
        _wan, "wan21-1.3b", "Wan2.1 1.3B, 4 steps, scales in space and time, settings of the paper",
        ("6x20x34", "11x30x52", "16x40x70", "21x60x104"),
    ),
    "wan21-1.3b-spatial": partial(
        _wan, "wan21-1.3b-spatial", "Wan2.1 1.3B, 4 steps, scales in space only",
        ("21x20x34", "21x30x52", "21x40x70", "21x60x104"),
    ),
    "sdxl": _sdxl,
}  # fmt: skip

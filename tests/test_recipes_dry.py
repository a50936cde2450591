"""Every named recipe, with other sizes alone, is built and trained for an iteration on a miniature."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import Recipe
from scalewise.data.latent_set import LatentSetWriter
from scalewise.method.scales import Scale
from scalewise.models import FAMILIES, SD3, PipelineAdapter, family_of_pipeline
from scalewise.models.lora import load_student
from scalewise.models.meta import known_configurations
from scalewise.training import run, setup

CAPTIONS = ["a dog", "a cat", "a fish", "a red apple"]
CELLS = 16
"""Latent cells of the longer side at full size."""


def silent(_what: str, _total: int):
    return nullcontext(lambda _done: None)


def family_of_recipe(recipe: Recipe) -> type[PipelineAdapter]:
    if recipe.model.base == "mini":
        return SD3
    return family_of_pipeline(known_configurations()[recipe.model.base]["pipeline_class"], recipe.model.base)


def shrunk(recipe: Recipe, patch: int) -> list[Scale]:
    """The recipe's scales in the same proportions, at most 5 frames of 16 cells."""
    scales = recipe.schedule.build().scales
    full = scales[-1]

    def size(cells: int) -> int:
        return patch * max(1, round(cells * CELLS / max(full.height, full.width) / patch))

    return [
        Scale(1 + (s.frames - 1) * 4 // max(1, full.frames - 1), size(s.height), size(s.width))
        for s in scales
    ]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Recipe]:
    """A recipe on a miniature of its family, with a set of random latents at its scales."""
    folder = tmp_path_factory.mktemp("miniatures")
    bases = {name: folder / name for name in FAMILIES}

    def make(recipe: Recipe) -> Recipe:
        family = family_of_recipe(recipe)
        base, path = bases[family.family], folder / f"set-{recipe.name}"
        tiny = family.tiny()
        if not base.exists():
            tiny.save(base)
        scales = shrunk(recipe, tiny.patch)
        writer = LatentSetWriter(
            path,
            scales=sorted(set(scales)),
            channels=tiny.channels,
            kind="synthetic",
            base=str(base),
            settings={},
        )
        draw = torch.Generator().manual_seed(0)
        rows = {
            s: torch.randn(4, *s.shape(1, tiny.channels, video=tiny.video)[1:], generator=draw)
            for s in writer.header.scales
        }
        writer.add(range(4), CAPTIONS, range(4), rows)
        writer.finish()
        return recipe.with_values(
            {
                "model.base": str(base),
                "data.path": str(path),
                "schedule.scales": [str(s) for s in scales],
                "lora.rank": 2,
                "loss.feature_block": min(recipe.loss.feature_block, 1),
                "train.batch": 2,
                "train.iterations": 1,
                "train.sample_prompts": [],
            }
        )

    return make


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_built_and_trains_on_a_miniature_of_its_family(
    miniature, name: str, tmp_path: Path
) -> None:
    told = find_recipe(name)
    recipe = miniature(told)
    facts = setup.dry_run(recipe)
    assert [t for t, _, _ in facts["steps"]] == list(told.schedule.timesteps)
    assert (facts["tokens"] < facts["full_tokens"]) == (
        not told.schedule.full_scale and name != "mini-full-scale-2"
    )
    trained = {"student", "fake"} if told.loss.needs_fake else {"student"}
    assert facts["trainable"].keys() == trained and min(facts["trainable"].values()) > 0
    _, row = run.distill(recipe, tmp_path / "run", silent)
    assert row.keys() & {"mmd", "dmd", "gan"} == {
        term for term in ("mmd", "dmd", "gan") if getattr(told.loss, term).weight
    }
    assert all(math.isfinite(value) for value in row.values())
    assert row["student/gradient_norm"] > 0 and ("fake/gradient_norm" in row) == told.loss.needs_fake
    student = load_student(tmp_path / "run")
    assert student.schedule == recipe.schedule.build() and len(student.schedule) == len(
        told.schedule.timesteps
    )

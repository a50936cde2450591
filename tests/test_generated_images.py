"""An interrupted comparison resumes after the last saved batch of images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalewise.config.recipe import Recipe
from scalewise.evaluation.generated_images import GeneratedImages, sampler_fingerprint
from scalewise.evaluation.samplers import Prompts, generate_images, parse_sampler
from scalewise.evaluation.stored_images import PROMPTS_FILE
from scalewise.models import SD3

PROMPTS = Prompts.of(["a cat", "a red dog", "the moon", "an old house", "a ship", "a tree"])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    SD3.tiny().save(tmp_path / "base")
    return Recipe.from_mapping({
        "name": "tiny", "model": {"base": str(tmp_path / "base")},
        "schedule": {"timesteps": [1000, 500], "scales": ["4", "8"]},
        "teacher": {"steps": 2, "guidance": 3.0},
    })  # fmt: skip


class Sampler:
    """Generates batches of two into a folder, and records the numbers of the images."""

    def __init__(self, recipe: Recipe, folder: Path, prompts: Prompts = PROMPTS, *, stop: int = 99) -> None:
        self.contender = parse_sampler("undistilled", recipe)
        self.place = GeneratedImages(folder, prompts, sampler_fingerprint(recipe, self.contender))
        self.prompts, self.stop, self.drawn = prompts, stop, list[int]()

    def generate(self) -> np.ndarray:
        self.place.prepare()
        return generate_images(
            SD3.tiny(),
            self.contender,
            self.prompts,
            batch=2,
            load_batch=self.place.read,
            save_batch=self.keep,
        )  # fmt: skip

    def keep(self, numbers, images: np.ndarray) -> None:
        self.place.write(numbers, images)
        self.drawn += numbers
        if len(self.drawn) >= self.stop:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_drawn_and_the_rest_is_drawn_later(recipe: Recipe, tmp_path: Path) -> None:
    whole = Sampler(recipe, tmp_path / "whole").generate()
    first = Sampler(recipe, tmp_path / "halves", stop=4)
    with pytest.raises(KeyboardInterrupt):
        first.generate()
    assert sorted(p.name for p in (tmp_path / "halves").glob("*.png")) == [f"{i}.png" for i in range(4)]
    second = Sampler(recipe, tmp_path / "halves")
    assert np.array_equal(second.generate(), whole) and second.drawn == [4, 5]
    third = Sampler(recipe, tmp_path / "halves")
    assert np.array_equal(third.generate(), whole) and third.drawn == []


def test_what_is_damaged_or_drawn_by_another_is_drawn_again(recipe: Recipe, tmp_path: Path) -> None:
    whole = Sampler(recipe, tmp_path / "a").generate()
    data = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(data[: len(data) // 2])
    again = Sampler(recipe, tmp_path / "a")
    assert np.array_equal(again.generate(), whole) and again.drawn == [2, 3]
    other = Sampler(recipe.override(["schedule.scales=['6', '8']"]), tmp_path / "a")
    assert not np.array_equal(other.generate(), whole) and other.drawn == list(range(6))
    told = json.loads((tmp_path / "a" / PROMPTS_FILE).read_text())
    assert told["captions"] == list(PROMPTS.captions) and told["drawn_by"] == other.place.fingerprint


def test_more_prompts_go_on_and_other_ones_begin_again(recipe: Recipe, tmp_path: Path) -> None:
    Sampler(recipe, tmp_path / "a", PROMPTS[:4]).generate()
    longer = Sampler(recipe, tmp_path / "a")
    longer.generate()
    assert longer.drawn == [4, 5]
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "mine.png")
    others = Sampler(recipe, tmp_path / "a", Prompts.of(["a house", "a hill"]))
    others.generate()
    assert others.drawn == [0, 1]
    assert sorted(p.name for p in (tmp_path / "a").glob("*.png")) == ["0.png", "1.png", "mine.png"]


def test_what_draws_an_image_is_known_by_content(recipe: Recipe, tmp_path: Path) -> None:
    contender = parse_sampler("teacher", recipe)
    own = sampler_fingerprint(recipe, contender)
    SD3.tiny().save(tmp_path / "moved")
    assert sampler_fingerprint(recipe.with_values({"model.base": str(tmp_path / "moved")}), contender) == own
    other = SD3.tiny()
    other.denoiser.proj_out.weight.data += 1
    other.save(tmp_path / "moved")
    assert sampler_fingerprint(recipe.with_values({"model.base": str(tmp_path / "moved")}), contender) != own
    assert sampler_fingerprint(recipe, replace(contender, guidance=2.0)) != own
    assert sampler_fingerprint(recipe.with_values({"train.precision": "bf16"}), contender) != own

"""A set, a checkpoint and students of version 0.1 (before the move into packages) are read as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scalewise
from scalewise.cli import main
from scalewise.config.recipe import Recipe
from scalewise.data import LatentSet
from scalewise.method.scales import Scale

OLD = Path(__file__).parent / "data" / "before-0.2"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


DRAWN = pixels_of(Image.open(OLD / "drawn" / "a-dog-0.png"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the current folder: their paths are relative, and a resumed run writes."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "old"


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0


def test_an_old_set_has_its_captions_and_latents(files: Path) -> None:
    data = LatentSet.open(files / "set")
    assert data.captions(range(4)) == EXPECTED["captions"]
    assert sorted(map(str, data.scales)) == sorted(EXPECTED["latents"])
    for scale, values in EXPECTED["latents"].items():
        assert data.latents([0], Scale.parse(scale)).flatten()[:8].tolist() == pytest.approx(values, abs=1e-6)


def test_an_old_checkpoint_is_resumed_as_if_it_had_never_stopped(files: Path) -> None:
    run("distill", "run/recipe.yaml", "train.iterations=3", "--out", "run", "--resume")
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for key, value in EXPECTED["third iteration"].items():
        assert rows[2][key] == pytest.approx(value, rel=1e-3), key
    student = scalewise.load_student("run")
    assert student.recipe["train"]["iterations"] == 3
    size = sum(float(t.abs().sum()) for t in student.tensors.values())
    assert size == pytest.approx(EXPECTED["third student"], rel=1e-3)


def test_an_old_recipe_file_says_what_it_said(files: Path) -> None:
    recipe = Recipe.from_yaml(files / "run" / "recipe.yaml")
    assert (recipe.name, recipe.lora.rank, recipe.loss.gan.weight) == ("old", 1, 0.005)
    assert str(recipe.schedule.build()) == str(scalewise.load_student("run").schedule)


def test_old_students_of_every_form_are_one_and_the_same(files: Path) -> None:
    shipped = scalewise.load_student("run")
    for path in ("kohya.safetensors", "run/checkpoints/step-000002"):
        other = scalewise.load_student(path)
        assert (other.schedule, other.rank, other.alpha) == (shipped.schedule, 1, 1.0)
        assert len(other.tensors) == len(shipped.tensors)
    undistilled = scalewise.load("base", student=None, schedule=shipped.schedule)
    assert np.abs(pixels_of(undistilled("a dog", seed=0).images[0]) - DRAWN).mean() > 3
    for path in ("run", "kohya.safetensors", "run/checkpoints/step-000002"):
        image = scalewise.load("base", student=path)("a dog", seed=0).images[0]
        assert np.abs(pixels_of(image) - DRAWN).max() <= 2, path


def test_the_command_draws_with_an_old_run_what_it_drew(files: Path) -> None:
    run("sample", "a dog", "--student", "run", "--out", "now")
    with Image.open("now/a-dog-0.png") as image:
        assert np.abs(pixels_of(image) - DRAWN).max() <= 2

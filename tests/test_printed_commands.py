"""Commands that are printed for the user to paste: they run as they stand, with what was typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from tiny_run import PROMPTS, make_tiny

from scalewise.cli import main
from scalewise.cli.run_planning import Device, run_plan, typed_as
from scalewise.common.images import save_image
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.planning.fitting import Change, Need, TypedRecipe, line
from scalewise.planning.footprint import WORKLOADS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def here(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with a recipe file whose name is not the recipe's."""
    (tmp_path / "mine.yaml").write_text(recipe.with_values({"data.path": "new set"}).to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(words: list[str], *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words, *more])
    return int(ended.value.code or 0)


def printed(text: str) -> dict[str, list[str]]:
    """Words of the commands in the output, without the program's name, by command."""
    found = [shlex.split(line)[1:] for line in text.splitlines() if re.match(r"\s*(Next: )?scalewise ", line)
             for line in [line.strip().removeprefix("Next: ")]]  # fmt: skip
    return {words[0]: words for words in found}


def test_every_command_that_plan_prints_runs_to_its_end(here: Path, capsys) -> None:
    """In the order of the workflow, on a base that brings neither prompts nor a judge."""
    typed = ["train.iterations=2", "name=foo", "model.dtype=float32", "schedule.scales=[4, 6, 6, 8]"]
    run_plan("mine.yaml", typed, Device(None, 0.0007), gpus=1)
    text = capsys.readouterr().out
    commands = printed(text)
    assert list(commands) == ["generate", "distill", "sample", "evaluate"]
    assert "prompts.txt: your prompts, one per line; photos: a folder of real images" in text
    (here / "prompts.txt").write_text("\n".join([*PROMPTS, "a bird"]))
    (here / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        save_image(pixels, here / "photos" / f"{number}.png")
    assert call(commands["generate"], "--count", "8") == 0
    # The next command that a finished set names is the one to distil it: what was typed, and the set.
    assert printed(capsys.readouterr().out)["distill"] == [
        "distill",
        "mine.yaml",
        *typed,
        "data.path=new set",
    ]
    for command in ("distill", "sample", "evaluate"):
        assert call(commands[command]) == 0, (commands[command], capsys.readouterr())
    assert (here / "runs" / "foo" / "student.safetensors").exists()
    assert list((here / "samples").glob("*.png"))
    assert "Spectral distance" in (here / "evaluation" / "figures.md").read_text()


def test_sample_and_evaluate_are_printed_without_overrides_that_they_refuse() -> None:
    typed = ["train.batch=2", "name=foo", "about=mine", "model.dtype=bfloat16", "data.path=sets/a"]
    of = TypedRecipe("mini", typed, find_recipe("mini").override(typed), set_folder="sets/a")
    words = {c: shlex.split(line(Need(c, 1, 1.0, False, Change()), of))[2:] for c in (*WORKLOADS, "distill")}
    assert words["sample"] == ["a cat", "model.dtype=bfloat16", "--student", "runs/foo"]
    assert words["evaluate"] == [
        "mini", "teacher", "student:runs/foo", "train.batch=2", "model.dtype=bfloat16", "data.path=sets/a"
    ]  # fmt: skip
    assert words["generate"] == ["mini", *typed, "--out", "sets/a"]
    assert words["distill"] == ["mini", *typed]


def test_no_set_is_to_be_made_over_the_users_images_which_evaluate_takes_for_real_ones(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "my images"
    flux = find_recipe("flux-dev").with_values({"data.path": str(folder)})
    new = typed_as("flux-dev", [], recipe=flux)
    assert (new.set_folder, new.photos) == (str(folder), "photos")
    folder.mkdir()
    (folder / "a.jpg").touch()
    images = typed_as("flux-dev", [], recipe=flux)
    assert (images.set_folder, images.photos) == (None, str(folder))
    mini = typed_as("mini", [], recipe=find_recipe("mini"))
    assert mini.set_folder is None

"""What `import scalewise` offers, and how its pipelines answer arguments that cannot be meant."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_tiny

import scalewise
from scalewise.config.overrides import choices_of, field_type
from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import Recipe, RecipeError


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The undistilled mini, which draws 128 x 128 in two steps."""
    pipeline = scalewise.load("mini", student=None, schedule="1000@8 602@16")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_dir_names_what_the_package_offers_and_each_is_there() -> None:
    names = ["Recipe", "ScaleSchedule", "__version__", "distill", "find_recipe", "load", "load_student"]
    assert sorted(dir(scalewise)) == names
    assert scalewise.Recipe is Recipe and scalewise.find_recipe("mini") == find_recipe("mini")
    assert all(hasattr(scalewise, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scalewise.nothing


def test_distill_stays_a_function_whatever_was_imported_before() -> None:
    code = "import scalewise.method.distill, scalewise; print(scalewise.distill.__module__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "scalewise.api"


def test_distill_takes_a_folder_as_text_and_shows_progress_only_where_asked(tmp_path: Path) -> None:
    recipe = make_tiny(tmp_path).override(
        {"train.iterations": 3, "loss.mmd_only": True, "train.sample_prompts": []}
    )
    file = scalewise.distill(recipe, str(tmp_path / "run"))
    assert file == tmp_path / "run" / "student.safetensors" and file.exists()
    shown: list[tuple[str, int]] = []

    @contextmanager
    def progress(what: str, total: int):
        yield lambda done: shown.append((what, done))

    scalewise.distill(recipe.override("train.iterations=5"), tmp_path / "run", progress=progress, resume=True)
    assert [done for what, done in shown if what == "distilling"] == [3, 4, 5]


def test_overrides_come_as_a_mapping_one_text_or_several() -> None:
    recipe = find_recipe("mini")
    wanted = recipe.override(["train.iterations=3", "data.path=/a/b"])
    assert recipe.override({"train.iterations": 3, "data.path": Path("/a/b")}) == wanted
    assert recipe.override("train.iterations=3").train.iterations == 3
    with pytest.raises(RecipeError, match=r"'train\.iteration'; did you mean 'train\.iterations'"):
        recipe.override({"train.iteration": 3})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_inference_steps": 28},
            r"num_inference_steps is 28, but the student was trained with a schedule of 2 steps",
        ),
        ({"height": "128"}, r"height must be an integer, as in height=1024; got '128'"),
        ({"width": 128.0}, r"width must be an integer, as in width=1024; got 128\.0"),
        ({"num_images_per_prompt": "2"}, r"num_images_per_prompt must be an integer, .*; got '2'"),
        ({"seed": "3"}, r"seed must be an integer or a list .*; got '3'"),
        ({"seed": 1.5}, r"seed must be .*; got 1\.5"),
        ({"seed": [1.5]}, r"seed must be .*; got \[1\.5\]"),
        ({"seed": True}, r"seed must be .*; got True"),
        ({"seed": [1, 2]}, r"2 seeds for 1 samples"),
        ({"generator": 3}, r"generator must be a torch\.Generator .*; got 3"),
        ({"strength": 0.6}, r"strength 0\.6 has no effect without an image"),
    ],
)
def test_a_wrong_argument_is_told_in_a_sentence(pipe, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipe("a dog", **options)


@pytest.mark.parametrize("prompt", [None, 5, ["a dog", 5]])
def test_a_prompt_that_is_no_text_is_told(pipe, prompt: Any) -> None:
    with pytest.raises(ValueError, match="must be a string or a list of strings"):
        pipe(prompt)


def test_the_stock_pipelines_arguments_and_typos_are_told_apart(pipe) -> None:
    with pytest.raises(TypeError, match="sigmas is an argument of StableDiffusion3Pipeline without effect"):
        pipe("a dog", sigmas=[1.0])
    with pytest.raises(TypeError, match="no argument 'heigth'; did you mean 'height'"):
        pipe("a dog", heigth=128)


def test_the_number_of_the_schedules_steps_may_be_given(pipe) -> None:
    one, other = (
        pipe("a dog", seed=1, output_type="latent", **options).images
        for options in ({}, {"num_inference_steps": 2})
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"latents": torch.zeros(1, 16, 4, 4)}, r"shape \[1, 16, 4, 4\] after step 1.* \[1, 16, 8, 8\]"),
        ({"latents": "none"}, r"latents of str after step 1"),
        (torch.zeros(1), r"returned a Tensor after step 1"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, told: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipe("a dog", seed=1, output_type="latent", callback_on_step_end=lambda *_: told)


def test_recipes_cuts_no_name_on_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code = "import sys; from scalewise.cli import main; sys.argv = ['scalewise', 'recipes']; main()"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"{name}: {find_recipe(name).about}" in text for name in RECIPES)
    assert all(find_recipe(name).model.base in text for name in RECIPES)


def test_keys_list_the_choices_of_a_key() -> None:
    command = [sys.executable, "-m", "scalewise", "recipes", "--keys"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    for choices in ("one of none, int8, nf4", "one of true, false", "one of round-robin, sampled"):
        assert choices in text
    assert choices_of(field_type(Recipe, "train.iterations")) == []

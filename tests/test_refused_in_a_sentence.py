"""Values that no run can take are refused at once, each in one sentence with the value and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import scalewise
from scalewise.cli import main
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.data import DataError
from scalewise.evaluation.samplers import parse_sampler
from scalewise.evaluation.stored_images import SamplerError, read_folder
from scalewise.method.backbone import Backbone
from scalewise.metrics import EXTRAS
from scalewise.models import SD3

MINI = find_recipe("mini")


@pytest.mark.parametrize(("override", "said"), [
    ("optimizer.betas=[0.9, 1.0]", r"optimizer.betas.1 = 1.0: Input should be less than 1$"),
    ("optimizer.betas=[-0.1, 0.9]", r"optimizer.betas.0 = -0.1: .* greater than or equal to 0$"),
    ("train.seed=99999999999999999999", r"train.seed = 9{20}: .* less than 9223372036854775807$"),
    ("train.sample_prompts=a dog", r"train.sample_prompts = 'a dog': .*'lora.targets=\[to_q, to_k\]'$"),
    ("lora.targets=to_q", r"lora.targets = 'to_q': .* as in 'lora.targets=\[to_q, to_k\]'$"),
    ("schedule.scales=4 6 6 8", r"schedule.scales = '4 6 6 8': .* as in 'lora.targets=\[to_q, to_k\]'$"),
    ("lora.targets=[]", r"targets \[\] name no module; omit them for those of the model family$"),
    ("lora.targets=['']", r"targets \[''\] name no module; omit them for those of the model family$"),
])  # fmt: skip
def test_a_value_out_of_bounds_is_refused_with_its_key(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        MINI.override(override)


def test_the_largest_seed_and_beta_that_can_be_used_are_taken() -> None:
    recipe = MINI.override([f"train.seed={2**63 - 2}", "optimizer.betas=[0, 0.9999]"])
    assert recipe.train.seed == 9223372036854775806 and recipe.optimizer.betas == (0.0, 0.9999)


def test_a_backbone_without_targets_is_refused_and_not_given_the_familys() -> None:
    with pytest.raises(ValueError, match=r"No module matches the LoRA targets \[\]"):
        Backbone(SD3.tiny(), ["student"], targets=[])


@pytest.mark.parametrize(("given", "said"), [
    ([("train.iterations", 3)], r"Overrides must be strings .*; got \('train.iterations', 3\)"),
    (None, "Overrides must be strings such as 'train.iterations=200'.*; got None"),
    (3, "Overrides must be strings.*; got 3"), ([None], "Overrides must be strings.*; got None"),
    ({3: 4}, "Recipe keys must be strings such as 'train.iterations'; got 3"),
])  # fmt: skip
def test_overrides_that_are_no_text_are_refused(given: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        MINI.override(given)


def test_a_distillation_of_no_recipe_or_into_no_folder_is_refused(tmp_path: Path) -> None:
    wrong: Any = {"name": "x"}
    with pytest.raises(
        RecipeError,
        match=r"recipe must be a Recipe.*; got \{'name': 'x'\}. Use Recipe.from_mapping for a dict",
    ):
        scalewise.distill(wrong, tmp_path / "out")
    nowhere: Any = None
    with pytest.raises(RecipeError, match=r"out must be a path, .*; got None"):
        scalewise.distill(MINI, nowhere)


@pytest.mark.parametrize(("words", "code", "said"), [
    (["plan", "mini", "--memory", "inf", "--card", "4090"], 2, "--memory must be a finite number; got inf"),
    (["sample", "a dog", "--weight", "inf"], 2, "--weight must be a finite number; got inf"),
    (["spectrum", "mini", "--margin", "nan"], 2, "--margin must be a finite number; got nan"),
    (["distill", "mini", "name=" + "x" * 300], 1, "cannot be used as a folder in runs/; change it"),
    (["distill", "mini", "name=" + "é" * 128], 1, "cannot be used as a folder in runs/; change it"),
    (["distill", "mini", "--out", "x" * 300], 1, "its name is too long. Choose another --out"),
    (["distill", "mini", "name=../../x", "--dry-run"], 1, "The recipe name '../../x' cannot be used"),
    (["evaluate", "mini", "folder:nothere"], 1, "'folder:nothere' does not exist; give a folder"),
])  # fmt: skip
def test_a_command_refuses_in_one_sentence(words, code, said, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capfd.readouterr().err).split())
    assert ended.value.code == code and said in text and "Errno" not in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_told_as_empty_and_a_file_as_a_file(tmp_path: Path) -> None:
    folder = parse_sampler(f"folder:{tmp_path}", MINI)
    with pytest.raises(DataError, match=r"No usable image in .*Put images there, or give another") as error:
        read_folder(folder.path, ["a dog"])
    assert "caption_from_name" not in str(error.value)
    (tmp_path / "a").touch()
    with pytest.raises(SamplerError, match="is a file; give a folder"):
        parse_sampler(f"folder:{tmp_path / 'a'}", MINI)


def test_the_ids_of_metrics_weights_are_whole_on_a_narrow_screen(monkeypatch, capfd) -> None:
    from scalewise.common import console

    monkeypatch.setattr(console.out, "width", 40)
    with pytest.raises(SystemExit):
        main(["metrics"])
    text = capfd.readouterr().out
    assert "…" not in text
    assert all(extra.source in text for extra in EXTRAS.values() if extra.source)

"""Shells leave "~" in `data.path=~/x`, `--out=~/x` and `student:~/x`; it is the home folder in every path."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

import scalewise
from scalewise import mini
from scalewise.cli import app, main
from scalewise.cli.arguments import HomeCommand
from scalewise.common.paths import expand_home
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.evaluation.samplers import parse_sampler
from scalewise.metrics import EXTRAS
from scalewise.metrics.extras import parse_metric
from scalewise.models.lora import load_student
from scalewise.training import setup

MAKING, MEASURING = "scalewise.cli.run_making", "scalewise.cli.run_measuring"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.yaml").write_text(find_recipe("mini").to_yaml(), encoding="utf-8")
    return home


def test_only_a_leading_tilde_is_the_home_folder(home):
    assert expand_home("~/a b") == f"{home}/a b" and expand_home("~") == str(home)
    for name in ("org/name", "./~", "a~b", "", "mini", "/x/~/y", "~nobody-of-that-name/x"):
        assert expand_home(name) == name


@pytest.mark.parametrize("key", ["model.base", "model.vae", "data.path"])
def test_every_path_of_a_recipe_may_begin_with_it(home, key):
    part, name = key.split(".")
    recipe = find_recipe("mini")
    changed = [
        recipe.override([f"{key}=~/some#1"]),
        recipe.with_values({key: "~/some#1"}),
        Recipe.from_mapping({**recipe.model_dump(mode="json"), part: {name: "~/some#1"}}),
    ]
    (home / "own.yaml").write_text(changed[0].to_yaml().replace(str(home), "~"), encoding="utf-8")
    assert "~/some#1" in (home / "own.yaml").read_text(encoding="utf-8")
    changed.append(find_recipe("~/own.yaml"))
    for one in changed:
        assert getattr(getattr(one, part), name) == f"{home}/some#1"
    kept = recipe.override([f"{key}=org/~name"])
    assert getattr(getattr(kept, part), name) == "org/~name"


def test_a_recipes_other_texts_stay_as_typed():
    recipe = find_recipe("mini").override(["name=~/x", "teacher.negative_prompt=~/y", "about=~"])
    assert (recipe.name, recipe.teacher.negative_prompt, recipe.about) == ("~/x", "~/y", "~")


@pytest.mark.parametrize(
    ("called", "words"),
    [
        (f"{MAKING}.run_generate", "generate ~/mine.yaml data.path=~/d --prompts=~/p.txt --out=~/o"),
        (f"{MAKING}.run_distill", "distill ~/mine.yaml model.vae=~/v --out=~/o"),
        (f"{MAKING}.export_student", "export ~/s ~/o.safetensors --base=~/b --schedule=~/mine.yaml"),
        (f"{MEASURING}.run_spectrum", "spectrum ~/mine.yaml --data=~/d --out=~/o"),
        (f"{MEASURING}.run_evaluate",
         "evaluate ~/mine.yaml teacher --prompts=~/p --scorer=~/c --reference=~/r --out=~/o"),
        (f"{MEASURING}.run_bench", "bench ~/mine.yaml --out=~/o"),
        (f"{MEASURING}.run_studies", "study losses --out=~/o"),
        ("scalewise.cli.run_planning.run_plan", "plan ~/mine.yaml"),
        ("scalewise.cli.demo.run_demo", "demo --out=~/o"),
    ],
)  # fmt: skip
def test_every_path_of_a_command_may_begin_with_it(home, monkeypatch, called, words):
    got: list[Any] = []
    monkeypatch.setattr(called, lambda *args, **kwargs: got.extend([*args, kwargs]))
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code in (0, None)
    got[-1].pop("typed", None)  # words to be printed as they were typed
    # What is printed again as it was typed keeps it.
    text = repr([{k: v for k, v in g.items() if k != "arguments"} if isinstance(g, dict) else g for g in got])
    assert "'~" not in text and "=~" not in text
    assert text.count(str(home)) >= words.count("=~/")


def test_prompts_are_not_taken_for_paths(home, monkeypatch):
    got: list[Any] = []
    monkeypatch.setattr(f"{MAKING}.sample_images", lambda *args: (got.extend(args), ([], 0.0))[1])
    monkeypatch.setattr(f"{MEASURING}.run_bench", lambda *args: got.extend(args))
    for words in (["sample", "~/a dog", "--student=~/s", "--base=~/b", "--out=~/o"],
                  ["bench", "mini", "--prompt", "~/a dog"]):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
    prompts, asked, out = got[:3]
    assert (prompts, asked.student, asked.base, out) == (["~/a dog"], f"{home}/s", f"{home}/b", home / "o")
    assert "~/a dog" in got


def test_every_command_reads_it():
    commands = typer.main.get_command(app).commands
    assert len(commands) == 12 and all(isinstance(c, HomeCommand) for c in commands.values())


def test_samplers_metrics_and_students_may_begin_with_it(home, monkeypatch):
    shutil.copy(mini.STUDENT, home / "student.safetensors")
    (home / "images").mkdir()
    recipe = find_recipe("mini")
    assert parse_sampler("mine=student:~/student.safetensors", recipe).path == home / "student.safetensors"
    assert parse_sampler("folder:~/images", recipe).path == home / "images"
    named = next(name for name, extra in EXTRAS.items() if extra.source is not None)
    assert parse_metric(f"{named}=~/weights", EXTRAS)[1] == f"{home}/weights"
    assert load_student("~/student.safetensors").base == "mini"
    monkeypatch.setenv("SCALEWISE_CACHE", "~/elsewhere")
    assert setup.cache_folder() == home / "elsewhere"
    monkeypatch.delenv("SCALEWISE_CACHE")
    assert setup.cache_folder() == home / ".cache" / "scalewise"


def test_python_reads_it_too(home, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr("scalewise.api.rows_of", lambda recipe, out, *_, **__: seen.append(out) or [])
    assert scalewise.distill("~/mine.yaml", "~/run") == home / "run" / "student.safetensors"
    assert seen == [home / "run"]

    class Found(Exception):
        pass

    def family_of(folder: str) -> SimpleNamespace:
        seen.append(folder)
        raise Found

    monkeypatch.setattr("scalewise.pipelines.family_of", family_of)
    with pytest.raises(Found):
        scalewise.load("~/base", student="~/student")
    assert seen[-1] == f"{home}/base"

"""Every checkpoint is a student, previews are labelled and shown, and what a run says about itself."""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_run import make_tiny

from scalewise.cli.run_making import SampleOptions, export_student, format_losses, report_run, sample_images
from scalewise.common import checkpoint, console
from scalewise.common.images import contact_sheet
from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.presets.published import PUBLISHED
from scalewise.config.recipe import Recipe
from scalewise.evaluation.samplers import parse_sampler
from scalewise.models.lora import StudentError, load_student
from scalewise.training import run as runs


@dataclass
class Run:
    recipe: Recipe
    out: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tiny")
    recipe = make_tiny(folder).override(["train.iterations=4", "train.ema=0.5", "optimizer.lr=1e-2"])
    list(runs.distill(recipe, folder / "run", lambda *_: nullcontext(lambda _done: None)))
    return Run(recipe, folder / "run")


def test_a_checkpoint_is_the_student_that_would_be_shipped_then(run: Run) -> None:
    last, first = (load_student(run.out / "checkpoints" / f"step-00000{n}") for n in (4, 2))
    shipped = load_student(run.out)
    for name, value in shipped.tensors.items():
        assert torch.equal(last.tensors[name].half().float(), value)
        assert value.ndim == 2
    assert any(not torch.equal(first.tensors[name], last.tensors[name]) for name in shipped.tensors)
    assert last.schedule == shipped.schedule and last.recipe == shipped.recipe
    assert (last.rank, last.alpha, last.base, last.denoiser) == (4, 4.0, run.recipe.model.base, "transformer")
    assert first.recipe["train"]["iterations"] == 2


def test_a_checkpoint_draws_is_exported_and_evaluated(run: Run, tmp_path: Path) -> None:
    path = run.out / "checkpoints" / "step-000002"
    files, _ = sample_images(["a dog"], SampleOptions(student=str(path)), tmp_path / "drawn")
    assert len(files) == 1 and files[0].exists()
    count = export_student(str(path), tmp_path / "out.safetensors", "diffusers", None)
    exported, own = load_student(tmp_path / "out.safetensors"), load_student(path)
    assert count == len(own.tensors)
    assert all(torch.equal(own.tensors[k].half().float(), v) for k, v in exported.tensors.items())
    contender = parse_sampler(f"student:{path}", run.recipe)
    assert contender.schedule == run.recipe.schedule.build() and contender.path == path


def test_a_run_without_a_student_names_its_newest_checkpoint(run: Run, tmp_path: Path) -> None:
    state, meta = checkpoint.load(run.out / "checkpoints" / "step-000002")
    checkpoint.save(tmp_path / "checkpoints" / "step-000002", state, meta=meta)
    with pytest.raises(StudentError, match=r"or a checkpoint, such as its newest one, .*step-000002"):
        load_student(tmp_path)


def test_tensorboard_gets_the_previews_and_the_learning_rates(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.out / "tensorboard")).Reload()
    assert [event.step for event in events.Images("samples")] == [4]
    for role in ("student", "fake"):
        rates = [event.value for event in events.Scalars(f"{role}/lr")]
        assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])  # of a warm-up of ten iterations


def test_sheets_have_titles_above_columns_and_captions_above_rows() -> None:
    grey = [np.full((40, 60, 3), 128, np.uint8)] * 4
    bare = np.asarray(contact_sheet(grey, columns=2))
    page = np.asarray(
        contact_sheet(grey, columns=2, titles=["t 1000", "t 500"], captions=["a dog", "a cat " * 99])
    )
    assert page.shape[1] == bare.shape[1] and page.shape[0] > bare.shape[0]
    is_text = (page < 100).all(axis=2).any(axis=1)
    starts = np.flatnonzero(np.diff(is_text.astype(int)) == 1)
    assert len(starts) >= 3, "a line of titles and two of captions"
    assert int((page == 128).all(axis=2).sum()) >= 4 * 40 * 60, "no image is written over"


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_real_models_draw_previews(name: str) -> None:
    train = find_recipe(name).train
    assert len(train.sample_prompts) == 4 and train.sample_every == 250


def test_the_bar_shows_the_losses(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    row = {"iteration": 3.0, "mmd": 0.01234, "gan": 0.7, "mmd/gradient_norm": 5.0}
    assert format_losses(row) == "mmd 0.0123, gan 0.7"
    shown = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(console, "err", Console(file=shown, force_terminal=True, width=160))
        with console.progress("distilling", 2) as done:
            done(1, format_losses(row))
    assert "mmd 0.0123, gan 0.7" in shown.getvalue()
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("distilling", 2) as done:
        done(1, format_losses(row))
    assert capsys.readouterr().err.rstrip().endswith("; mmd 0.0123, gan 0.7")


def test_the_last_lines_say_what_is_there_and_what_comes_next(run: Run, capsys) -> None:
    report_run(run.recipe, run.out)
    text = capsys.readouterr().out
    assert f"The student is {run.out / 'student.safetensors'}" in text
    assert f"previews: {run.out / 'samples' / 'iteration-000004.png'}" in text
    assert text.rstrip().endswith(f"Next: scalewise sample 'a dog' --student {run.out}")


def test_about_names_what_overrides_changed() -> None:
    recipe = find_recipe("mini")
    changed = recipe.override(["loss.mmd_only=true", "train.seed=0"])
    assert changed.about == f"{recipe.about} (changed: loss.mmd_only)"
    again = changed.override(["train.batch=3", "loss.mmd_only=true"])
    assert again.about == f"{recipe.about} (changed: loss.mmd_only, train.batch)"
    assert recipe.override(["train.batch=3", "about=mine"]).about == "mine"
    assert recipe.override([]).about == recipe.about
    assert all("changed" not in find_recipe(name).about for name in RECIPES)

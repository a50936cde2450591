"""Resuming a run: one command at a time, and only with the recipe, dataset and base it was started with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny_run import PROMPTS, make_tiny

from scalewise import cli
from scalewise.common import checkpoint, distributed
from scalewise.common.checkpoint import CheckpointError
from scalewise.common.errors import TrainingInterrupted
from scalewise.common.locks import FolderInUse, locked
from scalewise.config.recipe import Recipe
from scalewise.data.synthetic import generate
from scalewise.models import SD3
from scalewise.training import run, setup


def silent(_what: str, _total: int):
    return nullcontext(lambda _done, **_: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> list[dict[str, float]]:
    return list(run.distill(recipe, out, silent, resume=resume))


def start(recipe: Recipe, out: Path, *options: str, ignored: int | None = None) -> subprocess.Popen[str]:
    """`scalewise distill` in its own process, with signals as sent by a terminal."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")

    def signals() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.default_int_handler
                          if number == signal.SIGINT else signal.SIG_DFL)  # fmt: skip

    return subprocess.Popen(
        [sys.executable, "-m", "scalewise", "distill", str(file), "--out", str(out), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=signals,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def wait_for_rows(out: Path, rows: int, process: subprocess.Popen[str]) -> None:
    log = out / "log.jsonl"
    for _ in range(4000):
        if log.exists() and len(log.read_text().splitlines()) >= rows:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def endless(recipe: Recipe) -> Recipe:
    return recipe.override(["train.iterations=100000", "train.checkpoint_every=100000"])


def test_a_second_resume_is_refused_while_the_first_one_runs(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(endless(recipe), out)
    try:
        wait_for_rows(out, 2, first)
        with pytest.raises(FolderInUse, match=r"run is in use by another command that is still running"):
            train(recipe, out, resume=True)
    finally:
        first.send_signal(signal.SIGINT)
        output = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "Stopped by SIGINT" in output
    rows = [json.loads(line)["iteration"] for line in (out / "log.jsonl").open()]
    assert rows == list(range(1, len(rows) + 1))
    train(recipe.override([f"train.iterations={len(rows) + 1}"]), out, resume=True)  # free again


def test_the_folder_is_locked_before_data_are_prepared(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(setup, "prepare_data", lambda *_, **__: pytest.fail("data were prepared"))
    with locked(tmp_path / "run"), pytest.raises(FolderInUse):
        train(recipe, tmp_path / "run")


def test_a_closed_terminal_saves_as_sigterm_does(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(endless(recipe), out)
    wait_for_rows(out, 2, process)
    process.send_signal(signal.SIGHUP)
    assert "Stopped by SIGHUP" in process.communicate(timeout=60)[0]
    assert process.returncode == 129
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None and run.iteration_of(newest) >= 2


def test_under_nohup_a_closed_terminal_does_not_stop_a_run(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(endless(recipe), out, ignored=signal.SIGHUP)
    wait_for_rows(out, 2, process)
    process.send_signal(signal.SIGHUP)
    wait_for_rows(out, len((out / "log.jsonl").read_text().splitlines()) + 3, process)
    process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM" in process.communicate(timeout=60)[0]
    assert process.returncode == 143


def test_ctrl_c_always_ends_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """During a study's training, which stops after an iteration, and during other work of a command."""
    from scalewise.cli import run_measuring

    for stops, code in (
        (TrainingInterrupted("SIGINT", 3), 130),
        (TrainingInterrupted("SIGTERM", 3), 143),
        (KeyboardInterrupt(), 130),
    ):

        def run_studies(*_: object, error: BaseException = stops, **__: object) -> None:
            raise error

        monkeypatch.setattr(run_measuring, "run_studies", run_studies)
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", "losses"])
        assert ended.value.code == code
    assert "Stopped by SIGINT after iteration 3" in capsys.readouterr().err


def test_a_kill_ends_other_commands_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalewise.cli import run_measuring

    monkeypatch.setattr(run_measuring, "run_studies", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", "losses"])
    finally:
        signal.signal(signal.SIGHUP, inherited)
    assert ended.value.code == 129


@pytest.mark.parametrize("change", ["optimizer.lr=1e-2", "train.iterations=1"])
def test_resuming_a_finished_run_changes_nothing(recipe: Recipe, tmp_path: Path, change: str) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="is finished after 2 iterations and nothing was changed"):
        rows = train(recipe.override(["train.iterations=2", change]), tmp_path, resume=True)
    assert rows == [{"iteration": 2}]
    assert contents(tmp_path) == before


def test_a_student_written_later_has_the_learning_rate_it_was_trained_with(
    recipe: Recipe, tmp_path: Path
) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    (tmp_path / "student.safetensors").unlink()
    train(recipe.override(["train.iterations=2", "optimizer.lr=1e-2"]), tmp_path, resume=True)
    from scalewise.models.lora import load_student

    assert load_student(tmp_path).recipe["optimizer"]["lr"] == recipe.optimizer.lr
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").optimizer == recipe.optimizer


def test_a_run_resumes_with_a_moved_dataset_and_a_moved_base(recipe: Recipe, tmp_path: Path) -> None:
    """The result is bit-identical."""
    train(recipe.override(["train.iterations=4"]), tmp_path / "whole")
    train(recipe.override(["train.iterations=2"]), tmp_path / "run")
    shutil.copytree(recipe.model.base, tmp_path / "base")
    shutil.copytree(recipe.data.path, tmp_path / "set")
    moved = recipe.override(
        [f"model.base={tmp_path / 'base'}", f"data.path={tmp_path / 'set'}", "train.iterations=4"]
    )
    rows = train(moved, tmp_path / "run", resume=True)
    assert [row["iteration"] for row in rows] == [2, 3, 4]
    ends = [(tmp_path / n / "checkpoints" / "step-000004" / "tensors.safetensors") for n in ("whole", "run")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_another_dataset_at_the_same_path_is_rejected(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(recipe.data.path, tmp_path / "set")
    own = recipe.with_values({"data.path": str(tmp_path / "set"), "train.iterations": 2})
    train(own, tmp_path / "run")
    shutil.rmtree(tmp_path / "set")
    for _ in generate(setup.teacher(own), own, PROMPTS, tmp_path / "set", count=12, batch=6, seed=5):
        pass
    with pytest.raises(CheckpointError, match=r"The dataset .*set is not the one .* its contents differ"):
        train(own.override(["train.iterations=3"]), tmp_path / "run", resume=True)


def test_a_changed_base_is_rejected_with_the_components_that_differ(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(recipe.model.base, tmp_path / "base")
    own = recipe.with_values({"model.base": str(tmp_path / "base"), "train.iterations": 2})
    train(own, tmp_path / "run")
    other = SD3.tiny()
    for parameter in other.denoiser.parameters():
        parameter.data += 0.01
    other.save(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"base is not the one .* the files of transformer differ"):
        train(own.override(["train.iterations=3"]), tmp_path / "run", resume=True)


def test_another_number_of_processes_must_keep_the_samples_per_update(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    path = tmp_path / "checkpoints" / "step-000002"
    state, meta = checkpoint.load(path)
    assert meta["origin"]["processes"] == distributed.world() == 1
    meta["origin"]["processes"] = 2
    checkpoint.save(path, state, meta=meta)
    longer = recipe.override(["train.iterations=3"])
    message = r"8 samples per update \(2 processes .*, but this run has 4 .*Start 2 processes"
    with pytest.raises(CheckpointError, match=message):
        train(longer, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"this run has 16"):
        train(longer.override(["train.accumulate=4"]), tmp_path, resume=True)
    with pytest.warns(UserWarning, match="the samples of an update are the same"):
        rows = train(longer.override(["train.accumulate=2"]), tmp_path, resume=True)
    assert [row["iteration"] for row in rows] == [2, 3]


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    path = tmp_path / "checkpoints" / "step-000002"
    state, meta = checkpoint.load(path)
    del meta["origin"]
    checkpoint.save(path, state, meta=meta)
    with pytest.warns(UserWarning, match="does not record which dataset and base it was trained on"):
        train(recipe.override(["train.iterations=3"]), tmp_path, resume=True)


def test_other_images_at_the_same_path_cause_a_warning(tmp_path: Path) -> None:
    """Encoding on another device changes the latents of the same images, so the run is allowed to resume."""
    from scalewise.config.presets import find_recipe
    from scalewise.training.origin import Origin, check_resume

    recipe = find_recipe("mini")
    was = Origin(1, "a", "images", {"transformer": "t"})
    meta = {"recipe": recipe.model_dump(mode="json"), "origin": was.to_dict()}
    now = Origin(1, "b", "images", {"transformer": "t"})
    with pytest.warns(UserWarning, match="latents of mini differ"):
        check_resume(tmp_path / "step-000002", meta, recipe, now)
    with pytest.raises(CheckpointError, match=r"data\.path is"), pytest.warns(UserWarning, match="differ"):
        check_resume(tmp_path / "step-000002", meta, recipe.override(["data.path=x"]), now)

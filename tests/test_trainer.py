"""The training loop: exact resume, stopping, output files, rejected input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_run import make_tiny

from scalewise.common import checkpoint
from scalewise.common.errors import TrainingStopped
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.method import losses
from scalewise.models.lora import load_student
from scalewise.training import run, setup
from scalewise.training.trainer import Trainer


def silent(_what: str, _total: int):
    return nullcontext(lambda _done: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> list[dict[str, float]]:
    return list(run.distill(recipe, out, silent, resume=resume))


def final_state(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    state, _ = checkpoint.load(newest)
    flat: dict[str, torch.Tensor] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, torch.Tensor):
            flat[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                walk(inner, f"{path}/{key}")
        elif isinstance(value, int | float):
            flat[path] = torch.tensor(value)

    walk(state, "")
    return flat


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    "extra", [[], ["loss.dmd.weight=0", "loss.gan.weight=0", "loss.mmd.features=teacher"]]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    recipe: Recipe, tmp_path: Path, extra: list[str]
) -> None:
    recipe = recipe.override(["train.accumulate=2", "train.ema=0.9", *extra])
    train(recipe, tmp_path / "whole")
    train(recipe.override(["train.iterations=4"]), tmp_path / "halves")
    train(recipe, tmp_path / "halves", resume=True)
    whole, halves = final_state(tmp_path / "whole"), final_state(tmp_path / "halves")
    assert any("average" in key for key in whole) and any("optimizer" in key for key in whole)
    assert_bit_equal(whole, halves)
    log = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in map(json.loads, (tmp_path / n / "log.jsonl").open())
        ]
        for n in ("whole", "halves")
    ]
    assert log[0] == log[1] and len(log[0]) == 6


def run_as_a_process(recipe: Recipe, out: Path, *, resume: bool = False) -> subprocess.Popen[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "scalewise", "distill", str(file), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--resume"] if resume else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_iteration(out: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        log = out / "log.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= iteration:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


def test_a_killed_run_resumes_bit_identically(recipe: Recipe, tmp_path: Path) -> None:
    whole = run_as_a_process(recipe, tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()[0]
    killed = run_as_a_process(recipe, tmp_path / "killed")
    wait_for_iteration(tmp_path / "killed", 3, killed)
    killed.kill()
    killed.wait()
    newest = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert newest is not None and newest.name == "step-000002", "no more than the interval is lost"
    again = run_as_a_process(recipe, tmp_path / "killed", resume=True)
    assert again.wait() == 0, again.communicate()[0]
    assert_bit_equal(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def test_sigterm_saves_after_the_iteration_and_exits_non_zero(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.override(["train.iterations=100000", "train.checkpoint_every=100000"])
    process = run_as_a_process(recipe, tmp_path / "run")
    wait_for_iteration(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143
    assert "Stopped by SIGTERM" in output and "--resume" in output
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and int(newest.name[5:]) >= 2


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = losses.mmd_linear, []

    def breaks_later(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **options) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(losses, "mmd_linear", breaks_later)
    with pytest.raises(TrainingStopped, match=r"'mmd' became nan.*iteration 4.*step-000002"):
        train(recipe, tmp_path)
    state, _ = checkpoint.load(tmp_path / "checkpoints" / "step-000002")
    assert all(torch.isfinite(v).all() for v in state["student"].values())


def test_a_checkpoint_of_another_recipe_is_rejected_with_the_difference(
    recipe: Recipe, tmp_path: Path
) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay is 0\.01 in the checkpoint and 0\.5 now"):
        train(recipe.override(["optimizer.weight_decay=0.5"]), tmp_path, resume=True)


def test_a_finished_folder_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe.override(["train.iterations=1"]), tmp_path)
    with pytest.raises(RecipeError, match="--resume"):
        train(recipe, tmp_path)


def test_a_run_writes_recipe_versions_log_samples_and_a_student_with_its_schedule(
    recipe: Recipe, tmp_path: Path
) -> None:
    train(recipe, tmp_path)
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())
    assert list((tmp_path / "tensorboard").iterdir()) and list((tmp_path / "samples").glob("*.png"))
    student = load_student(tmp_path)
    assert student.schedule == recipe.schedule.build() and student.rank == 4
    assert Recipe.from_mapping(student.recipe) == recipe


def test_every_loss_of_every_role_is_logged(recipe: Recipe, tmp_path: Path) -> None:
    rows = train(recipe.override(["train.iterations=1"]), tmp_path)
    expected = {
        "mmd",
        "dmd",
        "gan",
        "mmd/gradient_norm",
        "dmd/gradient_norm",
        "gan/gradient_norm",
        "fake/denoising",
        "fake/discriminator",
        "student/gradient_norm",
        "fake/gradient_norm",
        "x0/mean",
        "x0/std",
        "x0/beyond_4_sigma",
        "seconds",
    }
    assert expected <= rows[-1].keys()


def test_mmd_alone_builds_no_fake_model_and_no_head(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.override(["loss.dmd.weight=0", "loss.gan.weight=0", "loss.mmd.features=teacher"])
    data = setup.prepare_data(recipe, silent)
    trainer = setup.build_trainer(recipe, data, tmp_path)
    assert trainer.backbone.roles.names == ("student",) and trainer.head is None and trainer.updates == 1
    assert not any("fake" in name for name, _ in trainer.backbone.model.denoiser.named_parameters())


def gradient_of_the_student(recipe: Recipe, tmp_path: Path) -> torch.Tensor:
    trainer: Trainer = setup.build_trainer(recipe, setup.prepare_data(recipe, silent), tmp_path)
    for role in (trainer.student, trainer.fake):
        role.apply = lambda iteration: 0.0  # keeps the gradients instead of stepping
    trainer.iterate()
    parameters = trainer.backbone.parameters("student").values()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_accumulation_averages_the_gradients_of_its_batches(recipe: Recipe, tmp_path: Path) -> None:
    two = recipe.override(["train.accumulate=2"])
    trainer: Trainer = setup.build_trainer(two, setup.prepare_data(two, silent), tmp_path)
    parts = []
    for piece in range(2):
        number = (trainer.iteration * trainer.updates + trainer.updates - 1) * 2 + piece
        trainer.step.student_step(trainer.batches.at(number, 0), trainer.batches.noise(number))
        parameters = trainer.backbone.parameters("student").values()
        parts.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for p in parameters:
            p.grad = None
    together = gradient_of_the_student(two, tmp_path)
    torch.testing.assert_close(together, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(parts[0], parts[1])


def test_disk_full_while_saving_keeps_the_earlier_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(checkpoint.CheckpointError, match="disk"):
        train(recipe, tmp_path, resume=True)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    checkpoint.load(newest)


def test_a_refused_resume_leaves_the_folder_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "recipe.yaml", tmp_path / "log.jsonl")}
    with pytest.raises(ValueError, match="another recipe"):
        train(recipe.override(["optimizer.weight_decay=0.5"]), tmp_path, resume=True)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_a_checkpoint_before_a_nan_loss_is_renamed_and_a_lower_learning_rate_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = losses.mmd_linear, []

    def breaks_fifth(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **options) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(losses, "mmd_linear", breaks_fifth)
    longer = recipe.override(["train.iterations=6"])
    with pytest.raises(
        TrainingStopped, match=r"iteration 5; .*renamed to nan-step-000004; .*good .*step-000002"
    ):
        train(longer, tmp_path)
    assert (tmp_path / "checkpoints" / "nan-step-000004").is_dir()
    with pytest.warns(UserWarning, match=r"optimizer.lr was .* up to step-000002 and is now 1e-06"):
        rows = train(longer.override(["optimizer.lr=1e-6"]), tmp_path, resume=True)
    assert [row["iteration"] for row in rows] == [2, 3, 4, 5, 6]


def test_a_truncated_last_line_of_the_log_does_not_prevent_resuming(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe.override(["train.iterations=2"]), tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"iteration": 3, "mm')
    train(recipe.override(["train.iterations=3"]), tmp_path, resume=True)
    assert log.read_text().startswith(whole) and len(log.read_text().splitlines()) == 3
    log.write_text('{"iterat\n' + whole)
    with pytest.raises(ValueError, match=r"Line 1 of .*log.jsonl is damaged"):
        train(recipe, tmp_path, resume=True)


def test_an_error_while_sampling_does_not_lose_a_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise OSError("the VAE failed")

    monkeypatch.setattr(run, "save_sample_grid", breaks)
    with pytest.raises(OSError, match="the VAE failed"):
        train(recipe.override(["train.sample_every=2"]), tmp_path)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_run_that_could_not_be_built_leaves_nothing_to_resume(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples of 8x8, but the schedule ends at 6x6"):
        train(recipe.override(["schedule.scales=['2', '6', '6', '6']"]), tmp_path / "run")
    train(recipe.override(["train.iterations=1"]), tmp_path / "run")


def test_precision_auto_is_resolved_once_and_kept_on_another_machine(recipe, tmp_path, monkeypatch):
    auto = recipe.override(["train.precision=auto", "train.iterations=1"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train(auto, tmp_path)
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").train.precision == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    rows = train(auto.override(["train.iterations=2"]), tmp_path, resume=True)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").train.precision == "bf16"


def test_a_nan_loss_in_another_process_stops_this_one_too(recipe, tmp_path, monkeypatch):
    trainer = setup.build_trainer(recipe, setup.prepare_data(recipe, silent), tmp_path)
    monkeypatch.setattr("scalewise.common.distributed.any_of", lambda flag: True)
    with pytest.raises(TrainingStopped, match="'a term of another process' became nan at iteration 1"):
        list(trainer.fit())


@pytest.mark.parametrize("timesteps", [[1000, 500], [1000, 700, 400], [1000, 900, 800, 700, 600, 500]])
def test_all_updates_of_an_iteration_train_one_step_and_all_steps_are_trained_equally(
    recipe, tmp_path, timesteps
):
    """If the batch number chose the step, five fake updates would never train the last of six steps."""
    scales = ["4", *["6"] * (len(timesteps) - 2), "8"]
    changed = recipe.override(
        [f"schedule.timesteps={timesteps}", f"schedule.scales={scales}", "loss.fake.updates=5"]
    )
    trainer = setup.build_trainer(changed, setup.prepare_data(changed, silent), tmp_path)
    seen = dict[str, list[int]](fake=[], student=[])

    def note(role: str):
        return lambda batch, rng, share: seen[role].append(batch.index) or {}

    trainer.step.student_step, trainer.step.fake_step = note("student"), note("fake")
    trainer.student.apply = trainer.fake.apply = lambda iteration: 0.0
    for trainer.iteration in range(2 * len(timesteps)):
        trainer.iterate()
    steps = len(timesteps)
    assert seen["student"] == [*range(steps)] * 2
    assert seen["fake"] == [step for step in seen["student"] for _ in range(5)]

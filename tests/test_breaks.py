"""Settings that a run could silently ignore: each is tested by the numbers it changes.

Every test here was seen to fail while what it is about was broken on purpose (docs/log.md lists the breaks).
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import make_tiny

from scalewise.common import distributed
from scalewise.config.recipe import Recipe
from scalewise.data.batches import Batches
from scalewise.models.lora import load_student
from scalewise.training import run, setup
from scalewise.training.trainer import RoleOptimizer, Trainer


def silent(_what: str, _total: int):
    return nullcontext(lambda _done: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def trainer_of(recipe: Recipe, out: Path) -> Trainer:
    return setup.build_trainer(recipe, setup.prepare_data(recipe, silent), out)


def batches_of(recipe: Recipe, data: setup.Data | None = None) -> Batches:
    data = data or setup.prepare_data(recipe, silent)
    return setup.batches_for(recipe, data, setup.training_backbone(recipe, data))


def live_weights(trainer: Trainer) -> torch.Tensor:
    """The student's weights that are trained, in one vector."""
    return flat(trainer.backbone.parameters("student"))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].detach().float().flatten() for name in sorted(tensors)]).clone()


@pytest.fixture(scope="module")
def averaged(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory):
    """A run of four iterations with an average: the live weights before it and after each, and its folder."""
    out = tmp_path_factory.mktemp("averaged")
    recipe = recipe.override(
        ["train.ema=0.3", "optimizer.lr=0.01", "optimizer.warmup=0", "train.iterations=4"]
    )
    data = setup.prepare_data(recipe, silent)
    trainer = setup.build_trainer(recipe, data, out)
    seen = [live_weights(trainer)]
    seen += [live_weights(trainer) for _ in trainer.fit()]
    (out / "samples").mkdir()
    run.finish(trainer, data)
    return trainer, seen, out


def test_the_average_follows_the_students_weights_by_its_decay(averaged) -> None:
    """Decay (1 + i) / (10 + i) at first, never above train.ema: 1/10, 2/11, 3/12, and 0.3 from then on."""
    trainer, seen, _ = averaged
    expected = seen[0]
    for decay, live in zip((1 / 10, 2 / 11, 3 / 12, 0.3), seen[1:], strict=True):
        expected = decay * expected + (1 - decay) * live
    torch.testing.assert_close(flat(trainer.average.shadow), expected, rtol=1e-5, atol=1e-7)
    assert (expected - seen[0]).abs().max() > 0.02, "four updates of 0.01 move a weight by up to 0.04"


def test_the_saved_student_is_the_average_and_not_the_last_weights(averaged) -> None:
    trainer, seen, out = averaged
    found = load_student(out).match_to(trainer.backbone.model.denoiser).tensors
    shipped = torch.cat([found[name].float().flatten() for name in sorted(found)])
    average = trainer.average.shadow
    expected = torch.cat([average[name].float().flatten() for name in sorted(average)])
    apart = (expected - seen[-1]).norm()
    assert (shipped - expected).norm() < 0.1 * apart, "half precision rounds by less"
    assert (shipped - seen[-1]).norm() > 0.9 * apart


def test_without_an_average_the_last_weights_are_the_student(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.override(["train.ema=null", "optimizer.lr=0.01", "train.iterations=2"])
    trainer = trainer_of(recipe, tmp_path)
    *_, _last = trainer.fit()
    assert torch.equal(flat(trainer.student_weights()), live_weights(trainer))


def first_moments(side: RoleOptimizer) -> float:
    """Norm of AdamW's first moments, which after one update are (1 - beta1) times the gradient."""
    states = side.optimizer.state.values()
    return float(torch.cat([state["exp_avg"].flatten() for state in states]).norm())


@pytest.mark.parametrize("clip", [1e-4, 1e4])
def test_gradients_are_clipped_for_both_optimizers_and_logged_as_they_were(
    recipe: Recipe, tmp_path: Path, clip: float
) -> None:
    recipe = recipe.override([f"optimizer.clip={clip}", "optimizer.betas=[0.9, 0.99]", "loss.fake.updates=1"])
    trainer = trainer_of(recipe, tmp_path)
    row = trainer.iterate()
    for name, side in (("student", trainer.student), ("fake", trainer.fake)):
        norm = row[f"{name}/gradient_norm"]
        assert 1e-4 < norm < 1e4
        assert side is not None
        assert first_moments(side) == pytest.approx(0.1 * min(norm, clip), rel=1e-3), name


def test_student_and_fake_model_have_their_own_learning_rates(recipe: Recipe, tmp_path: Path) -> None:
    """AdamW's first update changes a weight by the learning rate, for any gradient."""
    recipe = recipe.override(
        ["optimizer.lr=1e-3", "optimizer.fake_lr=4e-3", "optimizer.weight_decay=0", "optimizer.warmup=0",
         "loss.fake.updates=1"]
    )  # fmt: skip
    trainer = trainer_of(recipe, tmp_path)
    sides = {"student": trainer.student, "fake": trainer.fake}
    before = {name: [p.detach().clone() for p in side.parameters] for name, side in sides.items() if side}
    trainer.iterate()
    for name, rate in (("student", 1e-3), ("fake", 4e-3)):
        moved = [
            float((p.detach() - old).abs().max())
            for p, old in zip(sides[name].parameters, before[name], strict=True)
        ]
        assert max(moved) == pytest.approx(rate, rel=0.01), name
    same = trainer_of(recipe.override(["optimizer.fake_lr=null"]), tmp_path)
    assert same.fake is not None and same.fake.lr == 1e-3


def test_sampled_steps_are_uniform_and_independent(recipe: Recipe) -> None:
    batches = batches_of(recipe.override(["train.step_choice=sampled"]))
    steps = [batches.index_at(position) for position in range(4000)]
    counts = Counter(steps)
    assert sorted(counts) == [0, 1, 2, 3]
    # 1000 each; five standard deviations of a binomial count are 137.
    assert all(863 < count < 1137 for count in counts.values())
    followers = Counter(pairwise(steps))
    # Each of the 16 pairs 250 times; five standard deviations are 77.
    assert len(followers) == 16 and all(173 < count < 327 for count in followers.values())
    assert [batches.at(position).index for position in range(8)] == steps[:8]
    levels = recipe.schedule.timesteps
    assert [batches.at(position).t for position in range(8)] == [levels[step] for step in steps[:8]]


def test_a_run_with_sampled_steps_trains_them_all(recipe: Recipe, tmp_path: Path) -> None:
    cheap = recipe.override(
        ["train.step_choice=sampled", "train.iterations=10", "loss.mmd_only=true",
         "train.sample_prompts=[]"]
    )  # fmt: skip
    rows = list(run.distill(cheap, tmp_path, silent))[1:]
    batches = batches_of(cheap)
    steps = [int(row["step"]) for row in rows]
    assert set(steps) == {0, 1, 2, 3} and steps == [batches.index_at(i) for i in range(10)]


def rows_of(batch_rows: torch.Tensor, pool: torch.Tensor) -> list[int]:
    """Which rows of `pool` a batch consists of."""
    apart = (batch_rows[:, None] - pool[None]).flatten(2).abs().amax(-1)
    assert float(apart.amin(1).max()) < 1e-5, "every row of the batch is one of the pool"
    return apart.argmin(1).tolist()


@pytest.mark.parametrize("downscale", ["latent", "pixel"])
def test_latents_of_small_scales_follow_data_downscale(recipe: Recipe, downscale: str) -> None:
    """latent: the area average of the full latent, by torch; pixel: the latents derived by the VAE."""
    changed = recipe.override([f"data.downscale={downscale}"])
    data, batches = setup.prepare_data(changed, silent), batches_of(changed)
    (made,), every = data.sets, range(12)
    schedule = changed.schedule.build()
    full = made.latents(every, schedule.full)
    averaged = {s: F.interpolate(full, (s.height, s.width), mode="area") for s in schedule.scales}
    (derived,) = setup.prepare_data(recipe, silent).sets
    stored = {s: derived.latents(every, s) for s in schedule.scales}
    wanted = averaged if downscale == "latent" else stored
    for step in (1, 2, 3):
        batch = batches.at(step, step)
        rows = rows_of(batch.target, wanted[schedule.target(step)])
        small = wanted[schedule.source(step)][rows]
        size = tuple(batch.target.shape[-2:])
        expected = F.interpolate(small, size, mode="bicubic", align_corners=False)
        torch.testing.assert_close(batch.source, expected, rtol=1e-4, atol=1e-4)
    small = schedule.source(1)
    assert (averaged[small] - stored[small]).abs().max() > 0.1, "the two are not alike"


def test_a_set_of_the_full_scale_alone_trains_every_scale_by_latent_averages_without_the_vae(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = recipe.override(
        ["schedule.scales=['2', '4', '6', '8']", "train.iterations=4", "loss.mmd_only=true",
         "train.sample_prompts=[]"]
    )  # fmt: skip
    monkeypatch.setattr(setup, "derive_scales", lambda *_, **__: pytest.fail("latents were derived"))
    rows = list(run.distill(other.override(["data.downscale=latent"]), tmp_path / "latent", silent))
    assert [int(row["step"]) for row in rows[1:]] == [0, 1, 2, 3]


def test_every_process_reads_its_own_rows_and_together_those_of_one_larger_batch(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 2 by 2 processes are those of 4 by one; three make a pass over the 12 rows."""
    data = setup.prepare_data(recipe, silent)
    (made,) = data.sets
    full = made.latents(range(12), made.scales[-1])

    def read(batch: int, rank: int, world: int) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda: rank)
            patch.setattr(distributed, "world", lambda: world)
            batches = batches_of(recipe.override([f"train.batch={batch}"]), data)
        return [rows_of(batches.at(position, 3).target, full) for position in range(3)]

    whole, first, second = read(4, 0, 1), read(2, 0, 2), read(2, 1, 2)
    for together, one, other in zip(whole, first, second, strict=True):
        assert not set(one) & set(other)
        assert sorted(one + other) == sorted(together)
    assert sorted(row for rows in first + second for row in rows) == [*range(12)]


def test_every_bucket_of_shapes_is_trained_in_proportion_to_its_images(
    recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = {"wide": (24, 12), "tall": (12, 24), "square": (18, 18)}
    numbers = {"wide": 8, "tall": 4, "square": 4}
    for name, size in sizes.items():
        for i in range(numbers[name]):
            Image.new("RGB", size, (16 * i, 200, 90)).save(folder / f"{name}-{i}.png")
            (folder / f"{name}-{i}.txt").write_text(f"{name} {i}", encoding="utf-8")
    changed = recipe.override(
        [f"data.path={folder}", "data.shape=buckets", "train.batch=2", "loss.mmd_only=true"]
    )  # fmt: skip
    data = setup.prepare_data(changed, silent)
    rows = {tuple(max(s.scales, key=lambda x: x.cells).size): len(s) for s in data.sets}
    assert sorted(rows.values()) == [4, 4, 8] and len(rows) == 3
    batches = batches_of(changed)
    seen = Counter(tuple(batches.at(position, 3).target.shape[-2:]) for position in range(160))
    for size, count in rows.items():
        # Of 160 batches 80 and 40; four standard deviations are 25 and 22.
        assert abs(seen[size] - 160 * count / 16) < 26, size

"""Training iterations timed and weighed: bytes that are known, modes that share one base, verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import make_tiny

from scalewise.cli import main
from scalewise.common import console
from scalewise.config.recipe import Recipe
from scalewise.evaluation.training_cost import MODES, TrainingCost, measure_training, peak_bytes, ratios
from scalewise.metrics.intervals import Interval
from scalewise.studies.training_cost import CLAIMS, format_page, run_training_cost

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    two_steps = ["schedule.timesteps=[1000,600]", "schedule.scales=[4,8]", "loss.fake.updates=1"]
    return make_tiny(tmp_path_factory.mktemp("cost")).override(two_steps)


@pytest.fixture(scope="module")
def cost(tiny: Recipe) -> TrainingCost:
    return measure_training(tiny, rounds=2, progress=console.progress)


def test_peak_bytes_are_those_that_are_there_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(MB // 4)  # 1 MB
        second = torch.zeros(MB // 2)  # and 2
        total = first.sum() + second.sum()
        del first, second
        return total + torch.zeros(MB // 4).sum()  # 1 again

    assert peak_bytes(work, CPU) == pytest.approx(3 * MB, rel=0.01)


def test_peak_bytes_count_what_a_graph_keeps_and_not_what_was_there_before() -> None:
    weight = torch.nn.Parameter(torch.zeros(512, 512))  # 1 MB

    def work() -> None:
        x = torch.zeros(256, 512)  # 0.5 MB, kept for the weight's gradient
        y = (x @ weight).exp()  # the product 0.5, gone once exp, which is kept, is there
        y.view(-1).sum().backward()

    # x, y, the gradient of the sum (expanded, no bytes) and of the product, the weight's own: 0.5 * 3 + 1.
    assert peak_bytes(work, CPU) == pytest.approx(2.5 * MB, rel=0.01)


def test_all_modes_are_timed_and_weighed_on_one_base(tiny: Recipe, cost: TrainingCost) -> None:
    assert [mode.name for mode in cost.modes] == list(MODES)
    by_name = {mode.name: mode for mode in cost.modes}
    assert all(mode.seconds.value > 0 and mode.peak > mode.held > 0 for mode in cost.modes)
    full, mmd = by_name["scale-wise, full loss"], by_name["scale-wise, MMD alone"]
    # MMD alone has neither fake model nor head: weights and two moments less, and less to keep in mind.
    assert full.held > mmd.held and full.peak - full.held > mmd.peak - mmd.held
    assert by_name["full scale, full loss"].held == full.held
    assert set(cost.ratios) == {
        "scale-wise, full loss / full scale, full loss", "scale-wise, MMD alone / full scale, MMD alone",
        "scale-wise, full loss / scale-wise, MMD alone", "full scale, full loss / full scale, MMD alone",
    }  # fmt: skip
    assert cost.setting["batch"] == tiny.train.batch
    for claim in CLAIMS:
        assert claim.ratio in cost.ratios


def test_what_is_held_is_the_base_once_and_what_is_trained_with_its_moments(
    tiny: Recipe, cost: TrainingCost
) -> None:
    from scalewise.training import setup

    recipe = tiny.override(["loss.mmd_only=true"])
    trainer = setup.build_trainer(recipe, setup.prepare_data(recipe, console.progress), Path("unused"))
    trained = sum(p.numel() for p in trainer.backbone.parameters("student").values())
    everything = sum(p.numel() for p in trainer.backbone.model.denoiser.parameters())
    wanted = 4 * (everything - trained) + 4 * trained * (3 + (1 if recipe.train.ema else 0))
    assert next(m for m in cost.modes if m.name == "scale-wise, MMD alone").held == wanted


def test_more_samples_take_more_memory_and_checkpointing_takes_less(tiny: Recipe) -> None:
    def beyond(*changes: str) -> float:
        found = measure_training(
            tiny.override(["loss.mmd_only=true", *changes]), rounds=1, progress=console.progress
        )
        mode = next(m for m in found.modes if m.name == "full scale, MMD alone")
        return mode.peak - mode.held

    plain = beyond()
    assert beyond("train.batch=8") > 1.5 * plain
    assert beyond("train.gradient_checkpointing=true") < plain


def test_a_recipe_of_mmd_alone_has_no_other_loss_to_compare_with(tiny: Recipe) -> None:
    found = measure_training(tiny.override(["loss.mmd_only=true"]), rounds=1, progress=console.progress)
    assert [mode.name for mode in found.modes] == ["scale-wise, MMD alone", "full scale, MMD alone"]
    assert list(found.ratios) == ["scale-wise, MMD alone / full scale, MMD alone"]


def test_ratios_are_taken_within_rounds() -> None:
    laps = {"scale-wise, MMD alone": [1.0, 2.0, 3.0], "full scale, MMD alone": [2.0, 4.0, 5.0]}
    assert ratios(laps)["scale-wise, MMD alone / full scale, MMD alone"] == Interval(0.5, 0.5, 0.6)


def test_a_verdict_needs_the_whole_interval_on_the_papers_side() -> None:
    cheaper, _, more_expensive = CLAIMS
    assert cheaper.verdict(Interval(0.6, 0.5, 0.9), 6) == "reproduced"
    assert cheaper.verdict(Interval(0.9, 0.8, 1.1), 6) == "undecided"
    assert cheaper.verdict(Interval(1.2, 1.1, 1.3), 6) == "not reproduced"
    assert more_expensive.verdict(Interval(6.0, 5.0, 7.0), 6) == "reproduced"
    assert more_expensive.verdict(Interval(6.0, 5.0, 7.0), 5) == "undecided"  # a range, not an interval
    assert more_expensive.verdict(Interval(0.9, 0.8, 0.95), 6) == "not reproduced"


def test_the_command_writes_tables_and_numbers(
    tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny.override(["loss.mmd_only=true"]).to_yaml())
    with pytest.raises(SystemExit) as end:
        main(
            [
                "bench",
                str(tmp_path / "tiny.yaml"),
                "--training",
                "--rounds",
                "1",
                "--out",
                str(tmp_path / "b"),
            ]
        )
    assert not end.value.code
    found = json.loads((tmp_path / "b" / "training.json").read_text())
    assert [mode["name"] for mode in found["modes"]] == [n for n in MODES if "MMD" in n]
    assert (tmp_path / "b" / "training.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["bench", "mini", "teacher", "--training"])
    assert end.value.code and "remove the other arguments" in capsys.readouterr().err


def test_the_study_writes_its_page(
    tiny: Recipe, cost: TrainingCost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalewise.studies.training_cost.measure_training", lambda *_, **__: cost)
    verdicts = run_training_cost(tmp_path, rounds=2, progress=console.progress)
    assert json.loads((tmp_path / "training-cost.json").read_text())["verdicts"] == verdicts
    assert Image.open(tmp_path / "training-cost.png").size[0] > 400
    text = (tmp_path / "training-cost.md").read_text()
    assert text == format_page(cost, verdicts, 2)
    for claim in CLAIMS:
        assert f"| {claim.text} | **{verdicts[claim.text]}** |" in text

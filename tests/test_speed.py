"""The `bench` command: what it times, what it expects, and how the two are put together."""

from __future__ import annotations

import json
import time

import pytest
from diffusers import FlowMatchHeunDiscreteScheduler

from scalewise.cli import main
from scalewise.common import console
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.evaluation.evaluate import timed_sampler
from scalewise.evaluation.samplers import SamplerSpec, parse_samplers
from scalewise.evaluation.sampling_speed import (
    PROTOCOLS,
    Gain,
    build_protocol,
    compute_gain,
    count_flops,
    measure_speed,
    pairs_to_compare,
)
from scalewise.evaluation.timing import TimedSampler, time_parts
from scalewise.method.scales import ScaleSchedule
from scalewise.metrics.intervals import Interval
from scalewise.models import SD3


def test_pieces_add_up_to_their_part():
    now = [0.0]

    def work(*pieces):
        def run(mark):
            for seconds in pieces:
                now[0] += seconds
                if len(pieces) > 1:
                    mark()

        return run

    from contextlib import nullcontext

    parts = {"text": work(0.1), "denoiser": work(0.2, 0.5), "vae": work(0.4)}
    lap = time_parts(TimedSampler("it", lambda batch: nullcontext(parts)), 2, lambda: now[0])
    assert lap == pytest.approx(
        {"text": 50, "denoiser": 350, "denoiser/1": 100, "denoiser/2": 250, "vae": 200, "total": 600}
    )


def test_a_gain_is_taken_within_rounds_and_set_beside_the_operations():
    laps = {"slow": {"denoiser": [10.0, 30.0, 20.0]}, "quick": {"denoiser": [2.0, 6.0, 5.0]}}
    found = compute_gain(laps, {"slow": 1000.0, "quick": 160.0}, "quick", "slow", 8)
    assert found.measured == Interval(5.0, 4.0, 5.0)
    assert found.expected == 6.25
    assert found.reached.to_list() == pytest.approx([0.8, 0.64, 0.8])
    assert found == Gain("quick", "slow", 8, Interval(5.0, 4.0, 5.0), 6.25)


def test_a_gain_is_of_the_one_with_fewer_operations_whoever_is_named_first():
    recipe = find_recipe("mini")
    contenders = parse_samplers(["undistilled:full", "undistilled", "teacher:2", "b=undistilled"], recipe)
    flops = {"undistilled, full scale": 4.0, "undistilled": 2.0, "teacher, 2 steps": 3.0, "b": 2.0}
    assert pairs_to_compare(contenders, flops) == [
        ("undistilled, full scale", "undistilled"), ("undistilled, full scale", "teacher, 2 steps"),
        ("undistilled, full scale", "b"), ("teacher, 2 steps", "undistilled"), ("teacher, 2 steps", "b"),
    ]  # fmt: skip


def test_the_operations_expected_are_those_of_the_schedules():
    recipe = find_recipe("mini")
    named = ["teacher", "two=teacher:2", "full=undistilled:full", "small=undistilled"]
    flops = count_flops(recipe, parse_samplers(named, recipe), console.progress)
    # 28 and 2 steps of two forwards each, against four of one.
    assert flops["teacher"] / flops["full"] == pytest.approx(2 * 28 / 4)
    assert flops["teacher"] / flops["two"] == pytest.approx(14)
    # 564 of 1,024 tokens, attention growing faster than them: a little less than that.
    assert 1.5 < flops["full"] / flops["small"] < 1024 / 564


def test_protocols_are_the_papers_and_an_honest_one():
    paper = build_protocol("paper", batches=None, rounds=None, compiled=None)
    assert (paper.batches, paper.rounds, paper.compiled, paper.half) == ((8,), 100, True, True)
    changed = build_protocol("honest", batches=[4], rounds=3, compiled=True)
    assert (changed.batches, changed.rounds, changed.compiled, changed.half) == ((4,), 3, True, False)
    assert PROTOCOLS["honest"].batches == (1, 8)
    with pytest.raises(RecipeError, match="Unknown protocol 'best'; choose honest or paper"):
        build_protocol("best", batches=None, rounds=None, compiled=None)
    with pytest.raises(RecipeError, match="at least 1; got 0"):
        build_protocol("paper", batches=[0], rounds=None, compiled=None)


@pytest.fixture
def tiny(tmp_path):
    """A recipe for a model that takes milliseconds."""
    SD3.tiny().save(tmp_path / "model")
    changes = [
        f"model.base={tmp_path / 'model'}", "schedule.timesteps=[1000,500]", "schedule.scales=[4,8]",
        "teacher.steps=3", "loss.feature_block=0",
    ]  # fmt: skip
    return find_recipe("mini-mmd").override(changes)


def test_every_part_and_step_is_timed(tiny):
    protocol = build_protocol("honest", batches=[1, 2], rounds=2, compiled=None)
    found = measure_speed(tiny, [], protocol, caption="a cat", progress=console.progress)
    assert [(t.name, t.batch) for t in found.timings] == [
        (name, batch) for batch in (1, 2) for name in ("teacher", "full-scale", "scale-wise")
    ]
    for timing in found.timings:
        steps = [part for part in timing.parts if part.startswith("denoiser/")]
        assert len(steps) == (3 if timing.name == "teacher" else 2)
        assert all(spread.value > 0 for spread in timing.parts.values())
    assert [(g.name, g.over) for g in found.gains[:3]] == [
        ("full-scale", "teacher"), ("scale-wise", "teacher"), ("scale-wise", "full-scale")
    ]  # fmt: skip
    assert found.gains[0].expected == pytest.approx(2 * 3 / 2)
    assert found.setting["versions"]["torch"] and found.setting["compiled"] is False


def test_half_precision_is_what_the_paper_protocol_computes_in(tiny):
    protocol = build_protocol("paper", batches=[1], rounds=1, compiled=False)
    found = measure_speed(tiny, ["undistilled"], protocol, caption="a cat", progress=console.progress)
    assert found.setting["dtype"] in ("float16", "bfloat16") and found.gains == []


def test_the_command_writes_tables_and_numbers(tiny, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny.to_yaml())
    with pytest.raises(SystemExit) as end:
        main(
            [
                "bench",
                str(tmp_path / "tiny.yaml"),
                "--rounds",
                "1",
                "--batch",
                "2",
                "--out",
                str(tmp_path / "b"),
            ]
        )
    assert not end.value.code
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert found["protocol"] == "honest" and len(found["timings"]) == 3 and len(found["gains"]) == 3
    for g in found["gains"]:
        assert g["reached"][0] == pytest.approx(g["measured"][0] / g["expected"])
    text = (tmp_path / "b" / "bench.md").read_text()
    assert text.count("| scale-wise") == 4 and "denoiser/" not in text
    assert "expected from FLOPs: 3x, reached" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--protocol", "best"], "Unknown protocol 'best'"),
    (["--batch", "0"], "at least 1; got 0"),
    (["student:nowhere"], "nowhere"),
    (["folder:."], "cannot be timed"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "mini", *arguments])
    assert end.value.code and message in capsys.readouterr().err


def test_every_pass_of_a_teacher_of_second_order_is_a_step_of_its_own():
    model, schedule = SD3.tiny(), ScaleSchedule.build([1000], [8])
    model.pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    teacher = SamplerSpec("teacher", "teacher", 3, 2.0, schedule)
    lap = time_parts(timed_sampler(model, teacher, "a cat", each_step=True), 1, time.perf_counter)
    assert list(lap) == ["text", "denoiser", "vae", "total", *(f"denoiser/{i}" for i in range(1, 6))]

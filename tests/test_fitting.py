"""What commands hold on a device, which settings make them fit, and how long they take."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch
from torch import nn

from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.method.scales import Scale
from scalewise.planning.fitting import (
    Change,
    Need,
    TypedRecipe,
    line,
    needs_of,
    sampling_change,
    training_changes,
)
from scalewise.planning.flops import measure
from scalewise.planning.footprint import BATCH_SIZES, WORKLOADS, DenoiserSize, SamplingMemory
from scalewise.planning.plan import GB, RESERVED, ForwardCost, Memory, PassFlops, Plan, make_plan
from scalewise.planning.throughput import CARDS, UTILIZATION, card_named, measured, throughput_of
from scalewise.training import setup

# FLUX.1-dev as `scalewise plan flux-dev` counts it, rounded.
FLUX = SamplingMemory(
    DenoiserSize(23.8e9, 0.81e9, 11_834_228_736, 0.113e9, 2), 0.168e9, 9.77e9, 9.52e9, 0.263e9, 12 * 2.0**20,
    {"teacher": 0.5e9, "student": 0.5e9, "vae": 1.61e9, "text": 0.097e9}, {"vae": 14e12, "text": 5e12},
)  # fmt: skip
SIX = PassFlops(1.0, 1.0, 1.0)
FULL = ForwardCost(Scale(1, 128, 128), 4096, SIX, SIX, 1.0, 1.0, 19e9, 3.36e9)
ROOM = 24 * GB * (1 - RESERVED)


def flux_plan(*overrides: str) -> Plan:
    recipe = find_recipe("flux-dev").override(list(overrides))
    memory = Memory(23.8e9, 3.71e9, 11.1e9, 57.2e9, 3.36e9)
    return Plan(recipe, [FULL] * 4, FULL, 30, {}, 463_208_448, 2e15, 4e15, 1e15, memory, 1, 1, FLUX, 1)


def test_the_peak_of_a_run_is_what_is_alive_at_once() -> None:
    """x (4,000 bytes), its product with a weight that is not counted, and their sum; x is dropped before."""
    weight = nn.Linear(100, 100, bias=False, device="meta")

    def run() -> None:
        x = torch.empty(10, 100, device="meta")
        y = weight(x)
        del x
        z = torch.cat([y, y])
        del y
        z.relu_()

    assert measure(run, [weight]) == (12_000, 2 * 10 * 100 * 100)


def test_attention_holds_no_scores_and_counts_its_operations() -> None:
    q = torch.empty(1, 2, 64, 8, device="meta")
    found, flops = measure(lambda: nn.functional.scaled_dot_product_attention(q, q, q), [])
    assert flops == 2 * 2 * 2 * 64 * 64 * 8
    assert found < 4 * 2 * 64 * 64  # less than the scores of two heads alone


def test_flux_does_not_fit_into_24_gb_and_every_command_gets_settings_that_do() -> None:
    plan = flux_plan()
    needs = {need.command: need for need in needs_of(plan, 24 * GB)}
    assert list(needs) == ["generate", "distill", "sample", "evaluate"]
    assert not any(need.fits for need in needs.values())
    # Text encoders, denoiser and VAE at once, and 16 samples in the denoiser (which `evaluate` also decodes).
    assert needs["generate"].peak == pytest.approx(23.8e9 + 9.77e9 + 0.168e9 + 16 * 0.5e9, rel=1e-6)
    assert needs["evaluate"].peak == pytest.approx(23.8e9 + 9.77e9 + 0.168e9 + 16 * 1.61e9, rel=1e-6)
    # Smaller scales are derived with the VAE alone, four images of 1024 x 1024 at a time.
    assert plan.sampling.derivation_peak == pytest.approx(0.168e9 + 4 * 1.61e9)
    for command in WORKLOADS:
        change = needs[command].change
        assert change is not None and change.overrides == ("model.offload=blocks",)
        model = plan.recipe.override(list(change.overrides)).model
        batch = change.batch or BATCH_SIZES[command]
        assert plan.sampling.peak(command, batch, model=model) <= ROOM


def test_a_smaller_batch_comes_before_offloading_and_offloading_before_fewer_bits() -> None:
    plan = flux_plan()
    assert sampling_change(plan, "evaluate", 80 * GB) == Change()
    assert sampling_change(plan, "evaluate", 50 * GB) == Change((), 10)
    assert sampling_change(plan, "evaluate", 28 * GB) == Change(("model.offload=components",), 8)
    assert sampling_change(plan, "evaluate", 3.0 * GB) == Change(("model.offload=blocks",), 4)
    assert sampling_change(plan, "evaluate", 1.0 * GB) is None
    small = replace(plan, sampling=replace(FLUX, denoiser=replace(FLUX.denoiser, one_block=23.8e9)))
    bits = sampling_change(small, "evaluate", 18 * GB)
    assert bits is not None and bits.overrides == ("model.quantize=nf4", "model.offload=components")


def test_offloaded_weights_are_held_one_part_at_a_time() -> None:
    model = find_recipe("flux-dev").model

    def held(**changes: object) -> list[float]:
        changed = model.model_copy(update=changes)
        return [
            round(FLUX.weights_on_device(stage, changed) / GB, 2) for stage in ("text", "denoiser", "vae")
        ]

    assert held() == [33.74, 33.74, 33.74]
    assert held(offload_text=True) == [33.49, 23.97, 23.97]
    assert held(offload="components") == [9.77, 23.8, 0.17]
    assert held(offload="blocks") == [0.43, 0.98, 0.17]
    # In fewer bits the denoiser stays on the device: 23.8 GB less 1.5 - 1/64 bytes of 11.8e9 weights.
    assert held(offload="components", quantize="nf4") == [16.0, 6.23, 6.4]


@pytest.mark.parametrize("gigabytes", [24, 40, 60, 80])
def test_training_that_does_not_fit_gets_overrides_that_do_and_keeps_the_samples_of_an_update(
    gigabytes: float,
) -> None:
    plan = flux_plan("train.batch=8", "train.gradient_checkpointing=false")
    room = gigabytes * GB * (1 - RESERVED)
    changes = training_changes(plan, room)
    assert changes is not None
    recipe = plan.recipe.override(changes)
    assert recipe.train.batch * recipe.train.accumulate == 8
    trained = 2 if recipe.loss.needs_fake else 1
    lora = plan.lora_parameters * recipe.lora.rank / plan.recipe.lora.rank
    base = 23.8e9 - FLUX.denoiser.quantization_saving(recipe.model.quantize)
    assert base + trained * lora * 16 + recipe.train.batch * FULL.checkpointed <= room
    assert ("model.quantize=nf4" in changes) == (gigabytes == 24)


def test_nothing_is_proposed_where_nothing_helps() -> None:
    plan = flux_plan()
    assert training_changes(plan, 2 * GB) is None
    distill = needs_of(plan, 2 * GB)[1]
    assert (distill.command, distill.fits, distill.change) == ("distill", False, None)


def test_the_command_that_fits_keeps_what_was_typed_and_replaces_what_it_changes() -> None:
    need = Need("distill", 3, 1.0, False, Change(("train.batch=1", "train.accumulate=3")))
    flux = find_recipe("flux-dev")
    found = line(need, TypedRecipe("my recipe.yaml", ["train.batch=3", "data.path=my set"], flux))
    assert shlex.split(found) == [
        "scalewise", "distill", "my recipe.yaml", "data.path=my set", "train.batch=1", "train.accumulate=3",
    ]  # fmt: skip
    drawn = Need("evaluate", 16, 1.0, False, Change(("model.offload=blocks",), 4))
    assert line(drawn, TypedRecipe("flux-dev", [], flux)) == (
        "scalewise evaluate flux-dev teacher student:runs/flux-dev model.offload=blocks --batch 4 "
        "--prompts prompts.txt --metric spectrum --reference photos"
    )


def test_hours_follow_from_operations_and_a_cards_peak() -> None:
    plan = flux_plan("train.batch=2", "train.accumulate=3", "train.iterations=100")
    assert plan.training_flops == 2e15 * 2 * 3 * 100
    assert plan.generation_flops == plan.teacher_flops + 5e12
    assert plan.derivation_flops == 14e12
    speed = throughput_of(card_named("A100"))
    assert speed.seconds(312e12 * UTILIZATION) == pytest.approx(1.0)
    # Dense bfloat16 with sums in float32; the vendors' figures with sparsity are twice as high.
    peaks = {name: card.peak / 1e12 for name, card in CARDS.items()}
    assert peaks == {"a100": 312, "h100": 989, "l40s": 362, "4090": 165.2, "3090": 71, "5090": 209.5}
    with pytest.raises(RecipeError, match="Unknown card 'v100'; choose one of a100, 3090, h100"):
        card_named("v100")


def test_this_machines_speed_is_measured_on_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves by a second at every look, a lap takes one: the speed is the block's count."""
    ticks = iter(range(100))
    monkeypatch.setattr("scalewise.planning.throughput.time.perf_counter", lambda: float(next(ticks)))
    recipe = find_recipe("mini")
    found = measured(recipe, torch.device("cpu"), seconds=2.0)
    # One of the mini's blocks on 256 image tokens; all six of them are nearly the whole count.
    whole = make_plan(recipe.override(["schedule.timesteps=[1000]", "schedule.scales=['16']"])).full.flops
    blocks = len(setup.load(recipe, ["denoiser"]).denoiser.transformer_blocks)
    assert 0.7 * whole < blocks * found.reached < 1.1 * whole
    assert "measured on one block" in found.source


def test_the_real_peak_of_drawing_grows_as_counted() -> None:
    """The planned working memory of the mini's parts is of the size of its pixels and tokens, in float32."""
    drawing = make_plan(find_recipe("mini")).sampling
    pixels = 4 * 3 * 128 * 128
    assert drawing.pixels == pixels
    assert 20 * pixels < drawing.working["vae"] < 60 * pixels
    assert drawing.working["teacher"] == pytest.approx(2 * drawing.working["student"], rel=0.05)

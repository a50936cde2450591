"""Plans: counts of the full-size models, and what is derived from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchHeunDiscreteScheduler
from tiny_run import make_tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scalewise import models
from scalewise.common import console
from scalewise.config.presets import find_recipe
from scalewise.evaluation.samplers import Prompts, generate_images, parse_sampler
from scalewise.evaluation.sampling_speed import count_flops
from scalewise.method import backbone
from scalewise.method.cpu import FastPaths
from scalewise.method.roles import Roles
from scalewise.method.scales import Scale
from scalewise.models import ModelError
from scalewise.models.meta import (
    build_meta_model,
    build_text_encoders,
    build_vae,
    known_configurations,
    read_configuration,
)
from scalewise.planning.flops import _Flash, bytes_of, count
from scalewise.planning.footprint import DenoiserSize, SamplingMemory
from scalewise.planning.plan import ForwardCost, Memory, PassFlops, Plan, _predict, make_plan
from scalewise.training import setup

# Parameters of the published models, and of LoRAs at the paper's ranks.
SIZES = {
    "sd35-medium": (2_243_171_520, 75_300_864),
    "sd35-large": (8_056_627_520, 164_052_992),
    "flux-dev": (11_901_408_320, None),
    "wan21-1.3b": (1_418_996_800, 174_981_120),
    "sdxl": (2_567_463_684, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_full_size_models_have_their_published_number_of_parameters(name):
    recipe = find_recipe(name)
    denoiser, lora = SIZES[name]
    model = build_meta_model(recipe.model.base, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.denoiser.parameters()) == denoiser
    schedule = recipe.schedule.build()
    schedule.check(patch=model.patch, largest=model.largest_scale)
    assert schedule.full == model.full_scale
    model.block(recipe.loss.feature_block)
    if lora:
        roles = Roles(model.denoiser, ["student"], rank=recipe.lora.rank, targets=model.lora_targets)
        assert sum(p.numel() for p in roles.parameters("student").values()) == lora


def test_fluxs_lora_counts_with_the_plain_list_and_with_ours():
    model = build_meta_model(find_recipe("flux-dev").model.base, dtype=torch.bfloat16)
    layers = {
        name: module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and any(name.endswith(f".{t}") for t in model.lora_targets)
    }
    plain = models.SD3.lora_targets
    size = {name: 128 * (m.in_features + m.out_features) for name, m in layers.items()}
    listed = sum(v for name, v in size.items() if any(name.endswith(f".{t}") for t in plain))
    assert listed == 298_844_160
    # 38 single blocks, each with an MLP 3072 -> 12288 and a projection 15360 -> 3072.
    assert sum(size.values()) == 298_844_160 + 38 * 128 * (3072 + 12288 + 15360 + 3072)


@pytest.mark.parametrize("base", known_configurations())
def test_known_configurations_name_text_encoders_and_vae(base):
    config = read_configuration(base)
    assert models.family_of_pipeline(config["pipeline_class"], base)
    assert len(config["text"]) in (1, 2, 3)
    assert config["vae"]["_class_name"].startswith("AutoencoderKL")


@pytest.fixture(scope="module", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "base"
    models.FAMILIES[request.param].tiny().save(path)
    return path, models.FAMILIES[request.param]


def sizes(family) -> list[Scale]:
    return [Scale(2, 4, 4), Scale(5, 8, 8)] if family.video else [Scale(1, 4, 4), Scale(1, 8, 8)]


@pytest.fixture(scope="module")
def plan(folder):
    path, family = folder
    scales = [str(scale) for scale in sizes(family)]
    return make_plan(find_recipe("mini").override([
        f"model.base={path}", "schedule.timesteps=[1000, 600]", f"schedule.scales={scales}",
        "lora.rank=4", "loss.feature_block=0", "model.max_sequence_length=null", "model.family=null",
    ]))  # fmt: skip


def test_a_plan_counts_what_the_real_model_does(folder, plan):
    _, family = folder
    model = family.tiny()
    cond = model.encode_prompts(["a"])
    for step in plan.steps:
        x_t = torch.randn(step.scale.shape(1, model.channels, video=model.video))
        # torch has no count for the CPU's own attention kernel; this one consists of products, which it has.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.predict(x_t, torch.tensor([500.0]), cond)
        assert step.flops == counter.get_total_flops()
        assert step.tokens == model.token_count(step.scale)
        assert 0 < step.base.features < step.base.gradient and step.base.features < step.flops
        assert step.flops < step.adapted.forward
        assert 1.5 * step.flops < step.train_flops < 3.5 * step.flops
    real = {"vae": model.pipeline.vae, "denoiser": model.denoiser}
    for part, module in real.items():
        assert plan.parameters[part] == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plans_parts_take_the_bytes_of_loaded_ones_buffers_included(folder, dtype):
    path, family = folder
    model = family.load(path, dtype=dtype)
    assert bytes_of(build_meta_model(path, dtype=dtype).denoiser) == bytes_of(model.denoiser)
    assert bytes_of(build_vae(path, dtype=dtype)) == bytes_of(model.pipeline.vae)
    names = [name for name in model.text_names if name.startswith("text_encoder")]
    texts = [bytes_of(getattr(model.pipeline, name)) for name in names]
    assert [bytes_of(encoder) for encoder in build_text_encoders(path, dtype=dtype)] == texts


def test_sd35_mediums_table_of_positions_is_counted():
    model = build_meta_model(find_recipe("sd35-medium").model.base, dtype=torch.bfloat16)
    table = 384 * 384 * 1536 * 2
    assert bytes_of(model.denoiser) == 2 * 2_243_171_520 + table and table == pytest.approx(0.453e9, rel=1e-3)


TOKENS = {"sd35-medium": (9_856, 24_576), "sd35-large": (9_024, 16_384), "flux-dev": (7_680, 16_384),
          "wan21-1.3b": (49_270, 131_040)}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_over_all_steps_are_added_up_scale_wise_and_at_full_scale(name):
    recipe = find_recipe(name)
    schedule, model = recipe.schedule.build(), build_meta_model(recipe.model.base, dtype=torch.bfloat16)
    plan = replace(blank_plan(recipe, 0), steps=[at(scale, model) for scale in schedule.scales],
                   full=at(schedule.full, model))  # fmt: skip
    assert (plan.tokens, plan.full_tokens) == TOKENS[name]


def at(scale: Scale, model) -> ForwardCost:
    passes = PassFlops(1.0, 1.0, 1.0)
    return ForwardCost(scale, model.token_count(scale), passes, passes, 1.0, 1.0, 1.0, 1.0)


def blank_plan(recipe, steps: int) -> Plan:
    passes = PassFlops(1.0, 1.0, 1.0)
    blank = ForwardCost(Scale(1, 1, 1), 1, passes, passes, 1.0, 1.0, 1.0, 1.0)
    drawing = SamplingMemory(DenoiserSize(1, 1, 1, 1, 1), 1, 1, 1, 1, 1, {}, {})
    memory = Memory(1, 1, 1, 1, 1)
    return Plan(recipe, [blank] * steps, blank, 1, {}, 1, 1.0, 1.0, 1.0, memory, 1, 1, drawing, 1)


def test_standing_in_for_blocks_that_are_alike_changes_no_count(folder):
    path, family = folder
    model = build_meta_model(path)
    roles = Roles(model.denoiser, ["student"], rank=4, targets=model.lora_targets)
    scale = sizes(family)[-1]
    with roles.role("student"):
        alike = model.repeated_blocks()
        assert len(alike) > 1
        one, all_run = (
            count(lambda: _predict(model, scale, gradient=True), model.denoiser, blocks=blocks, backward=True)
            for blocks in (alike, [])
        )
    assert one.flops == all_run.flops
    # By itself a block saves what the network saves, but for tensors that two neighbours share.
    assert one.activations == pytest.approx(all_run.activations, rel=0.1)
    assert one.checkpointed < one.activations


def test_attention_is_counted_as_flash_kernels_compute_it():
    layer = nn.MultiheadAttention(8, 2, batch_first=True, device="meta")
    x = torch.empty(1, 5, 8, device="meta", requires_grad=True)
    qkv = x.unsqueeze(1).expand(1, 2, 5, 8)
    forward = 2 * (2 * 2 * 5 * 5 * 8)  # two products of two heads
    found = count(
        lambda: F.scaled_dot_product_attention(qkv, key=qkv, value=qkv), layer, blocks=[], backward=True
    )
    assert found.flops == 3.5 * forward  # and five backward, one of which makes the scores anew
    # x (float32, seen through views), the output, and one number for each query: no 5 x 5 scores.
    assert found.activations == 4 * (5 * 8 + 2 * 5 * 8 + 2 * 5)


def test_a_plans_ratios_follow_from_its_counts(plan, folder):
    assert plan.teacher_forwards == (28 if folder[1].family == "flux" else 56)  # FLUX's guidance is an input
    assert plan.student_flops == sum(step.flops for step in plan.steps) < plan.full_scale_flops
    assert plan.full_scale_flops == 2 * plan.full.flops
    assert plan.iteration_mmd < plan.iteration < plan.iteration_full


def test_a_teacher_of_second_order_is_counted_by_its_passes_and_not_its_steps(tmp_path):
    model = models.SD3.tiny()
    model.pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    model.save(tmp_path / "base")
    recipe = find_recipe("mini").override([
        f"model.base={tmp_path / 'base'}", "schedule.timesteps=[1000]", "schedule.scales=[8x8]",
        "loss.feature_block=0", "lora.rank=4", "model.max_sequence_length=null", "teacher.steps=3",
    ])  # fmt: skip
    plan, asked = make_plan(recipe), []
    teacher = parse_sampler("teacher", recipe)
    model.denoiser.register_forward_pre_hook(lambda _, __, given: asked.append(len(given["hidden_states"])),
                                             with_kwargs=True)  # fmt: skip
    generate_images(model, teacher, Prompts.of(["a cat"]))
    assert (
        asked == [2] * 5
    )  # both steps but the last twice, guided: conditional and unconditional in one batch
    assert plan.teacher_forwards == sum(asked)
    flops = count_flops(recipe, [teacher, parse_sampler("undistilled", recipe)], console.progress)
    assert flops["teacher"] == 10 * flops["undistilled"] == plan.teacher_flops


def test_a_plans_memory_is_bounded_by_its_parts(plan):
    memory = plan.memory
    assert 0 < memory.checkpointed < memory.activations
    for checkpointing in (False, True):
        batch = memory.batch_that_fits(1e9, checkpointing=checkpointing)
        assert memory.total(batch, checkpointing=checkpointing) <= 1e9
        assert memory.total(batch + 1, checkpointing=checkpointing) > 0.92e9
    assert memory.batch_that_fits(1e3, checkpointing=True) == 0


def test_a_base_without_a_known_configuration_is_named_with_those_that_are_known():
    with pytest.raises(
        ModelError, match=r"There is no configuration for nobody/nothing.*stable-diffusion-3\.5-medium"
    ):
        read_configuration("nobody/nothing")


def test_a_plan_refuses_what_does_not_fit_and_quotes_the_paper_for_its_own_set_ups_alone():
    with pytest.raises(ValueError, match="33x33 is not divisible by the patch size 2"):
        make_plan(find_recipe("sd35-medium-2").override(["schedule.scales=['33', '128']"]))
    with pytest.raises(ModelError, match=r"has scales without frames, but .* is a model for videos"):
        make_plan(
            find_recipe("flux-dev").override(
                ["model.base=Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "model.family=null"]
            )
        )
    for name, steps, speed in (("sd35-medium", 6, 4.8 / 0.19), ("wan21-1.3b", 4, 137 / 1.84)):
        recipe = find_recipe(name)
        plan = blank_plan(recipe, steps)
        assert plan.paper_speed_up[0] == pytest.approx(speed)
        other = recipe.override([f"schedule.timesteps={[999, *recipe.schedule.timesteps[1:]]}"])
        assert replace(plan, recipe=other).paper_speed_up == (None, None)


@pytest.mark.parametrize("mmd_only", ["false", "true"])
def test_a_planned_iteration_is_a_real_one_and_checkpointing_repeats_as_much(mmd_only, tmp_path, monkeypatch):
    """A plan's block has a way back from all its outputs, and is repeated to its last product: a real one
    has none from the text's tokens behind the tap, and stops a product earlier. That shows with two blocks.
    """
    # A plan counts peft's layers, which every device but a CPU runs; a CPU's recomputation stops earlier.
    monkeypatch.setattr(backbone, "choose_fast_paths", lambda *_, **__: FastPaths())
    # Attention as plans count it; the CPU's own kernel has no count.
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: _Flash.apply(q, k, v))
    tiny, counted, planned = make_tiny(tmp_path), [], []
    for checkpointing in ("false", "true"):
        changes = [f"train.gradient_checkpointing={checkpointing}", f"loss.mmd_only={mmd_only}"]
        recipe = tiny.override(changes)
        data = setup.prepare_data(recipe, console.progress)
        trainer = setup.build_trainer(recipe, data, tmp_path / checkpointing)
        with FlopCounterMode(display=False) as counter:
            for _ in range(trainer.batches.steps):
                trainer.iterate()
                trainer.iteration += 1
        counted.append(counter.get_total_flops() / trainer.batches.steps / recipe.train.batch)
        planned.append(make_plan(recipe).iteration)
    assert planned[1] - planned[0] == pytest.approx(counted[1] - counted[0], rel=0.04)
    assert planned[0] == pytest.approx(counted[0], rel=0.03)


def test_a_recipe_without_mmd_has_a_plan(folder):
    path, family = folder
    recipe = find_recipe("mini").override([
        f"model.base={path}", "schedule.timesteps=[1000]", f"schedule.scales=['{sizes(family)[-1]}']",
        "lora.rank=4", "loss.feature_block=0", "model.max_sequence_length=null", "loss.mmd.weight=0",
        "model.family=null",
    ])  # fmt: skip
    plan = make_plan(recipe)
    assert plan.iteration_mmd < plan.iteration


def test_what_lies_on_disk_is_counted():
    plan = make_plan(find_recipe("mini"))
    # 16 tokens of CLIP and 16 of T5, width 256, and a pooled embedding of 256, in float32.
    assert plan.prompt_bytes == 4 * (32 * 256 + 256)
    assert plan.sample_bytes == 2 * 16 * 256
    assert plan.derived_bytes == 2 * 16 * (64 + 100 + 144)
    full = make_plan(find_recipe("mini").override(["schedule.scales=['16', '16', '16', '16']"]))
    assert (full.sample_bytes, full.derived_bytes, full.derivation_flops) == (2 * 16 * 256, 0, 0.0)
    assert plan.derivation_flops > 0

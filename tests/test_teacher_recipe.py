"""How the teacher samples, key by key: shift, length of its text, negative prompt."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_run import PROMPTS, make_tiny

from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.data import DataError, LatentSet
from scalewise.data.synthetic import generate
from scalewise.evaluation.samplers import encode, enter, parse_sampler
from scalewise.method.backbone import Backbone
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale
from scalewise.models import SD3, SDXL, Flux, ModelError, Wan
from scalewise.training import setup


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_shift_takes_the_place_of_each_schedulers_own():
    scale = Scale(1, 8, 8)
    expected = FlowMatchEulerDiscreteScheduler(shift=8.0)
    expected.set_timesteps(5)
    assert torch.equal(SD3.tiny().teacher_scheduler(5, scale, shift=8.0).sigmas, expected.sigmas)
    unshifted = torch.linspace(1, 0.2, 5)  # FLUX's own, whose shift grows with the number of tokens
    found = Flux.tiny().teacher_scheduler(5, scale, shift=8.0).sigmas[:-1]
    torch.testing.assert_close(found, 8 * unshifted / (1 + 7 * unshifted))
    stock = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    stock.set_timesteps(5)
    assert torch.equal(Wan.tiny().teacher_scheduler(5, scale, shift=8.0).sigmas, stock.sigmas)
    own = SD3.tiny().teacher_scheduler(5, scale).sigmas
    assert torch.equal(SD3.tiny().teacher_scheduler(5, scale, shift=3.0).sigmas, own)


def test_a_shift_is_refused_where_there_is_none():
    with pytest.raises(ModelError, match=r"teacher\.shift=8 has no effect on the EulerDiscreteScheduler"):
        SDXL.tiny().teacher_scheduler(5, Scale(1, 8, 8), shift=8.0)


def test_the_teacher_of_sd3_reads_256_tokens_of_t5_and_a_student_512():
    model = SD3.tiny()
    model.pipeline.tokenizer_3.model_max_length = 512
    model.max_sequence_length = model.default_sequence_length()
    lengths = [c.tensors["tokens"].shape[1] - model.clip_length for c in (
        model.encode_for_teacher(["a dog"]), model.encode_prompts(["a dog"]),
        model.encode_for_teacher(["a dog"], 300))]  # fmt: skip
    assert lengths == [256, 512, 300]
    stock = model.pipeline.encode_prompt(["a dog"], None, None, do_classifier_free_guidance=False)[0]
    assert torch.equal(model.encode_for_teacher(["a dog"]).tensors["tokens"], stock)


def test_a_length_of_the_text_is_refused_where_there_is_no_t5():
    with pytest.raises(ModelError, match=r"teacher\.max_sequence_length=300 has no effect.*no T5"):
        SDXL.tiny().encode_for_teacher(["a dog"], 300)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_dmds_unconditional_branch_is_the_encoding_of_the_teachers_negative_prompt(
    recipe, tmp_path, negative
):
    chosen = recipe.override([f"teacher.negative_prompt={negative}"])
    data = setup.prepare_data(chosen, lambda *_: nullcontext(lambda _: None))
    batch = setup.build_trainer(chosen, data, tmp_path).batches.at(0)
    expected = SD3.tiny().encode_prompts([negative, "blurry" if not negative else ""])
    for name, value in batch.uncond.tensors.items():
        torch.testing.assert_close(value, expected.tensors[name][:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(value, expected.tensors[name][1:], rtol=1e-2, atol=1e-3)


def test_a_contender_draws_with_the_recipes_shift_and_negative_prompt(recipe):
    chosen = recipe.override(
        ["teacher.shift=8", "teacher.negative_prompt=blurry", "teacher.max_sequence_length=5"]
    )
    model, contender = SD3.tiny(), parse_sampler("teacher", chosen)
    uncond, cond = (encode(model, contender, [text]) for text in ("blurry", "a dog"))
    assert cond.tensors["tokens"].shape[1] == model.clip_length + 5
    with enter(model, contender) as sampler:
        found = sampler(cond, uncond, [3])
    backbone = Backbone(setup.teacher(chosen), precision=chosen.train.precision)
    expected = [sample_teacher(backbone, contender.schedule.full, cond, [3], steps=2, guidance=4.5,
                                   uncond=uncond, shift=shift) for shift in (8.0, None)]  # fmt: skip
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, expected[1], rtol=1e-2, atol=1e-2)


def test_a_set_begun_with_another_shift_is_not_gone_on_with(recipe, tmp_path: Path):
    model = setup.teacher(recipe)
    out = tmp_path / "set"
    list(generate(model, recipe, PROMPTS, out, count=2, batch=2))
    with pytest.raises(DataError, match=r"settings\.shift is None in the stored dataset and 8\.0 now"):
        list(generate(model, recipe.override(["teacher.shift=8"]), PROMPTS, out, count=3, batch=2))


def test_real_samples_of_the_full_scale_are_encoded_again_if_the_recipe_says_so(recipe, tmp_path):
    model, full = setup.teacher(recipe), recipe.schedule.build().full
    found = {}
    for again in (False, True):
        chosen, out = recipe.override([f"data.reencode={str(again).lower()}"]), tmp_path / str(again)
        list(generate(model, chosen, PROMPTS, out, count=2, batch=2))
        scales = chosen.schedule.build().scales
        data = setup.open_set(recipe, out, scales, lambda *_: nullcontext(lambda _: None))
        found[again] = {scale: data.latents([0, 1], scale) for scale in scales}
    expected = model.encode(model.decode(found[False][full]))
    assert torch.equal(found[True][full], expected.half().float())
    assert (found[True][full] - found[False][full]).abs().mean() > 0.05
    for scale in {*scales} - {full}:  # from the same pixels, those of the teacher's own latents
        assert torch.equal(found[True][scale], found[False][scale])
    with pytest.raises(DataError, match="no latents at 8x8, only at no scale yet"):
        LatentSet.open(out).latents([0], full)


def test_the_teacher_of_wan_samples_as_its_authors_do():
    teacher = find_recipe("wan21-1.3b").teacher
    assert (teacher.guidance, teacher.shift, teacher.steps) == (6.0, 8.0, 50)
    assert teacher.negative_prompt.startswith("色调艳丽，过曝，静态，细节模糊不清，字幕")
    assert teacher.negative_prompt.endswith("杂乱的背景，三条腿，背景人很多，倒着走")

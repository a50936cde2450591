"""The pipelines: for every family, any size, any generator, on saved models as users load them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn

import scalewise
from scalewise import models
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.method.backbone import Backbone
from scalewise.method.rng import SampleNoise
from scalewise.method.sampling import sample_student
from scalewise.method.scales import ScaleSchedule
from scalewise.models import ModelError, PipelineAdapter
from scalewise.models.lora import StudentError, fused, load_student, save_student
from scalewise.pipelines import ADAPTER, read_schedule

PROMPTS = ["a red apple", "a dog"]
IMAGE, VIDEO = "1000@4x4 800@4x8 600@8x8", "1000@2x4x4 800@3x4x8 600@5x8x8"


@pytest.fixture(scope="module", params=models.FAMILIES)
def family(request) -> type[PipelineAdapter]:
    return models.FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family.family) / "base"
    family.tiny().save(path)
    return path


def recipe_of(family) -> Recipe:
    schedule = ScaleSchedule.parse(VIDEO if family.video else IMAGE)
    return find_recipe("mini").override([
        f"schedule.timesteps={list(schedule.timesteps)}",
        f"schedule.scales={[str(s) for s in schedule.scales]}",
        "lora.rank=4", "lora.alpha=8",
    ])  # fmt: skip


def random_student(backbone: Backbone) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    shapes = sorted((name, p.shape) for name, p in backbone.parameters("student").items())
    return {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes}


@pytest.fixture(scope="module")
def student(family, folder) -> Path:
    path = folder.parent / "student.safetensors"
    tensors = random_student(Backbone(family.tiny(), ["student"], rank=4))
    save_student(path, tensors, recipe_of(family), dtype=torch.float32, denoiser=family.denoiser_name)
    return path


@pytest.fixture(scope="module")
def pipe(folder, student) -> Any:
    pipeline = scalewise.load(folder, student=student)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def outputs(result: Any) -> torch.Tensor:
    return result.frames if hasattr(result, "frames") else result.images


def test_a_pipeline_samples_what_training_samples(family, pipe, student):
    model = family.tiny()
    cond, schedule = model.encode_prompts(PROMPTS), recipe_of(family).schedule.build()
    with fused(model.denoiser, load_student(student)):
        expected = sample_student(Backbone(model), schedule, cond, [7, 8], role="teacher")
    ours = outputs(pipe(PROMPTS, seed=7, output_type="latent"))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    alone = outputs(pipe(PROMPTS[1], seed=8, output_type="latent"))
    torch.testing.assert_close(alone, ours[1:], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_one_step_at_a_constant_scale_is_the_stock_components_called_by_hand(family, pipe):
    model = family.tiny()
    full = recipe_of(family).schedule.build().full
    shape = full.shape(1, model.channels, video=model.video)[1:]
    plan = ScaleSchedule.build([1000], [full])
    pipe.disable_lora()
    try:
        ours = outputs(pipe(PROMPTS, schedule=plan, seed=3, output_type="latent"))
    finally:
        pipe.enable_lora()
    x_t, t = SampleNoise([3, 4])(shape), torch.full((2,), 1000.0)
    with torch.no_grad():
        x0 = model.noise.x0(model.predict(x_t, t, model.encode_prompts(PROMPTS)), x_t, t)
    torch.testing.assert_close(ours, x0, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))


def test_any_size_and_number_of_frames_is_drawn_and_decoded(family, pipe):
    model = family.tiny()
    cell = model.vae_factor * model.patch
    sizes: dict[str, int] = {"height": 2 * cell, "width": 5 * cell}
    if model.video:
        sizes["num_frames"] = 9
    drawn = outputs(pipe(PROMPTS, seed=0, output_type="pt", **sizes))
    assert tuple(drawn.shape) == (2, *([9] if model.video else []), 3, 2 * cell, 5 * cell)
    assert drawn.min() >= 0 and drawn.max() <= 1
    with pytest.raises(
        ValueError, match=f"height must be divisible by {cell}; got {cell + 1}, the nearest is {cell}"
    ):
        pipe(PROMPTS, height=cell + 1)
    if model.video:
        with pytest.raises(ValueError, match=r"num_frames must be 4 k \+ 1; got 8, the nearest is 9"):
            pipe(PROMPTS, num_frames=8)
    else:
        with pytest.raises(ValueError, match="num_frames 9 has no effect"):
            pipe(PROMPTS, num_frames=9)


def test_a_generator_for_each_sample_makes_it_independent_of_its_neighbours(pipe):
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    both = outputs(pipe(PROMPTS, generator=generators(1, 2), output_type="latent"))
    alone = outputs(pipe(PROMPTS[1], generator=generators(2), output_type="latent"))
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3 * float(both.abs().max()))
    once = outputs(pipe(PROMPTS, generator=torch.Generator().manual_seed(1), output_type="latent"))
    again = outputs(pipe(PROMPTS, generator=torch.Generator().manual_seed(1), output_type="latent"))
    assert torch.equal(once, again)
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        pipe(PROMPTS, generator=generators(1))
    with pytest.raises(ValueError, match="generator and seed cannot be combined"):
        pipe(PROMPTS, generator=generators(1, 2), seed=1)


def test_a_callback_sees_every_step_and_may_change_x0(family, pipe):
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def look(_pipe, i, t, told):
        seen.append((i, t, tuple(told["latents"].shape)))

    plain = outputs(pipe(PROMPTS, seed=0, output_type="latent", callback_on_step_end=look))
    schedule, model = recipe_of(family).schedule.build(), family.tiny()
    assert seen == [
        (i, step.t, step.scale.shape(2, model.channels, video=model.video)) for i, step in enumerate(schedule)
    ]
    for changed_at in range(3):

        def change(_pipe, i, _t, told, at=changed_at):
            return {"latents": 1 + told["latents"]} if i == at else {}

        other = outputs(pipe(PROMPTS, seed=0, output_type="latent", callback_on_step_end=change))
        assert not torch.allclose(other, plain, atol=1e-2)
    torch.testing.assert_close(other, plain + 1)


def test_image_to_image_enters_at_the_step_of_its_strength(family, pipe):
    model = family.tiny()
    schedule = recipe_of(family).schedule.build()
    pixels = torch.rand(1, 3, *model.pixel_size(schedule.full), generator=torch.Generator().manual_seed(0))
    entered: list[int] = []

    def look(_pipe, i, _t, _told):
        entered.append(i)

    for strength, steps in ((1.0, [0, 1, 2]), (0.8, [1, 2]), (0.79, [2]), (0.6, [2])):
        entered.clear()
        drawn = outputs(pipe(PROMPTS, image=pixels, strength=strength, seed=0, output_type="latent",
                             callback_on_step_end=look))  # fmt: skip
        assert entered == steps
        assert drawn.shape == schedule.full.shape(2, model.channels, video=model.video)
    other = outputs(pipe(PROMPTS, image=1 - pixels, strength=0.6, seed=0, output_type="latent"))
    assert not torch.allclose(other, drawn, atol=1e-3)  # the picture matters
    below = r"0\.5 is below all timesteps.* 0\.6, 0\.8, 1, or a value between"
    for strength, said in ((0.5, below), (1.5, r"must be a number in \(0, 1\]; got 1\.5")):
        with pytest.raises(ValueError, match=said):
            pipe(PROMPTS, image=pixels, strength=strength)
    with pytest.raises(ValueError, match="3 images for 2 prompts"):
        pipe(PROMPTS, image=pixels.expand(3, *pixels.shape[1:]))
    with pytest.raises(ValueError, match=r"must have the shape .* Resize it"):
        pipe(PROMPTS, image=pixels[..., 2:])


def test_any_pil_image_is_cropped_to_the_size_drawn(family, pipe):
    frames = 5 if family.video else 1
    for mode, size in (("RGBA", (40, 20)), ("L", (7, 9)), ("RGB", (64, 64))):
        pictures = [Image.new(mode, size, 200)] * frames
        given = pictures if family.video else pictures[0]
        drawn = outputs(pipe(PROMPTS[0], image=given, strength=0.8, seed=0, output_type="latent",
                             num_frames=5 if family.video else None))  # fmt: skip
        assert drawn.isfinite().all()


def test_pictures_of_another_kind_or_range_are_refused(family, pipe):
    size = family.tiny().pixel_size(recipe_of(family).schedule.build().full)
    for pixels, said in (
        (torch.full((1, 3, *size), 255, dtype=torch.uint8), r"got uint8 from 255 to 255"),
        (torch.full((1, 3, *size), -0.5), r"got float32 from -0\.5 to -0\.5"),
        (np.zeros((8, 8, 3), np.uint8), "not ndarray"),
        ("picture.png", "not str"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(PROMPTS[0], image=pixels)


def test_a_schedule_is_taken_as_text(family, pipe):
    schedule = recipe_of(family).schedule.build().at_full_scale()
    given, text = (
        outputs(pipe(PROMPTS, seed=0, schedule=form, output_type="latent"))
        for form in (schedule, str(schedule))
    )
    torch.testing.assert_close(given, text)


def test_what_cannot_be_drawn_is_refused(pipe):
    with pytest.raises(ValueError, match=r"prompt is \[\]; pass at least one prompt"):
        pipe(prompt=[])
    with pytest.raises(ValueError, match=r"output_type must be one of \('pil', .*; got 'jpeg'"):
        pipe(prompt=PROMPTS, output_type="jpeg")


def test_a_second_student_takes_the_place_of_the_first_with_its_own_schedule(family, folder, student):
    pipe = scalewise.load(folder, student=student)
    pipe.set_progress_bar_config(disable=True)
    first = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
    other = load_student(student)
    last_two = ScaleSchedule(other.schedule.steps[1:])
    pipe.set_student(replace(other, schedule=last_two), weight=0.5)
    assert pipe.schedule == last_two
    pipe.set_student(other)
    again = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


def test_offloaded_components_draw_the_same(folder, student, pipe):
    away = scalewise.load(folder, student=student)
    away.set_progress_bar_config(disable=True)
    for component in away.components.values():
        if isinstance(component, nn.Module):  # what enable_sequential_cpu_offload does, with a CPU to run on
            accelerate.cpu_offload(component, torch.device("cpu"))
    assert away.adapter().device == torch.device("cpu")
    expected = outputs(pipe(PROMPTS, seed=0, output_type="pt"))
    found = outputs(away(PROMPTS, seed=0, output_type="pt"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_tells_the_student_what_it_was_told_in_training(tmp_path):
    models.Flux.tiny().save(tmp_path / "base")
    tensors = random_student(Backbone(models.Flux.tiny(), ["student"], rank=4))
    recipe = recipe_of(models.Flux).override(["model.embedded_guidance=1.5", "model.max_sequence_length=7"])
    save_student(tmp_path / "student.safetensors", tensors, recipe, dtype=torch.float32)
    model = scalewise.load(tmp_path / "base", student=tmp_path / "student.safetensors").adapter()
    assert (model.embedded_guidance, model.max_sequence_length) == (1.5, 7)


@pytest.mark.parametrize(
    "names", [["a.safetensors"], ["sub/b.safetensors"], ["a.safetensors", "b.safetensors"], []]
)
def test_a_hub_repository_has_to_hold_one_student(names, tmp_path, monkeypatch, folder, student):
    for name in names:
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(student, tmp_path / "hub" / name)
    (tmp_path / "hub").mkdir(exist_ok=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    if len(names) == 1:
        assert scalewise.load(folder, student="somebody/student").schedule == load_student(student).schedule
    else:
        held = "a.safetensors, b.safetensors" if names else "no .safetensors file"
        with pytest.raises(
            StudentError, match=f"somebody/student contains {held}; download one student file"
        ):
            scalewise.load(folder, student="somebody/student")


def test_the_students_weight_scales_it_and_a_second_lora_stands_beside_it(pipe, folder, student):
    drawn = {w: None for w in (0.0, 0.5, 1.0)}
    try:
        for weight in drawn:
            pipe.set_adapters([ADAPTER], [weight])
            drawn[weight] = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
        pipe.load_lora_weights(student, adapter_name="style")
        pipe.set_adapters([ADAPTER, "style"], [1.0, 0.0])
        beside = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
        pipe.set_adapters([ADAPTER, "style"], [1.0, 0.5])
        both = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
        pipe.delete_adapters("style")
    finally:
        pipe.set_adapters([ADAPTER], [1.0])
    assert not torch.allclose(drawn[0.0], drawn[0.5], atol=1e-2)
    assert not torch.allclose(drawn[0.5], drawn[1.0], atol=1e-2)
    torch.testing.assert_close(beside, drawn[1.0], rtol=1e-4, atol=1e-4 * float(beside.abs().max()))
    assert not torch.allclose(both, beside, atol=1e-2)
    half = scalewise.load(folder, student=student, weight=0.5)
    half.set_progress_bar_config(disable=True)
    found = outputs(half(PROMPTS, seed=0, output_type="latent"))
    torch.testing.assert_close(found, drawn[0.5], rtol=1e-4, atol=1e-4 * float(found.abs().max()))


def test_fusing_changes_nothing_that_is_drawn_and_can_be_undone(folder, student):
    pipe = scalewise.load(folder, student=student)
    pipe.set_progress_bar_config(disable=True)
    before = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
    pipe.fuse_lora()
    tolerance = 1e-3 * float(before.abs().max())
    torch.testing.assert_close(
        outputs(pipe(PROMPTS, seed=0, output_type="latent")), before, rtol=1e-3, atol=tolerance
    )
    pipe.unfuse_lora()
    torch.testing.assert_close(
        outputs(pipe(PROMPTS, seed=0, output_type="latent")), before, rtol=1e-3, atol=tolerance
    )


def test_guidance_and_negative_prompts_are_refused_where_they_would_do_nothing(family, pipe):
    with pytest.raises(ValueError, match=r"negative_prompt .* has no effect"):
        pipe(PROMPTS, negative_prompt="blurry")
    if family.family == "flux":
        one, other = (
            outputs(pipe(PROMPTS, seed=0, guidance_scale=g, output_type="latent")) for g in (1.0, 9.0)
        )
        assert not torch.allclose(one, other, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=r"guidance_scale 4\.5 has no effect"):
            pipe(PROMPTS, guidance_scale=4.5)


def test_bfloat16_draws_about_the_same(folder, student, pipe):
    rough = scalewise.load(folder, student=student, dtype=torch.bfloat16)
    rough.set_progress_bar_config(disable=True)
    exact = outputs(pipe(PROMPTS, seed=0, output_type="latent"))
    found = outputs(rough(PROMPTS, seed=0, output_type="latent"))
    assert found.dtype == torch.float32
    assert (found - exact).square().mean() < 0.05 * exact.var()


def test_a_schedule_of_another_family_is_refused(family, folder):
    with pytest.raises(
        ModelError, match=r"has scales with(out)? frames, but .* is a model for (videos|images)"
    ):
        scalewise.load(folder, student=None, schedule=IMAGE if family.video else VIDEO)


def test_a_student_of_another_base_is_refused_with_counts(family, folder, student):
    other = next(f for f in models.FAMILIES.values() if f is not family and not f.video)
    path = student.with_name("other.safetensors")
    tensors = random_student(Backbone(other.tiny(), ["student"], rank=4))
    save_student(path, tensors, recipe_of(family), denoiser=family.denoiser_name)
    with pytest.raises(StudentError, match=r"(\d+ of its \d+ weights belong to layers|is for a layer of)"):
        scalewise.load(folder, student=path)


def test_schedules_are_read_from_names_and_text():
    assert read_schedule("sd35-medium-4") == find_recipe("sd35-medium-4").schedule.build()
    assert read_schedule("1000@8 600@16") == ScaleSchedule.build([1000, 600], [8, 16])
    with pytest.raises(
        RecipeError, match=r"no schedule 'sd35'; use .* one of the recipes mini,.*sd35-medium"
    ):
        read_schedule("sd35")


def test_without_student_or_schedule_there_is_nothing_to_sample(folder):
    with pytest.raises(
        StudentError, match="has no schedule without a student; pass one, as in schedule='sd35-medium-4'"
    ):
        scalewise.load(folder, student=None)


def test_a_tiny_autoencoder_takes_the_vaes_place(tmp_path):
    models.SD3.tiny().save(tmp_path / "base")
    tiny = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "vae")
    pipe = scalewise.load(tmp_path / "base", student=None, schedule=IMAGE, vae=tmp_path / "vae")
    assert isinstance(pipe.vae, AutoencoderTiny)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPTS, seed=0, output_type="pt").images
    latents = pipe(PROMPTS, seed=0, output_type="latent").images
    with torch.no_grad():
        expected = (pipe.vae.decode(latents).sample.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(pipe.adapter().encode(2 * pixels - 1), pipe.adapter().encode(2 * pixels - 1))


def test_the_mini_draws_pictures_without_a_word_of_configuration():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = scalewise.load()
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe("a red apple, fluent style", seed=0).images
    assert [picture.size for picture in pictures] == [(128, 128)]


def test_a_strength_is_written_as_errors_show_it():
    pipe = scalewise.load("mini")
    for text, step in (("0.602", 3), ("0.737", 2), ("0.896", 1), ("1", 0)):
        picture, plan = Image.new("RGB", (128, 128)), pipe.schedule
        start, _ = pipe._start_from(pipe.adapter(), picture, float(text), plan=plan, count=1)
        assert start == step


def test_a_refused_student_leaves_the_pipeline_as_it_was(tmp_path, folder, student, family):
    pipe = scalewise.load(folder, student=student)
    before, other = pipe.schedule, load_student(student)
    text = "1000@2x4x4 500@3x8x8" if family.video else "1000@4x4 500@8x8"
    strange = {k.replace("blocks.", "blocks.9"): v for k, v in other.tensors.items()}
    with pytest.raises(StudentError, match="does not fit this base"):
        pipe.set_student(replace(other, tensors=strange, schedule=ScaleSchedule.parse(text)))
    assert pipe.schedule == before and pipe.get_active_adapters() == [ADAPTER]


def test_a_pipeline_is_saved_as_the_stock_one(folder, student, tmp_path, pipe):
    expected = outputs(pipe(["a dog"], seed=0, output_type="latent"))
    own = scalewise.load(folder, student=student)
    with pytest.raises(ValueError, match=r"adapters \(.*scalewise.*\) cannot be saved"):
        own.save_pretrained(tmp_path / "saved")
    own.fuse_lora()
    own.unload_lora_weights()
    own.save_pretrained(tmp_path / "saved")
    again = scalewise.load(tmp_path / "saved", student=None, schedule=pipe.schedule)
    again.set_progress_bar_config(disable=True)
    found = outputs(again(["a dog"], seed=0, output_type="latent"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_minis_student_is_not_offered_to_another_base(folder):
    with pytest.raises(StudentError, match=r"'mini' belongs to the base 'mini' and does not fit"):
        scalewise.load(folder)


def test_one_frame_of_a_video_model_is_drawn(family, pipe):
    if family.video:
        assert pipe(["a dog"], seed=0, num_frames=1, output_type="latent").frames.shape[2] == 1


def test_pictures_enter_upright_and_over_white(pipe, family):
    if not family.video:
        size = (pipe.schedule.full.height * pipe.adapter().vae_factor,) * 2
        clear = Image.new("RGBA", size, (255, 0, 0, 0))
        assert (pipe._pixels(pipe.adapter(), clear, size) == 1).all()


def test_too_few_frames_are_counted(pipe, family):
    if family.video:
        with pytest.raises(ValueError, match="has 2 frames; pass 17"):
            pipe(["a dog"], image=[Image.new("RGB", (32, 32))] * 2)


def test_group_offloaded_denoisers_tell_the_device_they_run_on(folder, student):
    pipe = scalewise.load(folder, student=student)
    denoiser = getattr(pipe, pipe.family.denoiser_name)
    denoiser.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert pipe.adapter().device == torch.device("cpu")
    assert any(hasattr(module, "_diffusers_hook") for module in denoiser.children())

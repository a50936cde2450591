"""The contract that every model family keeps, run over the registry on the families' random miniatures."""

from __future__ import annotations

import gc
import inspect
import json
import pickle
import shutil
import warnings
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from families import ask_diffusers
from safetensors.torch import load_file, save_file
from torch import nn

from scalewise import models
from scalewise.method.backbone import Backbone
from scalewise.method.features import tap
from scalewise.method.rng import SampleNoise
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale
from scalewise.models import ALL_PARTS, Condition, ModelError, family_of, load_model

PROMPTS = ["a red apple", "a dog"]
IMAGES = [Scale(1, 4, 4), Scale(1, 8, 8), Scale(1, 4, 12), Scale(1, 12, 8)]
VIDEOS = [Scale(1, 4, 4), Scale(2, 8, 8), Scale(5, 4, 12), Scale(3, 12, 8)]


def sizes(model) -> list[Scale]:
    return VIDEOS if model.video else IMAGES


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(model, size: int) -> torch.Tensor:
    scale = sizes(model)[size]
    return draw(*scale.shape(2, model.channels, video=model.video))


def pixels(model, size: int) -> torch.Tensor:
    return draw(2, 3, *model.pixel_size(sizes(model)[size])).clamp(-1, 1)


def modules(model) -> list[nn.Module]:
    return [c for c in model.pipeline.components.values() if isinstance(c, nn.Module)]


T = torch.tensor([900.0, 300.0])


@pytest.fixture(params=models.FAMILIES)
def family(request):
    return models.FAMILIES[request.param]


@pytest.fixture
def model(family):
    return family.tiny()


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_miniature_is_a_function_of_its_seed(family):
    before = torch.random.get_rng_state()
    one, same, other = (family.tiny(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in m.denoiser.parameters()]) for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_saved_model_comes_back_the_same_from_the_hubs_folder_layout(family, model, folder):
    assert (
        json.loads((folder / "model_index.json").read_text())["_class_name"] == family.pipeline_class.__name__
    )
    loaded = load_model(folder)
    assert type(loaded) is family
    x_t, cond = latents(model, 1), model.encode_prompts(PROMPTS)
    again = loaded.encode_prompts(PROMPTS)
    assert all(torch.equal(again.tensors[key], value) for key, value in cond.tensors.items())
    assert torch.equal(loaded.predict(x_t, T, cond), model.predict(x_t, T, cond))
    seen = model.encode(pixels(model, 1))
    assert torch.equal(loaded.encode(pixels(model, 1)), seen)
    assert torch.equal(loaded.decode(seen), model.decode(seen))
    schedules = [m.teacher_scheduler(7, sizes(m)[1]).timesteps.tolist() for m in (loaded, model)]
    assert schedules[0] == schedules[1]
    for field in (
        "patch",
        "frame_factor",
        "channels",
        "vae_factor",
        "blocks",
        "width",
        "full_scale",
        "largest_scale",
    ):
        assert getattr(loaded, field) == getattr(model, field), field


def test_a_vaes_configuration_may_leave_out_what_its_class_has_by_default(family, model, folder):
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    options = inspect.signature(type(model.pipeline.vae).__init__).parameters
    short = {k: v for k, v in config.items() if k not in options or options[k].default != v}
    assert len(short) < len(config)
    path.write_text(json.dumps(short))
    loaded = load_model(folder)
    assert (loaded.vae_factor, loaded.frame_factor) == (model.vae_factor, model.frame_factor)
    z = latents(model, 1)
    assert torch.equal(loaded.decode(z), model.decode(z))


def test_a_vae_of_other_latents_is_refused(family, model, folder, tmp_path):
    with torch.random.fork_rng():
        AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        ).save_pretrained(tmp_path / "vae")  # fmt: skip
    with pytest.raises(ModelError, match=r"The VAE .*vae has (latent_channels|z_dim)=(16|None), but"):
        load_model(folder, vae=tmp_path / "vae")


@pytest.mark.parametrize(("kind", "options", "deterministic"), [
    ("DDIMScheduler", {}, True),
    ("DPMSolverMultistepScheduler", {}, True),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, False),
    ("EulerAncestralDiscreteScheduler", {}, False),
    ("LCMScheduler", {}, False),
    ("DDPMScheduler", {}, False),
])  # fmt: skip
def test_a_teachers_scheduler_has_to_be_deterministic(kind, options, deterministic):
    model, own = models.SDXL.tiny(), getattr(diffusers, kind)
    model.pipeline.scheduler = own.from_config(model.pipeline.scheduler.config, **options)
    if deterministic:
        assert len(model.teacher_scheduler(5, IMAGES[1]).timesteps) == 5
    else:
        with pytest.raises(ModelError, match=f"{kind} .* adds random noise"):
            model.teacher_scheduler(5, IMAGES[1])


def test_sdxl_is_told_full_size_while_it_grows_and_its_own_size_at_the_end():
    model = models.SDXL.tiny()
    model.vae_factor, model.full_scale = 8, Scale(1, 128, 128)
    assert model.size_condition(Scale(1, 64, 64)) == model.size_condition(Scale(1, 128, 128)) == (1024, 1024)
    assert model.size_condition(Scale(1, 112, 144)) == (896, 1152)  # one of SDXL's own buckets
    height, width = model.size_condition(Scale(1, 56, 72))
    assert abs(height * width / 1024**2 - 1) < 0.02 and abs(width / height - 72 / 56) < 0.02


def test_a_loaded_model_is_frozen_and_without_dropout(folder):
    for module in modules(load_model(folder)):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_a_model_is_loaded_in_the_type_asked_for(folder):
    loaded = load_model(folder, dtype=torch.bfloat16)
    exact = loaded.denoiser._keep_in_fp32_modules or ()
    for name, parameter in loaded.denoiser.named_parameters():
        kept = any(part in name.split(".") for part in exact)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    cond = loaded.encode_prompts(PROMPTS)
    assert loaded.predict(latents(loaded, 0), T, cond).dtype == torch.bfloat16
    assert loaded.encode(pixels(loaded, 0)).dtype == torch.float32


def use(model, part: str, x: torch.Tensor) -> torch.Tensor:
    """Something that takes just this part of a model; x are latents."""
    if part == "vae":
        return model.decode(x)
    if part == "text":
        return torch.cat([value.flatten() for value in model.encode_prompts(PROMPTS).tensors.values()])
    return model.predict(x, T, type(model).tiny().encode_prompts(PROMPTS))


@pytest.mark.parametrize("part", ALL_PARTS)
def test_parts_can_be_left_out(model, folder, part):
    loaded, x = load_model(folder, parts=[part]), latents(model, 1)
    assert loaded.vae_factor == model.vae_factor
    assert torch.equal(use(loaded, part, x), use(model, part, x))
    for missing in set(ALL_PARTS) - {part}:
        with pytest.raises(AssertionError, match=f"the {missing} of .* was not loaded"):
            use(loaded, missing, x)


@pytest.mark.parametrize("part", ALL_PARTS)
def test_released_parts_are_freed(model, part):
    cond = model.encode_prompts(PROMPTS)
    before = [weakref.ref(module) for module in modules(model)]
    model.release(part)
    gc.collect()
    gone = [ref for ref in before if ref() is None]
    assert 0 < len(gone) < len(before)
    assert len(modules(model)) == len(before) - len(gone)
    if part != "denoiser":
        assert model.predict(latents(model, 0), T, cond).isfinite().all()


def test_prompts_too_long_are_warned_of_and_shorter_ones_are_not(model):
    long = "a very long caption about a red apple and a dog and a rocket"
    with pytest.warns(
        UserWarning, match=r"^1 of 2 prompts are longer than (CLIP|T5) reads \(\d+ tokens\)"
    ) as caught:
        cond = model.encode_prompts(["a dog", long])
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1
    assert len(cond) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts(["a dog"])


def test_a_prompts_condition_does_not_depend_on_its_neighbours(model):
    together, alone = model.encode_prompts(PROMPTS), model.encode_prompts(PROMPTS[1:])
    for key, value in together[1].tensors.items():
        torch.testing.assert_close(value, alone.tensors[key], rtol=1e-4, atol=1e-5)
    assert any(
        not torch.allclose(v, together[0].tensors[k], atol=1e-2) for k, v in together[1].tensors.items()
    )


def test_an_empty_condition_has_the_shapes_of_an_encoded_one(model):
    real, empty = model.encode_prompts(PROMPTS), model.empty_condition(2, "cpu")
    assert {k: v.shape for k, v in empty.tensors.items()} == {k: v.shape for k, v in real.tensors.items()}


def test_conditions_are_picked_joined_repeated_and_cast_along_the_batch():
    cond = Condition({"tokens": draw(3, 5, 4), "mask": torch.arange(3).view(3, 1)})
    assert len(cond) == 3
    assert len(cond[1]) == 1
    assert torch.equal(cond[[2, 0]].tensors["mask"], torch.tensor([[2], [0]]))
    joined = Condition.cat([cond[:1], cond[1:]])
    assert all(torch.equal(joined.tensors[k], v) for k, v in cond.tensors.items())
    assert torch.equal(cond[2].expand(4).tensors["mask"], torch.full((4, 1), 2))
    cast = cond.to(dtype=torch.bfloat16)
    assert (cast.tensors["tokens"].dtype, cast.tensors["mask"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize("size", range(4))
def test_pictures_and_latents_have_the_sizes_they_should(model, size):
    x = pixels(model, size)
    z = model.encode(x)
    assert z.shape == sizes(model)[size].shape(2, model.channels, video=model.video)
    assert torch.equal(model.encode(x), z)  # the mode, not a draw
    decoded = model.decode(20 * z)
    assert decoded.shape == x.shape
    assert decoded.abs().max() <= 1


def test_the_denoiser_predicts_in_latent_layout_at_every_size(model):
    cond = model.encode_prompts(PROMPTS)
    for size in range(4):
        x_t = latents(model, size)
        prediction = model.predict(x_t, T, cond)
        assert prediction.shape == x_t.shape
        x0 = model.noise.x0(prediction, x_t, T)
        torch.testing.assert_close(model.noise.prediction(x0, x_t, T), prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", range(4))
def test_the_token_count_is_the_number_of_tokens_that_a_tap_finds(model, size):
    cond = model.encode_prompts(PROMPTS)
    for block in range(model.blocks):
        with tap(model.block(block), model.image_tokens, stop=True) as found:
            model.predict(latents(model, size), T, cond)
        assert found.tokens.shape == (2, model.token_count(sizes(model)[size]), model.width)


@pytest.mark.parametrize("offset", [-1, 0])
def test_a_block_that_is_not_there_is_refused_with_those_that_are(model, offset):
    index = -1 if offset else model.blocks
    with pytest.raises(ModelError, match=f"Block {index} does not exist; use one of 0 to {model.blocks - 1}"):
        model.block(index)


def test_the_lora_targets_reach_attention_and_mlp_of_every_block_and_nothing_outside(model):
    Backbone(model, ("student",), rank=2)
    adapted = {name for name, module in model.denoiser.named_modules() if hasattr(module, "lora_A")}
    for target in model.lora_targets:
        assert any(name.endswith("." + target) for name in adapted), target
    for index in range(model.blocks):
        inside = {n for n, m in model.block(index).named_modules() if hasattr(m, "lora_A")}
        assert any(n.endswith(".to_q") for n in inside)
        assert any(n.endswith(("net.2", "proj_out")) for n in inside)
    assert all("blocks." in name for name in adapted)


def test_gradient_checkpointing_calls_the_given_function_once_a_block(model):
    calls = []

    def function(block, *inputs):
        calls.append(block)
        return block(*inputs)

    x_t, cond = latents(model, 0), model.encode_prompts(PROMPTS)
    expected = model.predict(x_t, T, cond)
    model.enable_checkpointing(function)
    assert torch.equal(model.predict(x_t, T, cond), expected)
    for index in range(model.blocks):  # a UNet calls it for the parts of its block
        parts = list(model.block(index).modules())
        assert any(any(call is part for part in parts) for call in calls)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("size", [1, 2])
def test_the_teacher_samples_what_diffusers_pipeline_samples(model, size, guidance):
    scale, seeds = sizes(model)[size], [3, 4]
    cond, uncond = model.encode_prompts(PROMPTS), model.encode_prompts([""])
    noise = SampleNoise(seeds)(scale.shape(1, model.channels, video=model.video)[1:])
    theirs = ask_diffusers(type(model).tiny(), PROMPTS, noise, num_inference_steps=5, guidance_scale=guidance)
    ours = sample_teacher(Backbone(model), scale, cond, seeds, steps=5, guidance=guidance, uncond=uncond)
    assert ours.shape == noise.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_decoded_pictures_are_those_of_diffusers_pipeline(model):
    scale = sizes(model)[2]
    noise = SampleNoise([0, 1])(scale.shape(1, model.channels, video=model.video)[1:])
    found = [
        ask_diffusers(model, PROMPTS, noise, num_inference_steps=2, guidance_scale=1.0, output_type=kind)
        for kind in ("latent", "pt")
    ]
    pictures = (model.decode(found[0]) + 1) / 2
    if model.video:
        pictures = pictures.transpose(1, 2)  # the pipeline gives frames first
    torch.testing.assert_close(pictures, found[1], rtol=1e-5, atol=1e-5)
    assert found[1].std() > 0.01


def test_sizes_of_the_miniature_are_consistent(model):
    assert model.largest_scale is None or model.largest_scale.covers(model.full_scale)
    assert model.full_scale.height % model.patch == 0
    assert model.device == torch.device("cpu")
    assert model.to("cpu") is model


def weights_of(folder: Path, component: str) -> Path:
    names = ("transformer", "unet") if component == "denoiser" else (component,)
    return next(file for name in names for file in (folder / name).glob("*.safetensors"))


class Trap:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("component", ["denoiser", "text_encoder", "vae"])
def test_folders_that_hold_pickles_only_are_refused_and_the_pickles_are_never_opened(
    folder, tmp_path, component
):
    weights = weights_of(folder, component)
    weights.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        weights.with_name(name).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    with pytest.raises(
        ModelError, match=r"only has weights as a pickle .*are not loaded; .*convert them to safetensors"
    ):
        load_model(folder)
    assert not (tmp_path / "opened").exists()
    pickle.loads(weights.with_name("pytorch_model.bin").read_bytes())
    assert (tmp_path / "opened").exists()  # the trap works


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("component", ["denoiser", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", [Path.unlink, cut_short], ids=["missing", "cut short"])
def test_a_model_whose_weights_are_missing_or_damaged_is_refused_in_one_line(folder, component, damage):
    damage(weights_of(folder, component))
    with pytest.raises(
        ModelError, match=r"(has no weights|is damaged): .*Download the model again"
    ) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_tokenizer_whose_files_are_missing_is_refused(family, folder):
    # transformers would make one of a few words without a warning.
    for path in sorted(folder.glob("tokenizer*")):
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        shutil.rmtree(path)
        with pytest.raises(ModelError, match=f"The {path.name} of .* is missing: .*Download"):
            load_model(folder)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    load_model(folder)


@pytest.mark.parametrize("component", ["denoiser", "text_encoder", "vae"])
def test_weights_that_a_file_lacks_are_counted_and_not_drawn_at_random(folder, component):
    path = weights_of(folder, component)
    tensors = load_file(path)
    gone = sorted(
        name for name in tensors if "bias" not in name and "shared" not in name and tensors[name].ndim > 1
    )[-2:]
    save_file({k: v for k, v in tensors.items() if k not in gone}, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"2 weights of the .* are missing, for example .*Download the model again"
    ):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_index_that_is_not_json_of_a_model_is_refused(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json .*download the model again"):
        load_model(folder)


@pytest.mark.parametrize("name", ["AudioLDMPipeline", ""])
def test_an_architecture_that_no_family_handles_is_named_with_those_that_are(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name} if name else {}))
    with pytest.raises(ModelError, match=name or "model without a class name") as raised:
        family_of(tmp_path)
    for family in models.FAMILIES.values():
        assert family.pipeline_class.__name__ in str(raised.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        family_of(tmp_path)
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        load_model(tmp_path / "missing")


def test_a_model_that_the_hub_does_not_know_is_refused_with_its_answer(monkeypatch):
    def answer(*_):
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    with pytest.raises(ModelError, match=r"'nobody/nothing'.*401 Client Error Use a folder.*gated"):
        family_of("nobody/nothing")

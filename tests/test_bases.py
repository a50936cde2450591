"""Bases as they are published: without T5, as variants, with short configurations, quantized, damaged."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from families import ask_diffusers
from safetensors.torch import load_file, save_file
from tiny_run import make_tiny

import scalewise
from scalewise.cli import main
from scalewise.common import checkpoint, console
from scalewise.common.finite import non_finite
from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import Recipe
from scalewise.data.synthetic import generate
from scalewise.method.backbone import Backbone
from scalewise.method.rng import SampleNoise
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale
from scalewise.models import FAMILIES, SD3, SDXL, Flux, ModelError, PipelineAdapter, load_model
from scalewise.models.folder import choose_variants
from scalewise.models.meta import build_meta_model, read_configuration
from scalewise.planning.plan import make_plan
from scalewise.training import setup
from scalewise.training.origin import FREE_KEYS, describe_difference

PROMPTS = ["a dog", ""]


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of every family, saved; its folder has the family's name."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    FAMILIES[request.param].tiny().save(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def edit(path: Path, *without: str, **changes: Any) -> None:
    """Change a JSON file."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps(content | changes))


def small(base: Path, *changes: str) -> Recipe:
    """A recipe of the mini's for a saved miniature of SD3."""
    return find_recipe("mini").override([
        f"model.base={base}", f"data.path={base.parent / 'set'}", "schedule.scales=['4', '6', '6', '8']",
        "lora.rank=4", "loss.feature_block=1", "loss.fake.updates=1", "teacher.steps=2", "train.iterations=1",
        "train.batch=2", "train.precision=float32", "train.sample_every=0", "train.sample_prompts=[]",
        *changes,
    ])  # fmt: skip


def without_t5(folder: Path, *, kept: bool = False) -> Path:
    """A saved SD3 without its third text encoder; with its files, or not."""
    SD3.tiny().save(folder)
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for name in [] if kept else ["text_encoder_3", "tokenizer_3"]:
        shutil.rmtree(folder / name)
    return folder


@pytest.mark.parametrize("kept", [False, True])
def test_sd3_without_t5_embeds_the_zeros_of_the_stock_pipeline(tmp_path, kept):
    folder = without_t5(tmp_path / "base", kept=kept)
    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    want, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    for parts in (("text",), ("denoiser", "vae", "text")):
        model = load_model(folder, parts=parts)
        found = model.encode_prompts(PROMPTS)
        assert torch.equal(found.tensors["tokens"], want) and torch.equal(found.tensors["pooled"], pooled)
        assert not found.tensors["tokens"][:, 24:].any() and found.tensors["tokens"].shape[1] == 24 + 256
        assert torch.equal(model.encode_for_teacher(PROMPTS).tensors["tokens"], want)
        assert (model.pipeline.transformer is None) == (parts == ("text",))
    for same in (model, build_meta_model(folder)):
        shapes = {name: tensor.shape for name, tensor in same.empty_condition(2, "meta").tensors.items()}
        assert shapes == {name: tensor.shape for name, tensor in found.tensors.items()}


def test_sd3_without_t5_makes_a_set_trains_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    recipe = small(without_t5(tmp_path / "base"))
    for _ in generate(setup.teacher(recipe), recipe, ["a dog"], tmp_path / "set", count=4, batch=4):
        pass
    (tmp_path / "own.yaml").write_text(recipe.to_yaml())
    with pytest.raises(SystemExit) as stop:
        main(["distill", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 0
    pipe = scalewise.load(tmp_path / "base", student=tmp_path / "run" / "student.safetensors")
    images = pipe(["a dog"], seed=0, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and torch.isfinite(images).all() and images.std() > 0.01


def test_embeddings_with_and_without_t5_are_cached_apart(tmp_path):
    SD3.tiny().save(tmp_path / "whole")
    without_t5(tmp_path / "base", kept=True)  # the same files
    names = {setup.prompt_fingerprint(small(tmp_path / name)) for name in ("whole", "base")}
    assert len(names) == 2


# --- Variants ---


def as_variant(folder: Path, name: str = "fp16") -> Path:
    """Give all weights of a saved model the names of a variant, as save_pretrained(variant=...) does."""
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{name}.safetensors"))
    return folder


def same_weights(one: PipelineAdapter, other: PipelineAdapter) -> bool:
    parts = [{k: p for c in m._modules() for k, p in c.named_parameters()} for m in (one, other)]
    return all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0].keys() | parts[1].keys())


def test_weights_that_are_there_as_a_variant_alone_are_found_by_loading_and_plan(saved, base):
    as_variant(base)
    loaded = load_model(base)
    assert same_weights(loaded, load_model(saved)) and same_weights(loaded, load_model(base, variant="fp16"))
    shutil.copy(next((saved / "vae").glob("*.safetensors")), base / "vae")  # some plain, some not
    assert same_weights(load_model(base), loaded)
    for variant in (None, "fp16"):
        assert build_meta_model(base, variant=variant).width == loaded.width


def test_a_variant_that_is_asked_for_is_taken_where_plain_weights_are_there_too(base, tmp_path):
    other = tmp_path / "other"
    FAMILIES[base.name].tiny(1).save(other)
    for path in as_variant(other).glob("*/*.safetensors"):
        shutil.copy(path, base / path.parent.name)
    plain, fp16 = load_model(base), load_model(base, variant="fp16")
    assert same_weights(plain, FAMILIES[base.name].tiny(0)) and same_weights(
        fp16, FAMILIES[base.name].tiny(1)
    )


def test_a_recipes_variant_decides_weights_caches_and_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    SD3.tiny(1).save(base)
    as_variant(base)
    SD3.tiny(0).save(base)
    plain, fp16 = small(base), small(base, "model.variant=fp16")
    weights = [next(setup.load(r, ["vae"]).pipeline.vae.parameters()) for r in (plain, fp16)]
    assert not torch.equal(*weights)
    assert setup.prompt_fingerprint(plain) != setup.prompt_fingerprint(fp16) and setup.vae_key(
        plain
    ) != setup.vae_key(fp16)
    missing = small(base, "model.variant=bf16")
    for judge in (make_plan, setup.dry_run):
        with pytest.raises(ModelError, match=r"model.variant is bf16, but .*base has no file .*: fp16\. Set"):
            judge(missing)


def test_several_variants_and_no_plain_weights_want_a_choice(base):
    as_variant(base)
    for path in list(base.glob("*/*.fp16.safetensors")):
        shutil.copy(path, path.with_name(path.name.replace("fp16", "ema")))
    for judge in (load_model, build_meta_model):
        with pytest.raises(
            ModelError, match=r"only exist in the variants ema, fp16; choose one with model.variant"
        ):
            judge(base)
        judge(base, variant="ema")


def test_another_autoencoder_is_found_as_a_variant_too(tmp_path):
    SD3.tiny(0).save(tmp_path / "base")
    SD3.tiny(1).save(tmp_path / "other")
    as_variant(tmp_path / "other")
    loaded = load_model(tmp_path / "base", vae=tmp_path / "other" / "vae").pipeline.vae
    assert torch.equal(next(loaded.parameters()), next(SD3.tiny(1).pipeline.vae.parameters()))


def test_weights_of_other_programs_in_a_base_are_no_variant(tmp_path):
    SD3.tiny().save(tmp_path)
    as_variant(tmp_path)
    for name in (
        "sd3.5_medium.safetensors",
        "transformer/pytorch_lora_weights.safetensors",
        "a/model.x.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"w": torch.ones(1)}, tmp_path / name)
    assert load_model(tmp_path).width == 16
    for name in ("5_medium", "x"):
        with pytest.raises(ModelError, match=rf"model\.variant is {name}, .*: fp16\."):
            load_model(tmp_path, variant=name)


def test_a_bases_files_on_the_hub_are_asked_for_their_variants(monkeypatch):
    files = ["vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors", "README.md",
             "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "flux1.dev.safetensors",
             "text_encoder/model.fp16.safetensors"]  # fmt: skip
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda base: files)
    parts = ["vae", "text_encoder", "transformer", "tokenizer"]
    found = choose_variants("some/base", parts, None)
    assert found == {"vae": "fp16", "text_encoder": None, "transformer": "fp16", "tokenizer": None}
    assert choose_variants("some/base", parts, "fp16") == found | {"text_encoder": "fp16"}
    with pytest.raises(ModelError, match=r"model\.variant is bf16, but some/base has no file .*: fp16"):
        choose_variants("some/base", parts, "bf16")


# --- Configurations ---


@pytest.mark.parametrize("part", ["denoiser", "vae"])
def test_what_a_class_has_by_default_may_be_missing_in_a_configuration(base, part):
    family = FAMILIES[base.name]
    path = base / (family.denoiser_name if part == "denoiser" else "vae") / "config.json"
    config = json.loads(path.read_text())
    options = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
    before = load_model(base)
    equal = [k for k in config if k in options and json.loads(json.dumps(options[k].default)) == config[k]]
    assert equal
    edit(path, "_class_name", *equal)
    after = load_model(base, parts=[part])
    assert after.patch == before.patch and after.width == before.width and after.blocks == before.blocks
    counted = read_configuration(base)[part]["_class_name"], build_meta_model(base).width
    assert counted == (config["_class_name"], before.width)


def test_sdxl_without_a_size_of_its_own_is_as_large_as_the_stock_pipeline_makes_it(tmp_path):
    SDXL.tiny().save(tmp_path)
    edit(tmp_path / "unet" / "config.json", "sample_size")
    assert (
        load_model(tmp_path, parts=["denoiser"]).full_scale
        == build_meta_model(tmp_path).full_scale
        == Scale(1, 128, 128)
    )


@pytest.mark.parametrize("length", [None, 1e30, int(1e30)])
def test_a_tokenizer_without_a_length_reads_what_its_text_encoder_does(base, length):
    for path in base.glob("tokenizer*/tokenizer_config.json"):
        edit(path, "model_max_length", **({} if length is None else {"model_max_length": length}))
    model, family = load_model(base), base.name
    clip, t5 = 24, 512  # the miniature's positions; what the pipelines read of T5
    assert [limit for _, limit, _ in model.tokenizers()] == {
        "sd3": [clip, t5], "flux": [clip, t5], "sdxl": [clip], "wan": [t5]
    }[family]  # fmt: skip
    found = {name: tensor.shape for name, tensor in model.encode_prompts(PROMPTS).tensors.items()}
    assert found["tokens"][1] == {"sd3": clip + t5, "flux": t5, "sdxl": clip, "wan": t5}[family]
    planned = build_meta_model(base).empty_condition(2, "meta").tensors
    assert found == {name: tensor.shape for name, tensor in planned.items()}


def test_settings_in_an_index_that_the_pipeline_does_not_know_do_not_stop_plan(base):
    edit(base / "model_index.json", is_distilled=True)
    assert build_meta_model(base).width == load_model(base, parts=["denoiser"]).width


# --- What is refused, in one sentence, by loading and by `plan` ---


def refused(base: Path, words: str) -> None:
    """Loading and `plan` refuse a base in one line with these words."""
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError, match=words) as error:
            judge(base)
        assert "\n" not in str(error.value) and str(base) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "{"])
def test_an_index_that_holds_no_mapping_is_refused(saved, base, text):
    (base / "model_index.json").write_text(text)
    refused(base, r"model_index\.json is not a valid model index .*download the model again")


@pytest.mark.parametrize(
    "index", [{}, {"_class_name": None}, {"_class_name": ["x"]}, {"_class_name": "Other"}]
)
def test_an_index_of_no_pipeline_of_a_family_is_refused(base, index):
    (base / "model_index.json").write_text(json.dumps(index))
    refused(
        base, r"is a .*which is not supported; supported pipelines: StableDiffusion3Pipeline, FluxPipeline"
    )


@pytest.mark.parametrize("entry", ["absent", None, [None, None], ["diffusers"]])
def test_an_index_without_a_part_that_is_needed_is_refused(base, entry):
    for name in ("vae", "text_encoder", FAMILIES[base.name].denoiser_name, "tokenizer"):
        before = (base / "model_index.json").read_text()
        edit(base / "model_index.json", name, **({} if entry == "absent" else {name: entry}))
        refused(base, rf"is incomplete: model_index\.json has no entry for {name}\.")
        (base / "model_index.json").write_text(before)


def test_a_t5_without_its_tokenizer_is_refused(tmp_path):
    SD3.tiny().save(tmp_path)
    edit(tmp_path / "model_index.json", tokenizer_3=[None, None])
    refused(tmp_path, "no entry for tokenizer_3")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "torchao", "quant_type": "int8wo"},
        {"quant_method": "gguf"},
        {"quant_method": "of tomorrow"},
    ],
)
def test_a_base_that_was_saved_quantized_is_refused_with_the_remedy(base, quantization):
    for name in (FAMILIES[base.name].denoiser_name, "text_encoder", "vae"):
        before = (base / name / "config.json").read_text()
        edit(base / name / "config.json", quantization_config=quantization)
        method = quantization["quant_method"]
        refused(
            base, rf"The {name} of .* is already quantized \(by {method}\).*unquantized.*model.quantize=nf4"
        )
        (base / name / "config.json").write_text(before)


def test_a_denoiser_of_another_library_is_refused(base):
    name = FAMILIES[base.name].denoiser_name
    edit(base / "model_index.json", **{name: ["nunchaku", "NunchakuTransformer"]})
    refused(base, rf"The {name} of .* is a NunchakuTransformer of 'nunchaku'")


# --- Families ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_says_which_family_it_is_for(family):
    named = {find_recipe(name).model.family for name in RECIPES}
    assert named == set(FAMILIES)
    with pytest.raises(
        ModelError, match=r"model.family is 'sd4', which is not supported; set it to one of sd3, flux"
    ):
        make_plan(find_recipe("mini").override(["model.family=sd4"]))


def test_a_recipe_of_another_family_than_the_bases_is_refused_by_loading_and_plan(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    own = FAMILIES[saved.name]
    for name in ("mini", "sdxl", "flux-dev", "wan21-1.3b"):
        recipe = find_recipe(name).override([f"model.base={saved}", "train.batch=1"])
        if recipe.model.family == saved.name:
            continue
        pipeline = own.pipeline_class.__name__
        words = rf"for the model family '{recipe.model.family}' .* is a {pipeline} of the "
        words += rf"family '{saved.name}'.*recipe for '{saved.name}'"
        for judge in (make_plan, setup.dry_run, setup.teacher, setup.prompt_fingerprint):
            with pytest.raises(ModelError, match=words):
                judge(recipe)
        anything = recipe.override(["model.family=null"])
        assert setup.prompt_fingerprint(anything)


def test_known_models_are_judged_by_their_family_too():
    with pytest.raises(ModelError, match=r"family 'sd3' .*is a FluxPipeline of the family 'flux'"):
        make_plan(find_recipe("sd35-large").override(["model.base=black-forest-labs/FLUX.1-dev"]))


def test_a_run_that_was_begun_before_recipes_had_a_family_goes_on():
    new = find_recipe("mini")
    old = new.override(["model.family=null"])
    assert not describe_difference(old.model_dump(mode="json"), new.model_dump(mode="json"), free=FREE_KEYS)


# --- Schedulers ---

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DYNAMIC = FLOW | {"use_dynamic_shifting": True, "time_shift_type": "exponential"}


def with_scheduler(family: str, kind: str, **options: Any) -> PipelineAdapter:
    """A miniature whose base has another scheduler."""
    model = FAMILIES[family].tiny()
    model.pipeline.scheduler = getattr(diffusers, kind)(**options)
    return model


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("flux", "DPMSolverMultistepScheduler", DYNAMIC),
        ("flux", "DPMSolverSinglestepScheduler", DYNAMIC),
        ("flux", "DEISMultistepScheduler", DYNAMIC),
        ("flux", "UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
        ("flux", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("sd3", "DPMSolverMultistepScheduler", FLOW | {"flow_shift": 3.0}),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("wan", "DPMSolverMultistepScheduler", FLOW | {"flow_shift": 3.0}),
        ("wan", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_with_another_scheduler_the_teacher_samples_what_diffusers_pipeline_does(family, kind, options):
    model = with_scheduler(family, kind, **options)
    scale = Scale(2, 8, 8) if model.video else Scale(1, 8, 8)
    noise, cond = SampleNoise([3])(scale.shape(1, 4, video=model.video)[1:]), model.encode_prompts(["a dog"])
    want = ask_diffusers(model, ["a dog"], noise, num_inference_steps=4, guidance_scale=3.0)
    uncond = None if family == "flux" else model.encode_prompts([""])
    found = sample_teacher(Backbone(model), scale, cond, [3], steps=4, guidance=3.0, uncond=uncond)
    assert torch.allclose(found, want, atol=1e-4) and want.std() > 0.5


def test_flux_with_dpm_solver_of_a_fixed_shift_samples_at_that_shift():
    # The stock pipeline ends in an assertion: it passes a dynamic shift to all schedulers.
    model = with_scheduler("flux", "DPMSolverMultistepScheduler", **FLOW, flow_shift=3.0)
    sigmas = model.teacher_scheduler(4, Scale(1, 8, 8)).sigmas.tolist()
    assert sigmas == pytest.approx([0.9997, 0.9, 0.75, 0.5, 0.0], abs=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_flux_with_heun_samples_by_eulers_method_with_its_shift_and_says_so(dynamic):
    model = Flux.tiny()
    options: dict[str, Any] = {} if dynamic else {"use_dynamic_shifting": False}
    own = {**model.pipeline.scheduler.config, **options}
    model.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(own)
    want = model.teacher_scheduler(4, Scale(1, 8, 8)).sigmas
    model.pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(own)
    told = "dynamic shifting" if dynamic else "shift 3"
    with pytest.warns(
        UserWarning, match=f"FlowMatchHeunDiscrete.* does not take .*sigmas.* samples with .*Euler.*{told}"
    ):
        found = model.teacher_scheduler(4, Scale(1, 8, 8))
    assert type(found) is diffusers.FlowMatchEulerDiscreteScheduler and torch.equal(found.sigmas, want)


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon", "use_flow_sigmas": True}),
    ],
)
def test_a_scheduler_of_another_noise_process_is_refused_for_models_of_flow_matching(family, kind, options):
    model = with_scheduler(family, kind, **options)
    with pytest.raises(
        ModelError, match=rf"scheduler {kind} of .* not configured for flow matching.* samples would be noise"
    ):
        model.teacher_scheduler(4, Scale(3, 8, 8) if model.video else Scale(1, 8, 8))


def test_sdxl_with_zero_terminal_snr_and_epsilon_is_refused_by_loading_and_plan(tmp_path):
    SDXL.tiny().save(tmp_path)
    assert load_model(tmp_path).noise
    edit(tmp_path / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    refused(tmp_path, "has zero terminal SNR .*x0 cannot be computed from a prediction of 'epsilon'")
    betas = [0.01] * 999 + [1.0]
    edit(tmp_path / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=False, trained_betas=betas)
    refused(tmp_path, "has zero terminal SNR")


# --- Weights that are no numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_a_number_that_is_none_is_refused_on_loading(base, value):
    denoiser = FAMILIES[base.name].denoiser_name
    for part, name in (("denoiser", denoiser), ("vae", "vae"), ("text", "text_encoder")):
        [file] = (base / name).glob("*.safetensors")
        whole = load_file(file)
        key = max(whole, key=lambda k: whole[k].numel())
        spoiled = {k: v.clone() for k, v in whole.items()}
        spoiled[key].view(-1)[5] = value
        save_file(spoiled, file, metadata={"format": "pt"})
        words = rf"The {name} of {base} has NaN or infinity in 1 of its \d+ weights \(as float32\), .* "
        with pytest.raises(ModelError, match=words) as error:
            load_model(base)
        assert key.removeprefix("text_model.") in str(error.value)
        load_model(base, parts=[p for p in ("denoiser", "vae", "text") if p != part])
        save_file(whole, file, metadata={"format": "pt"})


def test_of_another_autoencoder_with_nan_its_own_place_is_named(tmp_path):
    for name in ("base", "other"):
        SD3.tiny().save(tmp_path / name)
    [file] = (tmp_path / "other" / "vae").glob("*.safetensors")
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"The vae of {file.parent} has NaN or infinity in (\d+) of its \1 "
    ):
        load_model(tmp_path / "base", vae=file.parent)


def test_a_base_that_half_precision_cannot_hold_is_refused_in_it(tmp_path):
    SD3.tiny().save(tmp_path)
    [file] = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    load_model(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"\(as float16\), for example proj_out.weight.* set model.dtype=bfloat16"
    ):
        load_model(tmp_path, dtype=torch.float16)


def test_numbers_that_are_none_are_found_in_nested_state_of_every_type():
    good = {"a": torch.ones(3), "b": [torch.zeros(0), torch.arange(3)], "c": 1.0, "d": "text", "e": None}
    assert non_finite(good) == []
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2):
        bad = torch.ones(5, 7).to(kind)
        bad.view(-1)[3] = float("nan")
        assert non_finite(good | {"f": {"g": (torch.ones(2), bad)}}) == ["f/g/1"]
        assert non_finite({"x": torch.tensor([1.0, -float("inf")]).to(kind)}) == ["x"]


@pytest.mark.parametrize("key", ["student", "student_optimizer", "fake", "head", "average"])
def test_a_checkpoint_with_a_number_that_is_none_is_not_resumed(tmp_path, key):
    recipe = make_tiny(tmp_path).override(["train.iterations=2", "train.ema=0.9"])
    trainer = setup.build_trainer(recipe, setup.prepare_data(recipe, console.progress), tmp_path / "run")
    list(trainer.fit())
    [path] = trainer.checkpoints.glob("step-*")
    trainer.resume(path)
    state, meta = checkpoint.load(path)
    first_tensor(state[key]).view(-1)[0] = float("nan")
    checkpoint.save(path, state, meta=meta)
    words = rf"{path} cannot be resumed: its tensors\.safetensors has NaN or infinity in 1 tensors, .* {key}/"
    with pytest.raises(checkpoint.CheckpointError, match=words):
        trainer.resume(path)


def first_tensor(state: Any) -> Any:
    """The first tensor in a nested state, or None."""
    if isinstance(state, torch.Tensor):
        return state
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return next((found for item in items if (found := first_tensor(item)) is not None), None)

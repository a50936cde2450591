"""A student's file and its use on the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.method.backbone import Backbone
from scalewise.method.scales import ScaleSchedule
from scalewise.models import SD3, Wan, lora_keys
from scalewise.models.lora import Student, StudentError, fused, load_student, save_student, write_student


@pytest.fixture
def recipe() -> Recipe:
    return find_recipe("mini").override(["lora.rank=4", "lora.alpha=8", "schedule.scales=['4','6','6','8']"])


@pytest.fixture
def file(make_backbone, recipe: Recipe, tmp_path: Path) -> Path:
    backbone = make_backbone("student")
    save_student(
        tmp_path / "student.safetensors", backbone.roles.state("student"), recipe,
        dtype=torch.float32,
    )  # fmt: skip
    return tmp_path / "student.safetensors"


def test_schedule_recipe_and_weights_come_back_as_they_were(
    file: Path, make_backbone, recipe: Recipe
) -> None:
    student = load_student(file)
    assert student.schedule == recipe.schedule.build() and Recipe.from_mapping(student.recipe) == recipe
    assert (student.rank, student.alpha, student.base) == (4, 8.0, "mini")
    for name, value in make_backbone("student").roles.state("student").items():
        assert torch.equal(student.tensors[name], value)
    with safe_open(file, "pt") as opened:
        assert "torch" in json.loads(opened.metadata()["scalewise.versions"])
        assert all(key.startswith("transformer.") for key in opened.keys())  # noqa: SIM118


def test_equal_students_are_equal_files(file: Path, tmp_path: Path) -> None:
    student = load_student(file)
    for name in ("one", "two"):
        write_student(tmp_path / name, student, dtype=torch.float32)
    written = (tmp_path / "one").read_bytes()
    assert written == (tmp_path / "two").read_bytes() == file.read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert list(header) == sorted(header) and list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_a_fused_student_equals_its_adapter_and_leaves_the_base_bit_identical(file: Path) -> None:
    student = load_student(file)
    adapter = Backbone(SD3.tiny(), ["student"], rank=4, alpha=8)
    adapter.roles.load("student", student.tensors)
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 300.0])
    model = SD3.tiny()
    cond = model.encode_prompts(["a", "b"])
    bare, expected = Backbone(model), adapter.predict_x0(x_t, t, cond, role="student")
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    plain = bare.predict_x0(x_t, t, cond)
    with fused(model.denoiser, student):
        torch.testing.assert_close(bare.predict_x0(x_t, t, cond), expected, rtol=1e-4, atol=1e-4)
        assert (expected - plain).abs().max() > 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert torch.equal(bare.predict_x0(x_t, t, cond), plain)


def test_the_base_comes_back_also_when_the_student_does_not_fit(file: Path) -> None:
    student, model = load_student(file), SD3.tiny()
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    last = sorted(student.tensors)[-2:]
    wrong = {k: torch.zeros(5, 5) if k in last else v for k, v in student.tensors.items()}
    other = {k.replace("blocks.3", "blocks.9"): v for k, v in student.tensors.items()}
    half = dict(list(student.tensors.items())[1:])
    for tensors, said in (
        (wrong, "but the layer has"),
        (other, "blocks.9"),
        (half, "have only one of their two"),
    ):
        with (
            pytest.raises(StudentError, match=said),
            fused(model.denoiser, replace(student, tensors=tensors)),
        ):
            pass
        assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


def test_what_is_no_student_is_refused_with_the_reason(file: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-50])
    for name, said in (
        ("gone.safetensors", "There is no student"),
        ("pickle.bin", "pickles\) are not loaded"),
        ("plain.safetensors", "not a supported LoRA: 1 of 1 weights are unexpected"),
        ("cut.safetensors", "damaged"),
    ):
        with pytest.raises(StudentError, match=said):
            load_student(tmp_path / name)
    assert isinstance(load_student(file), Student)


@pytest.mark.parametrize("form", lora_keys.FORMS)
def test_every_convention_gives_the_same_student_back(
    file: Path, tmp_path: Path, form: lora_keys.Form
) -> None:
    student, model = load_student(file), SD3.tiny()
    out = tmp_path / "peft" if form == "peft" else tmp_path / f"{form}.safetensors"
    write_student(out, student, dtype=torch.float32, form=form)
    again = load_student(out).match_to(model.denoiser)
    assert again.tensors.keys() == student.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in student.tensors.items())
    assert (again.schedule, again.alpha, again.recipe) == (student.schedule, student.alpha, student.recipe)


def strip(path: Path, out: Path) -> None:
    """Rewrite a file without metadata, as those of others are."""
    with safe_open(path, "pt") as opened:
        save_file({k: opened.get_tensor(k) for k in opened.keys()}, out)  # noqa: SIM118


@pytest.mark.parametrize("form", lora_keys.FORMS)
def test_a_file_of_others_needs_a_schedule_and_has_the_same_effect(
    file: Path, tmp_path: Path, form: lora_keys.Form
) -> None:
    student, schedule = load_student(file), ScaleSchedule.parse("1000@4 600@8")
    path = tmp_path / "peft" if form == "peft" else tmp_path / "own.safetensors"
    write_student(path, student, dtype=torch.float32, form=form)
    weights = path / "adapter_model.safetensors" if form == "peft" else path
    foreign = tmp_path / ("peft/adapter_model.safetensors" if form == "peft" else "foreign.safetensors")
    strip(weights, foreign)
    given = path if form == "peft" else foreign
    with pytest.raises(StudentError, match=r"has no schedule in its metadata.*scalewise recipes"):
        load_student(given)
    found = load_student(given, schedule=schedule)
    assert (found.schedule, found.rank, found.recipe) == (schedule, 4, {})
    weights_of = {}
    for name, one in (("own", student), ("foreign", found)):
        model = SD3.tiny()
        with fused(model.denoiser, one):
            weights_of[name] = model.denoiser.transformer_blocks[0].attn.to_q.weight.clone()
        weights_of["bare"] = model.denoiser.transformer_blocks[0].attn.to_q.weight.clone()
    # Stripped of all metadata diffusers' names say nothing of alpha: then alpha = rank, as diffusers has it.
    factor = 0.5 if form == "diffusers" else 1.0
    expected = weights_of["bare"] + factor * (weights_of["own"] - weights_of["bare"])
    torch.testing.assert_close(weights_of["foreign"], expected)


def test_a_weight_below_one_takes_that_part_of_the_update(file: Path) -> None:
    student, found = load_student(file), {}
    for weight in (0.0, 0.5, 1.0):
        model = SD3.tiny()
        with fused(model.denoiser, student, weight=weight):
            found[weight] = model.denoiser.transformer_blocks[1].ff.net[2].weight.clone()
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2)
    assert not torch.equal(found[0.0], found[1.0])


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(StudentError, match=r"adapter_model\.bin, a pickle, and pickles are not loaded"):
        load_student(tmp_path)


@pytest.mark.parametrize(("settings", "factor"), [
    ({"r": 4, "lora_alpha": 16}, 4.0), ({"r": 4, "lora_alpha": 4, "use_rslora": True}, 2.0), ({"r": 4}, 1.0),
])  # fmt: skip
def test_alpha_of_others_is_read_from_the_metadata_that_diffusers_writes(file, tmp_path, settings, factor):
    with safe_open(file, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    head = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    save_file(tensors, tmp_path / "other.safetensors", metadata=head)
    student = load_student(tmp_path / "other.safetensors", schedule=ScaleSchedule.parse("1000@8"))
    for name, value in load_student(file).tensors.items():
        expected = value * factor if ".lora_B." in name else value
        torch.testing.assert_close(student.tensors[name], expected)
    assert student.alpha == student.rank == 4


def test_layers_of_different_rank_get_one_without_changing_their_update(file, tmp_path):
    student, model = load_student(file), SD3.tiny()
    one = "transformer_blocks.0.attn.to_q"
    tensors = dict(student.tensors)
    tensors[f"{one}.lora_A.weight"] = tensors[f"{one}.lora_A.weight"][:2].clone()
    tensors[f"{one}.lora_B.weight"] = tensors[f"{one}.lora_B.weight"][:, :2].clone()
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, tmp_path / "mixed.safetensors")
    found = load_student(tmp_path / "mixed.safetensors", schedule=student.schedule)
    a, b = found.tensors[f"{one}.lora_A.weight"], found.tensors[f"{one}.lora_B.weight"]
    assert a.shape[0] == b.shape[1] == found.rank == 4
    torch.testing.assert_close(b @ a, tensors[f"{one}.lora_B.weight"] @ tensors[f"{one}.lora_A.weight"])
    with fused(model.denoiser, found):
        pass


def test_settings_that_cannot_be_honoured_are_refused(file, tmp_path):
    with safe_open(file, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    for text, said in (
        ('{"transformer.use_dora": true}', "uses use_dora"),
        ("{", "settings of .* damaged"),
    ):
        save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(StudentError, match=said):
            load_student(tmp_path / "x.safetensors", schedule=ScaleSchedule.parse("1000@8"))


@pytest.mark.parametrize(("layer", "denoiser"), [
    ("mid_block.attentions.0.to_q", "unet"), ("transformer_blocks.0.attn.to_q", "transformer"),
])  # fmt: skip
def test_the_denoisers_name_of_a_file_of_others_follows_from_its_layers(tmp_path, layer, denoiser):
    path = f"base_model.model.{layer}"
    tensors = {f"{path}.{part}.weight": torch.ones(2, 2) for part in ("lora_A", "lora_B")}
    save_file(tensors, tmp_path / "other.safetensors")
    student = load_student(tmp_path / "other.safetensors", schedule=ScaleSchedule.parse("1000@8"))
    assert student.denoiser == denoiser


def wan_student() -> Student:
    backbone = Backbone(Wan.tiny(), ["student"], rank=4, alpha=2)
    draw = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(v.shape, generator=draw) for k, v in backbone.roles.state("student").items()}
    return Student(tensors, ScaleSchedule.parse("1000@2x4x4 600@3x8x8"), 4, 2.0, "wan", {})


def test_wans_kohya_names_are_its_authors_and_diffusers_reads_them(tmp_path):
    student = wan_student()
    write_student(tmp_path / "own.safetensors", student, dtype=torch.float32, form="kohya")
    tensors = load_file(tmp_path / "own.safetensors")
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in tensors
    assert "lora_unet_blocks_2_cross_attn_o.alpha" in tensors
    converted = lora_conversion_utils._convert_musubi_wan_lora_to_diffusers(dict(tensors))
    for name, value in student.tensors.items():
        if ".lora_B." in name:
            a = name.replace("lora_B", "lora_A")
            found = converted[f"transformer.{name}"] @ converted[f"transformer.{a}"]
            torch.testing.assert_close(found, value @ student.tensors[a] * 2 / 4)
    again = load_student(tmp_path / "own.safetensors").match_to(Wan.tiny().denoiser)
    assert again.tensors.keys() == student.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in student.tensors.items())


def test_wans_authors_names_with_dots_are_read(tmp_path):
    student, layer = wan_student(), "diffusion_model.blocks.1.cross_attn.k"
    ours = "blocks.1.attn2.to_k"
    pair = {f"{layer}.lora_{p}.weight": student.tensors[f"{ours}.lora_{p}.weight"] for p in "AB"}
    save_file(pair, tmp_path / "dots.safetensors")
    found = load_student(tmp_path / "dots.safetensors", schedule=student.schedule)
    assert found.match_to(Wan.tiny().denoiser).tensors.keys() == {f"{ours}.lora_{p}.weight" for p in "AB"}


def test_a_student_that_lost_layers_is_refused_with_their_number(file, tmp_path):
    with safe_open(file, "pt") as opened:
        tensors, head = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    kept = {k: v for k, v in tensors.items() if "transformer_blocks.0." in k}
    save_file(kept, tmp_path / "cut.safetensors", metadata=head)
    gone = (len(tensors) - len(kept)) // 2
    with pytest.raises(StudentError, match=rf"{len(kept) // 2} of {len(tensors) // 2} layers \({gone} are"):
        load_student(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(("layer", "own"), [
    ("blocks.0.ffn.net.0.proj", True), ("blocks.0.attn1.to_q", True), ("blocks.0.ffn.2", False),
    ("blocks.0.ffn.0", False), ("blocks.0.self_attn.q", False), ("transformer_blocks_0_attn_to_q", False),
])  # fmt: skip
def test_diffusers_paths_are_told_from_others(layer, own):
    assert lora_keys.is_path(f"{layer}.lora_A.weight") is own

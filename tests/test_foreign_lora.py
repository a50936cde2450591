"""LoRA files of other programs: read as stock diffusers reads them, or refused by what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalewise.cli.run_making import export_student
from scalewise.method.scales import ScaleSchedule
from scalewise.models import SD3, SDXL, Flux, Wan, lora_keys
from scalewise.models.lora import Student, StudentError, _from_foreign, fuse, load_student, write_student
from scalewise.models.lora_foreign_keys import convert
from scalewise.pipelines import scale_wise

SCHEDULE = ScaleSchedule.parse("1000@4 600@8")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_student(tensors: dict[str, Tensor], folder: Path) -> Student:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "other.safetensors")
    return load_student(folder / "other.safetensors", schedule=SCHEDULE)


def update(student: Student, layer: str) -> Tensor:
    a, b = (student.tensors[f"{layer}.lora_{half}.weight"] for half in "AB")
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


@pytest.mark.parametrize("form", ["lora_unet_double_blocks_0_img_attn_qkv", "lora_A"])
def test_a_fused_layer_of_flux_becomes_three_with_its_own_rows_each(tmp_path, form):
    a, b = noise(4, 16), noise(48, 4, seed=1)
    if form == "lora_A":
        layer = "diffusion_model.double_blocks.0.img_attn.qkv"
        tensors = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    else:
        tensors = {f"{form}.lora_down.weight": a, f"{form}.lora_up.weight": b}
    tensors[f"{layer if form == 'lora_A' else form}.alpha"] = torch.tensor(2.0)
    tensors[f"{layer if form == 'lora_A' else form}.diff_b"] = noise(48, seed=2)
    student = make_student(tensors, tmp_path).match_to(Flux.tiny().denoiser)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        path, rows = f"transformer_blocks.0.attn.{name}", slice(16 * part, 16 * part + 16)
        torch.testing.assert_close(update(student, path), 0.5 * b[rows] @ a)
        assert torch.equal(student.tensors[f"{path}.lora_B.bias"], noise(48, seed=2)[rows])


def test_layers_of_published_flux_are_placed_as_stock_diffusers_places_them(tmp_path):
    shapes = {
        "double_blocks_3_txt_attn_qkv": (3072, 9216), "double_blocks_18_img_mod_lin": (3072, 18432),
        "double_blocks_0_txt_mlp_0": (3072, 12288), "single_blocks_37_linear1": (3072, 21504),
        "single_blocks_2_linear2": (15360, 3072), "single_blocks_2_modulation_lin": (3072, 9216),
    }  # fmt: skip
    tensors = {}
    for i, (name, (wide, high)) in enumerate(shapes.items()):
        tensors |= {f"lora_unet_{name}.lora_down.weight": noise(2, wide, seed=i),
                    f"lora_unet_{name}.lora_up.weight": noise(high, 2, seed=i),
                    f"lora_unet_{name}.alpha": torch.tensor(4.0)}  # fmt: skip
    stock = {k.partition(".")[2]: v for k, v in FluxPipeline.lora_state_dict(dict(tensors)).items()}
    student = make_student(tensors, tmp_path)
    assert student.tensors.keys() == stock.keys() and len(stock) == 2 * (3 + 1 + 1 + 4 + 1 + 1)
    for layer in map(lora_keys.layer_of, stock):
        theirs = stock[f"{layer}.lora_B.weight"][:64] @ stock[f"{layer}.lora_A.weight"][:, :64]
        b, a = student.tensors[f"{layer}.lora_B.weight"], student.tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(b[:64] @ a[:, :64], theirs, rtol=1e-4, atol=1e-4)


BLOCK = "attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(("theirs", "ours", "shape"), [
    ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"down_blocks.1.{BLOCK}.attn1.to_q", (8, 8)),
    ("input_blocks_4_1_transformer_blocks_0_attn2_to_out_0", f"down_blocks.1.{BLOCK}.attn2.to_out.0", (8, 8)),
    ("input_blocks_4_0_in_layers_2", "down_blocks.1.resnets.0.conv1", (8, 8, 3, 3)),
    ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in", (8, 8)),
    ("output_blocks_3_1_transformer_blocks_0_ff_net_0_proj", f"up_blocks.1.{BLOCK}.ff.net.0.proj",
     (8, 8)),
    ("time_embed_0", "time_embedding.linear_1", (8, 8)),
])  # fmt: skip
def test_sgms_names_of_sdxl_are_read(tmp_path, theirs, ours, shape):
    a, b = noise(2, *shape[1:]), noise(shape[0], 2, *(1 for _ in shape[2:]), seed=1)
    tensors = {f"lora_unet_{theirs}.lora_down.weight": a, f"lora_unet_{theirs}.lora_up.weight": b}
    # Files name many layers; one of a block tells that outer ones are SGM's too.
    other = "lora_unet_input_blocks_7_1_proj_out"
    tensors |= {f"{other}.lora_down.weight": noise(2, 8), f"{other}.lora_up.weight": noise(8, 2)}
    student = make_student(tensors, tmp_path)
    assert {lora_keys.layer_of(n) for n in student.tensors} == {ours, "down_blocks.2.attentions.0.proj_out"}
    assert student.denoiser == "unet"
    assert torch.equal(student.tensors[f"{ours}.lora_A.weight"], a)


def test_convolutions_are_fused_as_stock_diffusers_fuses_them(tmp_path):
    model, stock = SDXL.tiny(), SDXL.tiny()
    layers = {"down_blocks.0.resnets.0.conv1": 3, "down_blocks.0.downsamplers.0.conv": 3,
              "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 0}  # fmt: skip
    tensors = {}
    for i, (layer, kernel) in enumerate(layers.items()):
        out, into = model.denoiser.get_submodule(layer).weight.shape[:2]
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = noise(2, into, *[kernel] * 2 if kernel else [], seed=i)
        tensors[f"{name}.lora_up.weight"] = noise(out, 2, *[1] * 2 if kernel else [], seed=i)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    student = make_student(tensors, tmp_path)
    before = {layer: model.denoiser.get_submodule(layer).weight.clone() for layer in layers}
    fuse(model.denoiser, student)
    stock.pipeline.load_lora_weights(load_file(tmp_path / "other.safetensors"))
    stock.pipeline.fuse_lora()
    stock.pipeline.unload_lora_weights()
    for layer in layers:
        ours, theirs = (m.denoiser.get_submodule(layer).weight for m in (model, stock))
        torch.testing.assert_close(ours, theirs)
        assert (ours - before[layer]).abs().max() > 0.1


def biased(model: SD3) -> dict[str, Tensor]:
    """PEFT's file for one layer with a bias, and one without."""
    tensors = {}
    for i, layer in enumerate(("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2")):
        out, into = model.denoiser.get_submodule(layer).weight.shape
        tensors |= {f"base_model.model.{layer}.lora_A.weight": noise(2, into, seed=i),
                    f"base_model.model.{layer}.lora_B.weight": noise(out, 2, seed=i)}  # fmt: skip
    tensors["base_model.model.transformer_blocks.0.attn.to_q.lora_B.bias"] = noise(16, seed=5)
    tensors["transformer_blocks.2.attn.to_k.diff_b"] = noise(16, seed=6)
    return tensors


def test_biases_are_fused_exported_and_attached(tmp_path):
    model = SD3.tiny()
    student, x = make_student(biased(model), tmp_path), noise(3, 16, seed=9)
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_k")
    old = {layer: model.denoiser.get_submodule(layer).bias.clone() for layer in layers}
    fuse(model.denoiser, student, weight=0.5)
    for layer, seed in zip(layers, (5, 6), strict=True):
        bias = model.denoiser.get_submodule(layer).bias
        torch.testing.assert_close(bias - old[layer], 0.5 * noise(16, seed=seed))
    pipeline = scale_wise.ScaleWiseSD3Pipeline(**SD3.tiny().pipeline.components)
    pipeline.set_student(student, weight=0.5)
    for layer in layers:
        attached = pipeline.transformer.get_submodule(layer)(x)
        torch.testing.assert_close(attached, model.denoiser.get_submodule(layer)(x), rtol=1e-4, atol=1e-4)
    for form in lora_keys.FORMS:
        out = tmp_path / form if form == "peft" else tmp_path / f"{form}.safetensors"
        write_student(out, student, dtype=torch.float32, form=form)
        again = load_student(out).match_to(model.denoiser)
        assert again.tensors.keys() == student.tensors.keys()
        assert all(torch.equal(again.tensors[k], v) for k, v in student.tensors.items())


def test_a_bias_of_peft_is_scaled_by_alpha_and_one_of_kohya_is_not():
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    for ending, expected in ((".lora_B.bias", 3.0), (".diff_b", 1.0)):
        tensors = {"lora_unet_x.lora_down.weight": a, "lora_unet_x.lora_up.weight": b,
                   "lora_unet_x.alpha": torch.tensor(6.0), f"lora_unet_x{ending}": torch.ones(4)}  # fmt: skip
        weights, alphas = convert(tensors)
        assert alphas == {"x": 6.0} and f"x{ending}" in weights
        assert _from_foreign(weights, alphas, {}, schedule=SCHEDULE).tensors["x.lora_B.bias"][0] == expected


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_wans_outer_layers_biases_and_head_are_read(tmp_path, prefix):
    model = Wan.tiny()
    names = {"blocks.1.self_attn.q": "blocks.1.attn1.to_q", "blocks.2.ffn.0": "blocks.2.ffn.net.0.proj",
             "text_embedding.0": "condition_embedder.text_embedder.linear_1",
             "time_embedding.2": "condition_embedder.time_embedder.linear_2",
             "time_projection.1": "condition_embedder.time_proj"}  # fmt: skip
    tensors = {}
    for i, (theirs, ours) in enumerate(names.items()):
        out, into = model.denoiser.get_submodule(ours).weight.shape
        name = prefix + (theirs.replace(".", "_") if prefix == "lora_unet_" else theirs)
        tensors |= {f"{name}.lora_down.weight": noise(2, into, seed=i), f"{name}.alpha": torch.ones(1)}
        tensors |= {f"{name}.lora_up.weight": noise(out, 2, seed=i), f"{name}.diff_b": noise(out, seed=i)}
    head = model.denoiser.proj_out.weight
    name = prefix + ("head_head" if prefix == "lora_unet_" else "head.head")
    tensors |= {f"{name}.diff": noise(*head.shape), f"{name}.diff_b": noise(len(head))}
    tensors[f"{prefix}blocks.0.norm3.diff"] = torch.zeros(24)  # trainers write what they left alone
    student = make_student(tensors, tmp_path).match_to(model.denoiser)
    assert {lora_keys.layer_of(n) for n in student.tensors} == {*names.values(), "proj_out"}
    for i, (theirs, ours) in enumerate(names.items()):
        out, into = model.denoiser.get_submodule(ours).weight.shape
        torch.testing.assert_close(update(student, ours), noise(out, 2, seed=i) @ noise(2, into, seed=i) / 2)
        assert torch.equal(student.tensors[f"{ours}.lora_B.bias"], noise(out, seed=i)), theirs
    torch.testing.assert_close(update(student, "proj_out"), noise(*head.shape))


PAIR = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": noise(2, 16),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": noise(16, 2)}  # fmt: skip


@pytest.mark.parametrize(("name", "said"), [
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoders .1 of 3, for example"),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "only weights for the denoiser"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "is a DoRA .1 weights"),
    ("lora_unet_x.dora_scale", "is a DoRA"),
    ("lora_unet_x.hada_w1_a", "is a LoHa"),
    ("lora_unet_x.lokr_w1", "is a LoKr"),
    ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "the original SD3 code .joint_blocks"),
    ("transformer.transformer_blocks.0.attn.to_q.diff", "differences of full weights for 1 layers"),
    ("lora_unet_double_blocks_0_img_attn_norm_key_norm.diff", "a layer double_blocks_0_img_attn_norm_k"),
    ("lora_unet_single_blocks_99_linear2.diff_b", "a layer single_blocks_99_linear2 that the converter"),
    ("diffusion_model.blocks.0.self_attn.norm_q.diff", "a layer blocks.0.self_attn.norm_q that the conv"),
    ("transformer.transformer_blocks.0.attn.to_q.bias", "1 of 3 weights are unexpected"),
])  # fmt: skip
def test_what_a_file_holds_and_cannot_be_applied_is_named(tmp_path, name, said):
    with pytest.raises(StudentError, match=said):
        make_student({**PAIR, name: torch.ones(16)}, tmp_path)


def test_an_export_is_checked_against_the_base(tmp_path):
    SD3.tiny().save(tmp_path / "sd3")
    save_file(
        {k.replace("_blocks.0", "_blocks.9"): v for k, v in PAIR.items()}, tmp_path / "other.safetensors"
    )
    save_file(
        {k: (v[:, :1] if "B" in k else v[:1, :8]).clone() for k, v in PAIR.items()},
        tmp_path / "small.safetensors",
    )
    save_file(PAIR, tmp_path / "right.safetensors")
    out, schedule = tmp_path / "out.safetensors", "1000@4 600@8"
    for name, said in (
        ("other", "layers that the base does not have"),
        ("small", "is for a layer of 16 x 8"),
    ):
        with pytest.raises(StudentError, match=said):
            export_student(str(tmp_path / f"{name}.safetensors"), out, "diffusers", schedule,
                           base=str(tmp_path / "sd3"))  # fmt: skip
        assert not out.exists()
    given = (str(tmp_path / "right.safetensors"), out, "diffusers", schedule)
    assert export_student(*given, base=str(tmp_path / "sd3")) == 2
    with pytest.warns(UserWarning, match="does not record its base model, so its layers were not checked"):
        export_student(*given)
    with pytest.warns(UserWarning, match="were not checked against its base"):
        export_student(*given, base=str(tmp_path / "gone"))

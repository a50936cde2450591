"""LoRA files with layers of older or other forms: read as stock diffusers reads them, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalewise.method.scales import ScaleSchedule
from scalewise.models import SDXL
from scalewise.models.lora import StudentError, fuse, load_student

SCHEDULE = ScaleSchedule.parse("1000@4 600@8")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("processor", ["processor.", ""])
def test_the_old_form_of_diffusers_is_fused_as_stock_diffusers_fuses_it(tmp_path, processor):
    model, stock = SDXL.tiny(), SDXL.tiny()
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    layers = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
    tensors = {}
    for i, (theirs, ours) in enumerate(layers.items()):
        out, into = model.denoiser.get_submodule(f"{attention}.{ours}").weight.shape
        name = f"unet.{attention}.{processor}{theirs}_lora"
        tensors |= {f"{name}.down.weight": noise(2, into, seed=i), f"{name}.up.weight": noise(out, 2, seed=i)}
    save_file(tensors, tmp_path / "old.safetensors")
    before = {
        ours: model.denoiser.get_submodule(f"{attention}.{ours}").weight.clone() for ours in layers.values()
    }
    student = load_student(tmp_path / "old.safetensors", schedule=SCHEDULE)
    assert student.denoiser == "unet" and len(fuse(model.denoiser, student)) == 4
    stock.pipeline.load_lora_weights(load_file(tmp_path / "old.safetensors"))
    stock.pipeline.fuse_lora()
    stock.pipeline.unload_lora_weights()
    for ours in layers.values():
        mine, theirs = (m.denoiser.get_submodule(f"{attention}.{ours}").weight for m in (model, stock))
        torch.testing.assert_close(mine, theirs)
        assert (mine - before[ours]).abs().max() > 0.1


BLOCK = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": noise(2, 16),
         "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": noise(16, 2)}  # fmt: skip


def refusal(tensors: dict[str, Tensor], folder: Path) -> str:
    save_file(tensors, folder / "other.safetensors")
    with pytest.raises(StudentError) as raised:
        load_student(folder / "other.safetensors", schedule=SCHEDULE)
    return str(raised.value)


@pytest.mark.parametrize("layer", [
    "lora_unet_txt_in", "lora_unet_time_in_in_layer", "lora_unet_final_layer_adaLN_modulation_1",
    "diffusion_model.img_in", "diffusion_model.vector_in.out_layer", "diffusion_model.final_layer.linear",
])  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_outer_layers_of_flux_under_other_names_are_refused_by_name(tmp_path, layer, alone):
    pair = {f"{layer}.lora_down.weight": noise(2, 16), f"{layer}.lora_up.weight": noise(16, 2)}
    told = refusal(pair if alone else BLOCK | pair, tmp_path)
    name = layer.removeprefix("lora_unet_").removeprefix("diffusion_model.")
    assert f"FLUX layers outside the blocks ({name})" in told and "another model" not in told


def test_a_layer_whose_rows_do_not_split_is_refused_with_its_shapes(tmp_path):
    layer = "lora_unet_single_blocks_0_linear1"  # q, k, v and the MLP: 21504 rows in the published model
    told = refusal(
        {f"{layer}.lora_down.weight": noise(3, 16), f"{layer}.lora_up.weight": noise(112, 3)}, tmp_path
    )
    assert "single_blocks_0_linear1" in told and "3 x 16 and 112 x 3" in told and "()" not in told


def test_a_bias_that_does_not_fit_its_fused_layer_is_refused_with_its_shape(tmp_path):
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    pair = {f"{layer}.lora_down.weight": noise(2, 16), f"{layer}.lora_up.weight": noise(48, 2)}
    told = refusal(pair | {f"{layer}.diff_b": noise(40)}, tmp_path)
    assert "bias of 40 does not match its 48 rows" in told

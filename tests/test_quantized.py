"""The frozen base in fewer bits, and text encoders that rest: what is saved, what it costs in precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_tiny
from torch.utils.checkpoint import checkpoint

from scalewise.common import console
from scalewise.config.recipe import Recipe
from scalewise.method.backbone import Backbone
from scalewise.method.noise import FlowMatching
from scalewise.models import SD3, SDXL, Flux, ModelError, PipelineAdapter, Wan
from scalewise.models.attached import check_student
from scalewise.models.lora import StudentError, fused, load_student
from scalewise.models.quantization import linear_layers, quantize
from scalewise.planning.flops import bytes_of
from scalewise.planning.plan import make_plan
from scalewise.training import setup
from scalewise.training.run import distill

FAMILIES = [SD3, Flux, SDXL, Wan]


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    return make_tiny(tmp_path)


def x0(model: PipelineAdapter) -> torch.Tensor:
    """What the teacher answers to fixed noise."""
    shape = (2, model.channels, 3, 8, 8) if model.video else (2, model.channels, 8, 8)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Backbone(model).predict_x0(
            x_t, torch.full((2,), 700.0), model.encode_prompts(["a dog", "a cat"])
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("nf4", 0.4)])
def test_every_family_answers_nearly_the_same_with_fewer_bits(
    family: type[SD3], bits: str, error: float
) -> None:
    """Tiny random networks suffer more than trained ones; what matters is that 8 bits suffer little."""
    model = family.tiny()
    whole = x0(model)
    count = len(list(linear_layers(model)))
    quantize(model, bits, "cpu")  # type: ignore[arg-type]
    assert count > 0 and not list(linear_layers(model)), "every linear layer of a block is replaced"
    apart = (x0(model) - whole).norm() / whole.norm()
    assert 0 < apart < error


def test_the_weights_take_as_many_bytes_as_the_plan_says(tiny: Recipe) -> None:
    recipe, held = tiny, {}
    for bits in ("none", "int8", "nf4"):
        own = recipe.override([f"model.quantize={bits}"])
        model = setup.load(own, ["denoiser"], training=True)
        held[bits] = bytes_of(model.denoiser)
    # Beside the weights bitsandbytes keeps their scales, which the plan counts, at most 4 % of the whole.
    planned = make_plan(recipe.override(["model.quantize=nf4"])).memory.base
    assert held["nf4"] == pytest.approx(planned, rel=0.04)
    assert held["nf4"] < held["int8"] < held["none"]
    assert (held["none"] - held["nf4"]) == pytest.approx((held["none"] - held["int8"]) * 3.5 / 3)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_gradients_of_the_student_come_through_a_base_of_fewer_bits(bits: str) -> None:
    """They equal those of a base that holds the same rounded weights, both computed in float32."""
    import bitsandbytes

    quantized, rounded = SD3.tiny(), SD3.tiny()
    quantize(quantized, bits, "cpu")  # type: ignore[arg-type]
    few = dict(quantized.denoiser.named_modules())
    whole = {linear for _, _, linear in linear_layers(rounded)}
    for name, linear in rounded.denoiser.named_modules():
        if linear not in whole:
            continue
        weight = few[name].weight
        if bits == "nf4":
            linear.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            linear.weight.data = weight.data.float() * weight.SCB[:, None] / 127
    gradients = []
    for model in (quantized, rounded):
        backbone = Backbone(model, ["student"], rank=2, seed=3)
        with torch.no_grad():
            for name, parameter in backbone.parameters("student").items():
                if "lora_B" in name:
                    parameter.fill_(0.02)
        x_t = torch.randn(1, model.channels, 8, 8, generator=torch.Generator().manual_seed(1))
        cond = model.encode_prompts(["a dog"])
        with torch.no_grad():
            backbone.predict_x0(x_t, torch.tensor([600.0]), cond)  # the teacher samples first, as in a run
        backbone.predict_x0(x_t, torch.tensor([600.0]), cond, role="student").square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters("student").values()]))
    # With 8 bits the products' inputs are rounded as well.
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert apart < (1e-3 if bits == "nf4" else 0.05)


class OneLayer:
    """A model of a single block with a single layer, of a size that every kernel of 4 bits takes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.block = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval().requires_grad_(False)

    def repeated_blocks(self) -> list[torch.nn.Module]:
        return [self.block]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["plain", "reentrant", "not reentrant"])
def test_a_layer_of_4_bits_with_a_bias_trains_after_it_was_asked_without_gradients(
    way: str, dtype: torch.dtype
) -> None:
    """What a run does: the teacher samples, then the student's backward pass goes through the same layers.

    The input is a view of a leaf, as a checkpointed block's is. On processors with AVX512-BF16 bitsandbytes
    has another layout for weights asked without gradients, with which this failed or had no gradient.
    """
    import bitsandbytes

    model: Any = OneLayer()
    model.block.to(dtype)
    quantize(model, "nf4", "cpu")
    layer = model.block[0]
    leaf = torch.randn(1, 4 * 64, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        asked = model.block(leaf.view(4, 64))
    if way == "plain":
        answer = model.block(leaf.view(4, 64))
    else:
        answer = checkpoint(lambda x: model.block(x.view(4, 64)), leaf, use_reentrant=way == "reentrant")
    answer.square().sum().backward()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = leaf.detach().clone().requires_grad_()
    wanted = torch.nn.functional.linear(expected.view(4, 64), weight, layer.bias)
    wanted.square().sum().backward()
    assert weight.dtype == dtype and layer.bias.abs().sum() > 0
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(asked, wanted.detach(), **close)
    torch.testing.assert_close(leaf.grad, expected.grad, **close)


def test_a_run_on_a_base_of_4_bits_makes_a_student_for_the_whole_one(tiny: Recipe, tmp_path: Path) -> None:
    import bitsandbytes

    recipe = tiny.override(["model.quantize=nf4", "train.iterations=2", "train.checkpoint_every=1"])
    rows = list(distill(recipe, tmp_path / "run", console.progress))
    assert rows[-1]["iteration"] == 2
    student = load_student(tmp_path / "run")
    sampled = setup.load(tiny, ["denoiser"])
    with fused(sampled.denoiser, student):
        pass
    assert not any(isinstance(p, bitsandbytes.nn.Params4bit) for p in sampled.denoiser.parameters())
    few = setup.load(recipe, ["denoiser"])  # drawing is in fewer bits too, with the student beside them
    check_student(few.denoiser, student)
    with pytest.raises(StudentError, match=r"use model\.quantize=none"), fused(few.denoiser, student):
        pass


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install -e '\.\[quantize\]' in the folder"):
        quantize(SD3.tiny(), "int8", "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_resting_text_encoders_encode_the_same_and_go_back(
    family: type[SD3], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device they work on is this one's CPU, so what is watched is where they are sent, and when."""
    model = family.tiny()
    wanted = model.encode_prompts(["a dog"])
    sent: list[tuple[str, str]] = []
    before = torch.nn.Module.to

    def watch(self: torch.nn.Module, device: object, *more: object, **named: object) -> torch.nn.Module:
        sent.append((type(self).__name__, str(device)))
        return before(self, device, *more, **named)

    model.offload_text("cpu:0")
    encoders = [getattr(model.pipeline, n) for n in model.text_names if n.startswith("text_encoder")]
    for kind in {type(e) for e in encoders}:
        monkeypatch.setattr(kind, "to", watch)
    model.to("cpu")
    assert sent == []
    found = model.encode_prompts(["a dog"])
    names = [type(e).__name__ for e in encoders]
    assert sent == [*((n, "cpu:0") for n in names), *((n, "cpu") for n in names)]
    assert all(torch.equal(found.tensors[k], wanted.tensors[k]) for k in wanted.tensors)
    assert isinstance(model.noise, FlowMatching) or family is SDXL
    model.release("denoiser", "vae")
    assert model.device == torch.device("cpu:0")


def test_a_checkpoint_of_before_a_key_came_is_resumed_with_its_default(tiny: Recipe, tmp_path: Path) -> None:
    import json

    recipe = tiny.override(["train.iterations=2", "train.checkpoint_every=1", "loss.mmd_only=true"])
    list(distill(recipe, tmp_path / "run", console.progress))
    for meta in (tmp_path / "run" / "checkpoints").glob("*/meta.json"):
        content = json.loads(meta.read_text())
        del content["recipe"]["model"]["quantize"]
        meta.write_text(json.dumps(content, indent=1))
        manifest = meta.with_name("manifest.json")
        assert manifest.exists()
    trainer = setup.build_trainer(
        recipe.override(["train.precision=float32"]), setup.prepare_data(recipe, console.progress), tmp_path
    )
    from scalewise.training.origin import describe_difference

    there = Recipe.from_mapping(content["recipe"]).model_dump(mode="json")
    assert describe_difference(there, trainer.recipe.model_dump(mode="json")) == ""

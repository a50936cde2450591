"""Faster passes on a CPU: equal to the plain ones up to rounding, and active where they should be."""

from __future__ import annotations

import itertools

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalewise.method import cpu
from scalewise.method.backbone import Backbone
from scalewise.method.cpu import BFloat16Linears, FastPaths, Float32AttentionBackward, RoleLinear
from scalewise.method.roles import Roles
from scalewise.models import SD3

ALL, PLAIN = FastPaths(lora=True, attention=True, weights=True), FastPaths()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def question(model):
    return draw(2, 4, 8, 6), torch.tensor([900.0, 300.0]), model.encode_prompts(["a red apple", "a dog"])


class Operators(TorchDispatchMode):
    """Counts operators, and casts of tensors of at least two dimensions from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = dict[str, int]()
        self.cast = list[tuple[int, ...]]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == "aten::_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.cast.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def outcome(make_backbone, question, fast, precision, *, checkpointing=False, alpha=None):
    """x0 of the student, and the gradients of its parameters and of x_t."""
    backbone = make_backbone("student", "fake", precision=precision, fast=fast, alpha=alpha)
    if checkpointing:
        backbone.enable_checkpointing()
    x_t = question[0].clone().requires_grad_()
    x0 = backbone.predict_x0(x_t, *question[1:], role="student")
    x0.backward(draw(*x0.shape, seed=5))
    found = {name: p.grad for name, p in backbone.parameters("student").items()}
    return {"x0": x0.detach(), "x_t": x_t.grad, **found}


def distance(a, b):
    """Relative distance of all tensors together."""
    error = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    return (error / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_in_float32_the_fast_paths_equal_the_plain_ones(make_backbone, question, alpha):
    plain = outcome(make_backbone, question, PLAIN, "float32", alpha=alpha)
    fast = outcome(make_backbone, question, FastPaths(lora=True), "float32", alpha=alpha)
    assert distance(fast, plain) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_the_fast_paths_are_as_near_to_float32_as_the_plain_ones(
    make_backbone, question, checkpointing
):
    # Two roundings of a bfloat16 network differ from each other by as much as from float32.
    exact = outcome(make_backbone, question, PLAIN, "float32")
    plain = outcome(make_backbone, question, PLAIN, "bf16")
    fast = outcome(make_backbone, question, ALL, "bf16", checkpointing=checkpointing)
    assert 1e-4 < distance(plain, exact) < 0.05
    assert distance(fast, exact) < 1.2 * distance(plain, exact)
    assert distance(fast, plain) < 2 * distance(plain, exact)


def test_checkpointing_recomputes_with_the_same_bits(make_backbone, question):
    once = outcome(make_backbone, question, ALL, "bf16")
    again = outcome(make_backbone, question, ALL, "bf16", checkpointing=True)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("roles", [(), ("student",)])
def test_the_teacher_is_equal_bit_by_bit(question, roles):
    x0 = [
        Backbone(SD3.tiny(), roles, rank=4, precision="bf16", fast=fast).predict_x0(*question).detach()
        for fast in (PLAIN, ALL)
    ]
    assert torch.equal(*x0)


def test_the_base_is_untouched_during_and_after_a_pass(make_backbone, question):
    backbone = make_backbone("student", precision="bf16", fast=ALL)
    base = {n: p for n, p in backbone.model.denoiser.named_parameters() if ".lora_" not in n}
    before = {n: p.detach().clone() for n, p in base.items()}
    backbone.predict_x0(*question, role="student").sum().backward()
    after = dict(backbone.model.denoiser.named_parameters())
    assert all(after[n] is p and torch.equal(p, before[n]) for n, p in base.items())
    assert not any("forward" in vars(module) for module in backbone.model.denoiser.modules())


def test_frozen_weights_are_not_cast_again_in_a_pass(question):
    shapes = {}
    for fast in (PLAIN, ALL):
        backbone = Backbone(SD3.tiny(), precision="bf16", fast=fast)
        with torch.no_grad(), Operators() as seen:
            backbone.predict_x0(*question)
        weights = {
            tuple(m.weight.shape) for m in backbone.model.denoiser.modules() if isinstance(m, nn.Linear)
        }
        shapes[fast] = sum(shape in weights for shape in seen.cast)
    linears = sum(isinstance(m, nn.Linear) for m in backbone.model.denoiser.modules())
    assert shapes[PLAIN] >= linears
    assert shapes[ALL] < shapes[PLAIN] - linears + 10  # some activations have the shape of a weight


@pytest.mark.parametrize("change", ["replaced", "in place"])
def test_changed_weights_are_copied_again(question, change):
    backbone = Backbone(SD3.tiny(), precision="bf16", fast=ALL)
    before = backbone.predict_x0(*question)
    weight = backbone.model.block(1).attn.to_q.weight  # type: ignore[union-attr]
    with torch.no_grad():
        if change == "replaced":
            weight.data = weight.data + 0.5
        else:
            weight.add_(0.5)
    after = backbone.predict_x0(*question)
    assert not torch.equal(after, before)
    assert torch.equal(after, Backbone(backbone.model, precision="bf16", fast=PLAIN).predict_x0(*question))


def test_large_models_get_no_copies(model, monkeypatch):
    size = sum(2 * m.weight.numel() for m in model.denoiser.modules() if isinstance(m, nn.Linear))
    for limit, expected in ((size, True), (size - 1, False)):
        monkeypatch.setattr(cpu, "MAX_COPY_BYTES", limit)
        assert bool(BFloat16Linears(model.denoiser, pack=True).layers) == expected


def test_attention_has_the_same_forward_and_a_better_backward_pass():
    inputs = [draw(2, 3, 40, 16, seed=s).bfloat16().requires_grad_() for s in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = draw(2, 3, 40, 16, seed=9)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, grad.double())
    plain = F.scaled_dot_product_attention(*inputs)
    with Float32AttentionBackward():
        fast = F.scaled_dot_product_attention(*inputs, dropout_p=0.0, is_causal=False)
    assert torch.equal(fast, plain)
    errors = []
    for out in (plain, fast):
        found = torch.autograd.grad(out, inputs, grad.bfloat16())
        errors.append(distance(dict(enumerate(found)), dict(enumerate(expected))))
    assert errors[1] < errors[0] < 0.01


def test_attention_runs_backward_in_float32_only_where_it_can():
    q, k, v = (draw(1, 2, 8, 8, seed=s).bfloat16().requires_grad_() for s in range(3))
    mask = torch.zeros(8, 8, dtype=torch.bfloat16)
    calls = itertools.chain(({},), ({"attn_mask": mask}, {"is_causal": True}, {"dropout_p": 0.5}))
    for options in calls:
        with Float32AttentionBackward():
            out = F.scaled_dot_product_attention(q, k, v, **options)
        assert (type(out.grad_fn).__name__ == "_AttentionBackward") == (not options)


def test_roles_use_the_fast_layer_for_plain_linear_layers_only(model):
    block: nn.Module = model.block(0)
    old = block.attn.to_q  # type: ignore[union-attr]
    quantized = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
    block.attn.to_q = quantized.requires_grad_(False).eval()  # type: ignore[union-attr]
    roles = Roles(model.denoiser, ["student"], rank=4, targets=["to_q"], fast=True)
    kinds = {path: type(layer) for path, layer in roles._layers}
    assert not issubclass(kinds.pop("transformer_blocks.0.attn.to_q"), RoleLinear)
    assert set(kinds.values()) == {RoleLinear}
    plain = Roles(SD3.tiny().denoiser, ["student"], rank=4, targets=["to_q"])
    assert {type(layer) for _, layer in plain._layers} == {LoraLinear}


@pytest.mark.parametrize(
    ("device", "precision", "native", "expected"),
    [("cpu", "bf16", True, ALL), ("cpu", "bf16", False, FastPaths(lora=True)),
     ("cpu", "float32", True, FastPaths(lora=True)), ("cuda", "bf16", True, PLAIN),
     ("cuda", "float32", False, PLAIN)],
)  # fmt: skip
def test_paths_are_on_where_they_were_measured_to_help(device, precision, native, expected):
    assert cpu.choose_fast_paths(device, precision, native=native) == expected

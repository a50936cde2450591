"""The one question, x0: guidance and precision."""

from __future__ import annotations

import pytest
import torch

from scalewise.method.backbone import Backbone, choose_precision
from scalewise.models import Flux


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def question(model):
    return draw(2, 4, 8, 6), torch.tensor([900.0, 300.0]), model.encode_prompts(["a red apple", "a dog"])


def test_x0_follows_from_the_networks_velocity(make_backbone, question):
    backbone = make_backbone("student")
    x_t, t, cond = question
    velocity = backbone.model.predict(x_t, t, cond)
    expected = x_t - (t / 1000).view(2, 1, 1, 1) * velocity
    torch.testing.assert_close(backbone.predict_x0(x_t, t, cond), expected)


@pytest.mark.parametrize("guidance", [0.0, 2.5, 4.5])
def test_guidance_moves_x0_from_the_unconditional_towards_the_conditional(make_backbone, question, guidance):
    backbone, (x_t, t, cond) = make_backbone("student"), question
    uncond = backbone.model.encode_prompts([""])
    told, untold = backbone.predict_x0(x_t, t, cond), backbone.predict_x0(x_t, t, uncond.expand(2))
    guided = backbone.predict_x0(x_t, t, cond, guidance=guidance, uncond=uncond)
    torch.testing.assert_close(guided, untold + guidance * (told - untold), rtol=1e-4, atol=1e-5)
    both = backbone.predict_x0(x_t, t, cond, guidance=guidance, uncond=uncond.expand(2))
    assert torch.equal(guided, both)


def test_guidance_1_is_none_and_needs_no_unconditional_condition(make_backbone, question):
    backbone = make_backbone("student")
    x_t, t, cond = question
    uncond = backbone.model.encode_prompts([""])
    assert torch.equal(
        backbone.predict_x0(x_t, t, cond, guidance=1.0, uncond=uncond), backbone.predict_x0(x_t, t, cond)
    )


def test_guidance_that_is_an_input_takes_one_forward_and_no_unconditional_condition():
    backbone, x_t, t = Backbone(Flux.tiny()), draw(2, 4, 8, 6), torch.tensor([900.0, 300.0])
    cond = backbone.model.encode_prompts(["a red apple", "a dog"])
    found = {w: backbone.predict_x0(x_t, t, cond, guidance=w) for w in (1.0, 3.0, 4.5)}
    assert torch.equal(backbone.predict_x0(x_t, t, cond), found[4.5])  # the standard of a student
    assert not torch.allclose(found[1.0], found[3.0], atol=1e-4)
    backbone.model.embedded_guidance = 3.0
    assert torch.equal(backbone.predict_x0(x_t, t, cond), found[3.0])


def test_guidance_as_an_input_has_no_effect_on_a_model_without_it_and_is_warned_of(model):
    with pytest.warns(UserWarning, match=r"embedded_guidance=3 has no effect: tiny-sd3"):
        model.set_guidance(3.0)
    assert model.embedded_guidance is None


def test_guidance_without_an_unconditional_condition_is_refused(make_backbone, question):
    with pytest.raises(ValueError, match=r"guidance=4\.5 .*pass uncond or guidance=1"):
        make_backbone("student").predict_x0(*question, guidance=4.5)


def test_bf16_precision_rounds_the_network_but_not_x0(make_backbone, question):
    exact = make_backbone("student").predict_x0(*question, role="student")
    rounded = make_backbone("student", precision="bf16").predict_x0(*question, role="student")
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16"),
     ({"avx512_f": True, "avx512_bf16": False}, "float32"), ({}, "float32")],
)  # fmt: skip
def test_precision_auto_takes_bf16_just_where_the_processor_multiplies_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_precision("auto", "cpu") == expected
    assert choose_precision("bf16", "cpu") == "bf16"
    assert choose_precision("float32", "cpu") == "float32"

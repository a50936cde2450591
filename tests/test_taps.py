"""Taps: features with early exit equal those of the full forward, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from scalewise.method.features import tap


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def backbone(request, make_backbone):
    backbone = make_backbone("fake")
    if request.param:
        backbone.enable_checkpointing()
    return backbone


@pytest.fixture
def calls(backbone) -> list[int]:
    """Numbers of the blocks that ran, in order."""
    ran: list[int] = []
    for number in range(backbone.model.blocks):
        backbone.model.block(number).register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    return ran


@pytest.fixture
def question(backbone):
    t, cond = torch.tensor([600.0, 100.0]), backbone.model.encode_prompts(["a red apple", "a dog"])
    return draw(2, 4, 8, 6), t, cond


def weigh(features: torch.Tensor) -> torch.Tensor:
    """A scalar in which every feature counts differently."""
    return (features * draw(*features.shape, seed=5)).sum()


def full_forward(backbone, x_t, t, cond, block):
    """Features by a plain hook on an ordinary forward, and their gradient in x_t: what a tap has to equal."""
    x_t = x_t.clone().requires_grad_()
    kept = []
    handle = backbone.model.block(block).register_forward_hook(lambda _m, _i, output: kept.append(output))
    with backbone.roles.role("fake"):
        backbone.model.predict(x_t, t, cond)
        handle.remove()
        features = backbone.model.image_tokens(kept[0])
        return features.detach(), torch.autograd.grad(weigh(features), x_t)[0]


@pytest.mark.parametrize("block", range(4))
def test_early_exit_gives_the_features_and_input_gradients_of_the_full_forward(backbone, question, block):
    x_t, t, cond = question
    features, gradient = full_forward(backbone, x_t, t, cond, block)
    x_t = x_t.clone().requires_grad_()
    early = backbone.features(x_t, t, cond, role="fake", block=block)
    assert early.shape == (2, 12, 16)
    assert torch.equal(early, features)
    assert torch.equal(torch.autograd.grad(weigh(early), x_t)[0], gradient)
    assert gradient.abs().min() > 0


def test_early_exit_gives_the_adapters_gradients_of_the_full_forward(backbone, question):
    parameters = list(backbone.parameters("fake").values())
    _, features = backbone.predict_x0_and_features(*question, role="fake", block=1)
    expected = torch.autograd.grad(weigh(features), parameters, allow_unused=True)
    early = backbone.features(*question, role="fake", block=1)
    found = torch.autograd.grad(weigh(early), parameters, allow_unused=True)
    reached = 0
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)
            reached += 1
    assert 0 < reached < len(parameters)  # the later blocks have no part in it


def test_the_blocks_after_the_tapped_one_do_not_run(backbone, question, calls):
    backbone.features(*question, role="fake", block=1)
    assert calls == [0, 1]
    backbone.predict_x0_and_features(*question, role="fake", block=1)
    assert calls == [0, 1, 0, 1, 2, 3]


def test_the_backward_pass_runs_just_the_blocks_that_checkpointing_left_out(backbone, question, calls):
    x_t, t, cond = question
    features = backbone.features(x_t.clone().requires_grad_(), t, cond, role="fake", block=1)
    calls.clear()
    features.sum().backward()
    assert calls == ([1, 0] if backbone.model.denoiser.gradient_checkpointing else [])


def test_x0_and_features_of_one_forward_equal_those_of_two(backbone, question):
    x0, features = backbone.predict_x0_and_features(*question, role="fake", block=2)
    assert torch.equal(x0, backbone.predict_x0(*question, role="fake"))
    assert torch.equal(features, backbone.features(*question, role="fake", block=2))


def test_a_tap_leaves_no_hook_behind_also_after_an_error():
    block = torch.nn.Linear(3, 3)
    with tap(block, lambda output: output, stop=True):
        block(torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="shapes"), tap(block, lambda output: output, stop=True):
        block(torch.zeros(1, 4))
    assert not block._forward_hooks
    assert block(torch.zeros(1, 3)).shape == (1, 3)


def test_a_block_that_runs_again_in_the_backward_pass_does_not_replace_the_features(backbone, question):
    x_t, t, cond = question
    model = backbone.model
    # Without torch's early stop a block is run again to its very end, where the hook waits.
    with (
        set_checkpoint_early_stop(False),
        backbone.roles.role("fake"),
        tap(model.block(1), model.image_tokens, stop=False) as found,
    ):
        prediction = model.predict(x_t, t, cond)
        before = found.tokens
        prediction.sum().backward()
        assert found.tokens is before


def test_an_error_inside_a_tap_is_not_swallowed():
    block = torch.nn.Linear(3, 3)
    with pytest.raises(KeyError, match="mine"), tap(block, lambda output: output, stop=False):
        block(torch.zeros(1, 3))
        raise KeyError("mine")


def test_a_tap_on_a_block_that_did_not_run_says_so():
    with tap(torch.nn.Linear(3, 3), lambda output: output, stop=True) as found:
        pass
    with pytest.raises(AssertionError, match="has not run"):
        _ = found.tokens

"""Roles on one frozen base: the silent traps of switching adapters stay closed."""

from __future__ import annotations

import itertools

import pytest
import torch

from scalewise.method.backbone import Backbone
from scalewise.method.roles import Roles
from scalewise.models import SD3

TARGETS = SD3.lora_targets


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def backbone(make_backbone) -> Backbone:
    return make_backbone("student", "fake")


@pytest.fixture
def question(model):
    return draw(2, 4, 8, 8), torch.tensor([900.0, 300.0]), model.encode_prompts(["a red apple", "a dog"])


def gradients(backbone: Backbone, role: str) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in backbone.parameters(role).items()}


def backward(backbone: Backbone, question, role: str, *, between: str | None = None):
    """Gradients of a role; `between` is switched to after the forward pass and kept during the backward."""
    x0 = backbone.predict_x0(*question, role=role)
    loss = (x0 * draw(*x0.shape, seed=3)).sum()
    if between is None:
        loss.backward()
    else:
        with backbone.roles.role(between):
            loss.backward()
    return gradients(backbone, role)


def test_the_teacher_is_the_untouched_base_bit_by_bit(model, question):
    before = model.noise.x0(model.predict(*question), *question[:2])
    backbone = Backbone(model, ("student", "fake"), rank=4)
    assert torch.equal(backbone.predict_x0(*question), before)


def test_the_teachers_output_is_the_same_bits_before_and_after_training(backbone, question):
    with torch.no_grad():
        teacher, student = backbone.predict_x0(*question), backbone.predict_x0(*question, role="student")
    for role in ("student", "fake", "student"):
        optimizer = torch.optim.AdamW(backbone.parameters(role).values(), lr=1e-2)
        backward(backbone, question, role)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(backbone.predict_x0(*question), teacher)
        assert not torch.allclose(backbone.predict_x0(*question, role="student"), student, atol=1e-3)


def test_training_one_role_leaves_the_other_as_it_was(backbone, question):
    with torch.no_grad():
        before = backbone.predict_x0(*question, role="fake")
    optimizer = torch.optim.AdamW(backbone.parameters("student").values(), lr=1e-2)
    backward(backbone, question, "student")
    assert all(gradient is None for gradient in gradients(backbone, "fake").values())
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(backbone.predict_x0(*question, role="fake"), before)


def test_a_new_role_changes_nothing_and_starts_the_same_for_the_same_seed(question):
    before = torch.random.get_rng_state()
    one, same, other = (Backbone(SD3.tiny(), ("student",), rank=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are left alone
    assert torch.equal(one.predict_x0(*question, role="student"), one.predict_x0(*question))
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    weights = [b.parameters("student")[name] for b in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("between", ["fake", "teacher"])
def test_gradients_survive_a_role_switch_between_forward_and_backward(
    make_backbone, question, checkpointing, between
):
    # peft's own switch loses all gradients here, and a block recomputed under another role gives wrong ones.
    expected = backward(make_backbone("student", "fake"), question, "student")
    backbone = make_backbone("student", "fake")
    if checkpointing:
        backbone.enable_checkpointing()
    found = backward(backbone, question, "student", between=between)
    assert len(found) == len(expected) == 76
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name
    assert all(gradient is None for gradient in gradients(backbone, "fake").values())


def test_checkpointed_forwards_of_two_roles_can_be_undone_in_any_order(make_backbone, question):
    alone = {}
    for role in ("student", "fake"):
        alone[role] = backward(make_backbone("student", "fake"), question, role)
    backbone = make_backbone("student", "fake")
    backbone.enable_checkpointing()
    student, fake = (backbone.predict_x0(*question, role=role) for role in ("student", "fake"))
    weights = draw(*student.shape, seed=3)
    ((student + fake) * weights).sum().backward()
    for role, name in itertools.product(alone, alone["student"]):
        assert torch.equal(gradients(backbone, role)[name], alone[role][name]), (role, name)


def test_after_recomputation_the_role_of_before_is_back(backbone, question):
    backbone.enable_checkpointing()
    x0 = backbone.predict_x0(*question, role="student")
    with backbone.roles.role("fake"):
        x0.sum().backward()
        assert backbone.roles.current == "fake"
    assert backbone.roles.current == "teacher"


def test_roles_nest_and_come_back_after_an_exception(backbone, question):
    roles = backbone.roles
    outputs = {role: backbone.predict_x0(*question, role=role) for role in ("teacher", "student", "fake")}

    def now() -> torch.Tensor:
        return backbone.model.noise.x0(backbone.model.predict(*question), *question[:2])

    with roles.role("student"):
        with roles.role("fake"):
            with roles.role("fake"):
                assert torch.equal(now(), outputs["fake"])
            assert torch.equal(now(), outputs["fake"])
            with pytest.raises(KeyError), roles.role("teacher"):
                raise KeyError
            assert roles.current == "fake"
        assert torch.equal(now(), outputs["student"])
    assert roles.current == "teacher"
    assert torch.equal(now(), outputs["teacher"])
    assert not torch.allclose(outputs["student"], outputs["fake"], atol=1e-3)


def test_an_unknown_role_is_refused_with_those_there_are_and_changes_nothing(backbone):
    with backbone.roles.role("student"):
        with (
            pytest.raises(ValueError, match=r"Unknown role 'critic'.*'teacher', 'student', 'fake'"),
            backbone.roles.role("critic"),
        ):
            pass
        assert backbone.roles.current == "student"
    with pytest.raises(ValueError, match=r"Unknown role 'teacher'; trained roles are \['student', 'fake'\]"):
        backbone.parameters("teacher")


def test_the_teacher_cannot_be_an_adapter(model):
    with pytest.raises(ValueError, match=r"'teacher' is the frozen base.*use another name for the role"):
        Roles(model.denoiser, ["teacher"], rank=4, targets=TARGETS)


@pytest.mark.parametrize("change", [lambda m: m.requires_grad_(True), lambda m: m.train()])
def test_adapters_need_a_base_that_is_frozen_already(model, change):
    change(model.denoiser)
    with pytest.raises(
        ValueError, match=r"trainable or in training mode; call requires_grad_\(False\) and eval"
    ):
        Roles(model.denoiser, ["student"], rank=4, targets=TARGETS)


def test_without_adapters_a_module_is_left_as_it_is(model):
    model.denoiser.requires_grad_(True).train()
    backbone = Backbone(model)
    assert all(p.requires_grad for p in backbone.model.denoiser.parameters())
    assert model.denoiser.training


def test_targets_that_match_nothing_are_refused_by_name(model):
    with pytest.raises(ValueError, match="to_nowhere"):
        Roles(model.denoiser, ["student"], rank=4, targets=["to_nowhere"])


def test_parameters_of_the_roles_are_disjoint_and_none_is_the_bases(backbone):
    student, fake = (backbone.parameters(role) for role in ("student", "fake"))
    assert list(student) == list(fake)
    own = {id(p) for p in student.values()} | {id(p) for p in fake.values()}
    assert len(own) == 2 * len(student)
    everything = {id(p) for p in backbone.model.denoiser.parameters()}
    assert own < everything
    base = [p for p in backbone.model.denoiser.parameters() if id(p) not in own]
    assert not any(p.requires_grad for p in base)
    assert all(p.requires_grad for role in (student, fake) for p in role.values())


def test_no_gradient_reaches_the_base(backbone, question):
    backward(backbone, question, "student")
    own = {id(p) for role in ("student", "fake") for p in backbone.parameters(role).values()}
    assert all(p.grad is None for p in backbone.model.denoiser.parameters() if id(p) not in own)


def test_adapters_are_float32_on_a_bfloat16_base(model):
    model.denoiser.to(torch.bfloat16)
    backbone = Backbone(model, ("student",), rank=4)
    assert {p.dtype for p in backbone.parameters("student").values()} == {torch.float32}
    x0 = backbone.predict_x0(
        draw(1, 4, 8, 8), torch.tensor([900.0]), model.encode_prompts(["a dog"]), role="student"
    )
    assert x0.dtype == torch.float32
    assert bool(x0.isfinite().all())


def test_a_roles_strength_is_alpha_over_rank(make_backbone, question):
    plain, double = make_backbone("student", rank=4), make_backbone("student", rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in double.parameters("student").items():
            if "lora_B" in name:
                parameter /= 2
    torch.testing.assert_close(
        double.predict_x0(*question, role="student"), plain.predict_x0(*question, role="student")
    )


def test_a_roles_weights_can_be_taken_out_and_put_back(make_backbone, question):
    source, goal = make_backbone("student", seed=1), make_backbone("student", seed=2)
    state = source.roles.state("student")
    expected = source.predict_x0(*question, role="student")
    goal.roles.load("student", state)
    assert torch.equal(goal.predict_x0(*question, role="student"), expected)
    next(iter(state.values())).zero_()  # the state is a copy
    assert torch.equal(source.predict_x0(*question, role="student"), expected)


def test_a_lora_of_another_rank_is_refused_with_the_rank_that_would_fit(make_backbone):
    for rank in (8, 32):  # 32 is more than some layers are wide
        state = make_backbone("student", rank=rank).roles.state("student")
        with pytest.raises(
            ValueError, match=rf"does not fit: transformer_blocks.*set lora.rank to {rank} or use"
        ):
            make_backbone("student", rank=4).roles.load("student", state)


def test_a_lora_for_another_base_or_other_targets_is_refused(make_backbone):
    backbone = make_backbone("student")
    state = backbone.roles.state("student")
    fewer = {k: v for k, v in state.items() if "transformer_blocks.3." not in k}
    with pytest.raises(
        ValueError, match=r"12 of 76 weights are missing.*transformer_blocks\.3\..*another base"
    ):
        backbone.roles.load("student", fewer)
    more = state | {"transformer_blocks.4.attn.to_q.lora_A.weight": torch.zeros(4, 16)}
    with pytest.raises(ValueError, match=r"1 are unexpected \(for example transformer_blocks\.4\.attn"):
        backbone.roles.load("student", more)
    key = "transformer_blocks.3.attn.to_q.lora_A.weight"
    state = {k: v + 1 for k, v in state.items()}
    before = backbone.roles.state("student")
    with pytest.raises(
        ValueError,
        match=rf"{key} is \[4, 32\] in the file and \[4, 16\] here; it was trained on another base",
    ):
        backbone.roles.load("student", state | {key: torch.zeros(4, 32)})
    # A refused file leaves the role as it was.
    assert all(torch.equal(backbone.parameters("student")[k], v) for k, v in before.items())

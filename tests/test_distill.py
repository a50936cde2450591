"""A training step: its gradients are those of three separate models, and each lands where it belongs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from separate import (
    BLOCK,
    LOSSES,
    draw,
    fake_gradients,
    gradients,
    joint_student_loss,
    largest_error,
    make_head,
    noised,
    own_gradients,
    separate_model,
    streams,
)

from scalewise.method import losses
from scalewise.method.discriminator import DiscriminatorHead
from scalewise.method.distill import Batch, DistillStep, LossError, draw_timesteps
from scalewise.method.loss_config import LossRecipe, Timesteps
from scalewise.method.rng import SampleNoise


@pytest.fixture
def batch(model) -> Batch:
    """Four pairs of latents, 8 x 6, at step 2 of a schedule."""
    cond = model.encode_prompts(["a red apple", "a dog", "a rocket", "the sun"])
    return Batch(source=draw(4, 4, 8, 6), target=0.8 * draw(4, 4, 8, 6, seed=1), cond=cond,
                 uncond=model.encode_prompts([""]), t=737.0558, index=2)  # fmt: skip


@pytest.fixture
def make_step(make_backbone):
    """A step of a loss; the discriminator's head and the adapters are the same in every call."""

    def make(loss: LossRecipe, *, checkpointing: bool = False) -> DistillStep:
        backbone = make_backbone("student", *(["fake"] if loss.needs_fake else []))
        if checkpointing:
            backbone.enable_checkpointing()
        return DistillStep(backbone, loss, head=make_head(backbone, loss))

    return make


@pytest.mark.parametrize("name", LOSSES)
def test_the_students_gradients_equal_those_of_three_separate_models(make_step, batch, name):
    loss = LOSSES[name]
    step = make_step(loss)
    student, teacher = separate_model(step, "student"), separate_model(step, None)
    fake = separate_model(step, "fake") if loss.needs_fake else None
    joint_student_loss(loss, batch, streams(3), student, fake, teacher, step.head).backward()
    step.student_step(batch, streams(3))
    assert largest_error(gradients(step, "student"), own_gradients(student)) < 1e-5


@pytest.mark.parametrize("name", ["paper", "dmd alone"])
def test_the_fake_models_gradients_equal_those_of_separate_models(make_step, batch, name):
    step = make_step(LOSSES[name])
    fake, head_gradients = fake_gradients(step, batch, streams(4))
    step.fake_step(batch, streams(4))
    assert largest_error(gradients(step, "fake"), fake) < 1e-5
    for parameter, gradient in zip(step.head.parameters() if step.head else (), head_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["paper", "released"])
def test_gradient_checkpointing_changes_no_gradient(make_step, batch, name):
    for compute, role in (("student_step", "student"), ("fake_step", "fake")):
        plain, saving = make_step(LOSSES[name]), make_step(LOSSES[name], checkpointing=True)
        numbers = [getattr(step, compute)(batch, streams(3)) for step in (plain, saving)]
        assert numbers[0] == numbers[1]
        assert largest_error(gradients(saving, role), gradients(plain, role)) < 1e-6


def mark_gradients(parameters) -> list[torch.Tensor]:
    """Give each parameter a gradient that a step must neither clear nor add to."""
    for number, parameter in enumerate(parameters):
        parameter.grad = draw(*parameter.shape, seed=number)
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("name", ["paper", "released"])
def test_a_student_update_leaves_the_fake_models_and_the_heads_gradients_alone(make_step, batch, name):
    step = make_step(LOSSES[name])
    others = [*step.backbone.parameters("fake").values(), *step.head.parameters()]
    marks = mark_gradients(others)
    step.student_step(batch, streams(3))
    assert all(torch.equal(p.grad, mark) for p, mark in zip(others, marks, strict=True))


def test_a_fake_update_leaves_the_students_gradients_alone(make_step, batch):
    step = make_step(LOSSES["paper"])
    student = list(step.backbone.parameters("student").values())
    marks = mark_gradients(student)
    step.fake_step(batch, streams(3))
    assert all(torch.equal(p.grad, mark) for p, mark in zip(student, marks, strict=True))
    assert all(p.grad is not None for p in step.head.parameters())


def test_a_step_leaves_the_base_without_gradients_and_as_the_teacher(make_step, batch):
    step = make_step(LOSSES["released"])
    step.student_step(batch, streams(3))
    step.fake_step(batch, streams(3))
    own = {id(p) for role in ("student", "fake") for p in step.backbone.parameters(role).values()}
    assert all(p.grad is None for p in step.backbone.model.denoiser.parameters() if id(p) not in own)
    assert step.backbone.roles.current == "teacher"


# Each term draws from streams of its own, so that switching one off leaves the others' noise alone.
STREAM_OF = {"mmd_gradient": "mmd", "dmd_gradient": "dmd_gan", "gan_gradient": "dmd_gan"}


def by_hand(step: DistillStep, batch: Batch, term) -> tuple[dict[str, torch.Tensor | None], float]:
    """Gradients of one term alone: the student's x0, the term's gradient in it and that one's norm, back
    through the student."""
    rng, t = streams(3), torch.full((4,), batch.t)
    x_t = step.process.add_noise(batch.source, rng(batch.source.shape[1:]), t)
    x0 = step.backbone.predict_x0(x_t, t, batch.cond, role="student")
    leaf = x0.detach().requires_grad_()
    gradient = term(step, batch, leaf, rng.fork(STREAM_OF[term.__name__]))
    step.backbone.roles.module.zero_grad()
    x0.backward(gradient)
    return gradients(step, "student"), float(gradient.norm())


def mmd_gradient(step, batch, leaf, rng):
    t, eps = draw_timesteps(step.loss.mmd.timesteps, rng), rng(leaf.shape[1:])
    real, fake = (
        step.backbone.features(step.process.add_noise(x, eps, t), t, batch.cond, role="teacher", block=BLOCK)
        for x in (batch.target, leaf)
    )
    return torch.autograd.grad(0.7 * losses.mmd_linear(real.detach(), fake), leaf)[0]


def dmd_gradient(step, batch, leaf, rng):
    t, eps = draw_timesteps(step.loss.dmd.timesteps, rng), rng(leaf.shape[1:])
    with torch.no_grad():
        x_t = step.process.add_noise(leaf, eps, t)
        real = step.backbone.predict_x0(x_t, t, batch.cond, guidance=4.5, uncond=batch.uncond)
        fake = step.backbone.predict_x0(x_t, t, batch.cond, role="fake")
        return 1.3 * losses.dmd_gradient(leaf, real, fake) / leaf.numel()


def gan_gradient(step, batch, leaf, rng):
    t, eps = draw_timesteps(step.loss.dmd.timesteps, rng), rng(leaf.shape[1:])
    x_t = step.process.add_noise(leaf, eps, t)
    seen = step.backbone.features(x_t, t, batch.cond, role="fake", block=BLOCK)
    return torch.autograd.grad(0.4 * losses.gan_generator(step.head(seen)), leaf)[0]


@pytest.mark.parametrize(
    ("name", "term", "reported"),
    [
        ("mmd alone", mmd_gradient, "mmd"),
        ("dmd alone", dmd_gradient, "dmd"),
        ("gan alone", gan_gradient, "gan"),
    ],
)
def test_a_term_of_weight_0_is_absent_bit_by_bit(make_step, batch, name, term, reported):
    step = make_step(LOSSES[name])
    numbers = step.student_step(batch, streams(3))
    assert numbers.keys() & {"mmd", "dmd", "gan"} == {reported}
    found = gradients(step, "student")
    expected, norm = by_hand(make_step(LOSSES[name]), batch, term)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert numbers[f"{reported}/gradient_norm"] == pytest.approx(norm, rel=1e-6)


def test_mmd_alone_builds_no_fake_model_and_no_head(make_step, batch):
    loss = LOSSES["mmd alone"]
    assert (loss.needs_fake, loss.needs_head) == (False, False)
    step = make_step(loss)
    assert step.backbone.roles.names == ("student",)
    assert step.student_step(batch, streams(3))["mmd"] > 0


@pytest.mark.parametrize(("name", "head"), [("dmd alone", DiscriminatorHead(16)), ("gan alone", None)])
def test_a_head_belongs_to_a_gan_loss_and_to_no_other(make_backbone, name, head):
    with pytest.raises(AssertionError, match="belongs to a GAN loss"):
        DistillStep(make_backbone("student", "fake"), LOSSES[name], head=head)


def broken(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("name", "compute", "field", "term"),
    [
        ("paper", "student_step", "target", "mmd"),
        ("gan alone", "student_step", "source", "gan"),
        ("dmd alone", "student_step", "source", "dmd, teacher"),
        ("paper", "fake_step", "source", "fake/denoising"),
        ("paper", "fake_step", "target", "fake/discriminator"),
    ],
)
def test_a_term_that_is_not_finite_is_named_and_leaves_no_gradient(
    make_step, batch, name, compute, field, term
):
    step = make_step(LOSSES[name])
    with pytest.raises(LossError, match=f"'{term}' became nan") as raised:
        getattr(step, compute)(replace(batch, **{field: broken(getattr(batch, field))}), streams(3))
    assert raised.value.term == term
    for role in step.backbone.roles.names:
        assert all(gradient is None for gradient in gradients(step, role).values())
    assert step.backbone.roles.current == "teacher"


@pytest.mark.parametrize(("compute", "role"), [("student_step", "student"), ("fake_step", "fake")])
def test_shares_of_a_gradient_add_up_to_the_whole(make_step, batch, compute, role):
    whole, parts = make_step(LOSSES["paper"]), make_step(LOSSES["paper"])
    numbers = getattr(whole, compute)(batch, streams(3))
    for _ in range(2):  # halves are exact in binary
        assert (
            getattr(parts, compute)(batch, streams(3), share=0.5) == numbers
        )  # what is reported is not scaled
    assert all(torch.equal(gradients(parts, role)[k], v) for k, v in gradients(whole, role).items())
    if role == "fake":
        heads = zip(parts.head.parameters(), whole.head.parameters(), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in heads)


@pytest.mark.parametrize("name", ["paper", "released"])
@pytest.mark.parametrize(("compute", "role"), [("student_step", "student"), ("fake_step", "fake")])
def test_two_half_batches_accumulate_to_the_whole_batch(make_step, batch, name, compute, role):
    whole, parts = make_step(LOSSES[name]), make_step(LOSSES[name])
    getattr(whole, compute)(batch, SampleNoise([5, 6, 7, 8]))
    for rows, seeds in ((slice(0, 2), [5, 6]), (slice(2, 4), [7, 8])):
        part = replace(batch, source=batch.source[rows], target=batch.target[rows], cond=batch.cond[rows])
        getattr(parts, compute)(part, SampleNoise(seeds), share=0.5)
    # Products over two and over four rows round differently in float32.
    assert largest_error(gradients(parts, role), gradients(whole, role)) < 3e-5


def test_a_step_is_a_function_of_its_streams(make_step, batch):
    results = []
    for key in (3, 3, 4):
        step = make_step(LOSSES["released"])
        numbers = step.student_step(batch, streams(key))
        results.append((numbers, gradients(step, "student")))
    (one, one_gradient), (same, same_gradient), (other, _) = results
    assert one == same != other
    assert all(torch.equal(one_gradient[k], v) for k, v in same_gradient.items())


def test_statistics_show_a_student_that_leaves_the_range_of_real_latents(make_step, batch):
    numbers = make_step(LOSSES["mmd alone"]).student_step(batch, streams(3))
    t = torch.full((4,), batch.t)
    backbone = make_step(LOSSES["mmd alone"]).backbone
    eps = streams(3)((4, 8, 6))
    x_t = noised(backbone.model, batch.source, eps, t)
    with torch.no_grad():
        x0 = backbone.predict_x0(x_t, t, batch.cond, role="student")
    assert numbers["x0/mean"] == pytest.approx(x0.mean().item(), abs=1e-6)
    assert numbers["x0/std"] == pytest.approx(x0.std().item(), rel=1e-6)
    narrow = replace(batch, target=batch.target / 10)
    assert make_step(LOSSES["mmd alone"]).student_step(narrow, streams(3))["x0/beyond_4_sigma"] > 0.3
    assert numbers["x0/beyond_4_sigma"] < 0.3


def test_uniform_levels_fill_their_range():
    t = draw_timesteps(Timesteps(low=200, high=600), streams(1, 4000))
    assert t.shape == (4000,)
    assert 200 <= t.min() < 202
    assert 598 < t.max() <= 600
    assert t.mean().item() == pytest.approx(400, abs=8)


def test_levels_of_the_schedule_are_drawn_evenly_from_its_entries():
    timesteps = Timesteps(draw="schedule", high=603)
    t = draw_timesteps(timesteps, streams(1, 4000))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == pytest.approx(sorted(timesteps.entries()), rel=1e-6)
    assert counts.min() > 300
    assert torch.equal(t, draw_timesteps(timesteps, streams(1, 4000)))


def test_a_term_does_not_notice_that_another_is_switched_off(make_step, batch):
    both = make_step(LOSSES["released"]).student_step(batch, streams(3))
    without = LOSSES["released"].model_copy(
        update={"mmd": LOSSES["released"].mmd.model_copy(update={"weight": 0.0})}
    )
    alone = make_step(without).student_step(batch, streams(3))
    assert alone["dmd"] == both["dmd"] and alone["gan"] == both["gan"] and "mmd" not in alone

"""A training step: its gradients are those of three separate models, and each lands where it belongs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from scalewise import distill, losses
from scalewise.backbone import Backbone
from scalewise.distill import Batch, DistillStep, LossError, draw_levels
from scalewise.heads import DiscriminatorHead
from scalewise.models import SDXL, Flux, ModelAdapter, Wan
from scalewise.recipe import Levels, LossRecipe
from scalewise.rng import generator

BLOCK = 2
OFF = {"weight": 0.0}
MMD = {"weight": 0.7, "levels": {"high": 600.0}}
DMD = {"weight": 1.3, "guidance": 4.5}
GAN = {"weight": 0.4, "discriminator_weight": 0.6}
RELEASED_MMD = {"penalty": "huber", "features": "fake", "levels": {"draw": "schedule", "high": 603.0}}


def recipe(mmd: dict = OFF, dmd: dict = OFF, gan: dict = OFF) -> LossRecipe:
    return LossRecipe.model_validate({"mmd": mmd, "dmd": dmd, "gan": gan, "feature_block": BLOCK})


LOSSES = {
    "paper": recipe(MMD, DMD, GAN),
    "released": recipe(RELEASED_MMD, DMD, GAN),
    "mmd alone": recipe(MMD),
    "dmd alone": recipe(dmd=DMD),
    "gan alone": recipe(gan=GAN),
    "rbf": recipe(MMD | {"kernel": "rbf", "sigma": 3.0}, DMD),
    "clean features": recipe(MMD | {"clean": True}, gan=GAN),
    "batch average": recipe(MMD | {"whole_batch": True}, DMD),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
        with torch.random.fork_rng():
            torch.manual_seed(7)
            head = DiscriminatorHead(backbone.model.width) if loss.needs_head else None
        return DistillStep(backbone, loss, head=head)

    return make


def gradients(step: DistillStep, role: str) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in step.backbone.parameters(role).items()}


def separate_model(step: DistillStep, role: str | None) -> ModelAdapter:
    """A model of its own for one role: another denoiser with that role's LoRA, always switched on."""
    copy = type(step.backbone.model).tiny()
    if role is None:
        return copy
    weights = step.backbone.roles.state(role)
    layers = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=layers), copy.denoiser, "own")
    for name, parameter in copy.denoiser.named_parameters():
        if ".own." in name:
            parameter.data = weights[name.replace(".own.", ".")].clone()
        else:
            parameter.requires_grad_(False)
    return copy


def own_gradients(model: ModelAdapter) -> dict[str, torch.Tensor]:
    return {n.replace(".own.", "."): p.grad for n, p in model.denoiser.named_parameters() if ".own." in n}


def alpha_and_sigma(model: ModelAdapter, t, like) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of x0 and noise at t, written out for both kinds of process."""
    if isinstance(model, SDXL):
        table = model.pipeline.scheduler.alphas_cumprod.double().numpy()
        abar = torch.from_numpy(np.interp(t.numpy().clip(0, 999), np.arange(1000), table)).float()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    else:
        alpha, sigma = 1 - t / 1000, t / 1000
    return tuple(v.view(-1, *[1] * (like.ndim - 1)) for v in (alpha, sigma))


def x0_of(model: ModelAdapter, x_t, t, cond) -> torch.Tensor:
    alpha, sigma = alpha_and_sigma(model, t, x_t)
    predicted = model.predict(x_t, t, cond)
    return (x_t - sigma * predicted) / alpha if isinstance(model, SDXL) else x_t - sigma * predicted


def features_of(model: ModelAdapter, x_t, t, cond) -> torch.Tensor:
    kept = []
    block = 0 if isinstance(model, SDXL) else BLOCK
    with model.block(block).register_forward_hook(lambda _m, _i, out: kept.append(model.image_tokens(out))):
        model.predict(x_t, t, cond)
    return kept[0]


def noised(model: ModelAdapter, x0, eps, t) -> torch.Tensor:
    alpha, sigma = alpha_and_sigma(model, t, x0)
    return alpha * x0 + sigma * eps


def mmd_written_out(mmd, real, fake) -> torch.Tensor:
    if mmd.kernel == "rbf":
        return losses.mmd_rbf(real, fake, sigma=mmd.sigma)
    if mmd.whole_batch:
        return ((fake.mean((0, 1)) - real.mean((0, 1))) ** 2).sum()
    distance = fake.mean(1) - real.mean(1)
    return (
        (distance**2).sum() if mmd.penalty == "squared" else ((distance**2 + mmd.c**2).sqrt() - mmd.c).mean()
    )


def joint_student_loss(loss: LossRecipe, batch: Batch, rng, student, fake, teacher, head) -> torch.Tensor:
    """The whole loss of a student update in one graph through three models, as a textbook would write it."""
    n, cond = len(batch.source), batch.cond
    t = torch.full((n,), batch.t)
    x0 = x0_of(
        student, noised(student, batch.source, torch.randn(batch.source.shape, generator=rng), t), t, cond
    )
    total = torch.zeros(())
    if loss.mmd.weight:
        if loss.mmd.clean:
            level, eps = torch.zeros(n), torch.zeros_like(x0)
        else:
            own = generator(rng.initial_seed(), "mmd")
            level, eps = draw_levels(loss.mmd.levels, n, own), torch.randn(x0.shape, generator=own)
        judge = teacher if loss.mmd.features == "teacher" else fake
        real_features = features_of(judge, noised(judge, batch.target, eps, level), level, cond)
        fake_features = features_of(judge, noised(judge, x0, eps, level), level, cond)
        total = total + loss.mmd.weight * mmd_written_out(loss.mmd, real_features, fake_features)
    if loss.dmd.weight or loss.gan.weight:
        own = generator(rng.initial_seed(), "dmd_gan")
        level, eps = draw_levels(loss.dmd.levels, n, own), torch.randn(x0.shape, generator=own)
        x_t = noised(student, x0, eps, level)
    if loss.gan.weight:
        total = total + loss.gan.weight * F.softplus(-head(features_of(fake, x_t, level, cond))).mean()
    if loss.dmd.weight:
        if isinstance(teacher, Flux):  # guidance is an input
            real = x0_of(teacher, x_t, level, teacher.with_guidance(cond, loss.dmd.guidance))
        else:
            told = x0_of(teacher, x_t, level, cond)
            untold = x0_of(teacher, x_t, level, batch.uncond.expand(n))
            real = untold + loss.dmd.guidance * (told - untold)
        p_real = x0 - real
        p_fake = x0 - x0_of(fake, x_t, level, cond)
        size = p_real.abs().flatten(1).mean(1).view(-1, *[1] * (p_real.ndim - 1))
        direction = (p_real - p_fake) / size
        total = total + loss.dmd.weight * 0.5 * F.mse_loss(x0, (x0 - direction).detach())
    return total


def largest_error(found: dict, expected: dict) -> float:
    """The largest difference over all gradients, relative to the largest gradient of the same parameter."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        worst = max(worst, float((found[name] - gradient).abs().max() / gradient.abs().max()))
    return worst


@pytest.mark.parametrize("name", LOSSES)
def test_the_students_gradients_equal_those_of_three_separate_models(make_step, batch, name):
    loss = LOSSES[name]
    step = make_step(loss)
    student, teacher = separate_model(step, "student"), separate_model(step, None)
    fake = separate_model(step, "fake") if loss.needs_fake else None
    joint_student_loss(loss, batch, generator(3), student, fake, teacher, step.head).backward()
    step.student_step(batch, generator(3))
    assert largest_error(gradients(step, "student"), own_gradients(student)) < 1e-5


@pytest.mark.parametrize("name", ["paper", "released", "mmd alone"])
@pytest.mark.parametrize("family", [Flux, SDXL, Wan])
def test_an_iteration_of_every_family_has_the_gradients_of_separate_models(family, name):
    block = 0 if family is SDXL else BLOCK
    loss = LossRecipe.model_validate(LOSSES[name].model_dump() | {"feature_block": block})
    model = family.tiny()
    backbone = Backbone(model, ["student", *(["fake"] if loss.needs_fake else [])], rank=4)
    for number, role in enumerate(("student", "fake")[: 1 + loss.needs_fake]):
        for i, parameter in enumerate(backbone.parameters(role).values()):
            parameter.data = 0.2 * draw(*parameter.shape, seed=1000 * number + i)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        head = DiscriminatorHead(model.width) if loss.needs_head else None
    step = DistillStep(backbone, loss, head=head)
    shape = (2, 4, 5, 8, 4) if family.video else (2, 4, 8, 4)
    cond, uncond = model.encode_prompts(["a red apple", "a dog"]), model.encode_prompts([""])
    batch = Batch(draw(*shape), 0.8 * draw(*shape, seed=1), cond, uncond, t=737.0558, index=2)
    student, teacher = separate_model(step, "student"), separate_model(step, None)
    fake = separate_model(step, "fake") if loss.needs_fake else None
    joint_student_loss(loss, batch, generator(3), student, fake, teacher, head).backward()
    step.student_step(batch, generator(3))
    assert largest_error(gradients(step, "student"), own_gradients(student)) < 1e-4
    if loss.needs_fake:
        assert all(parameter.grad is None for parameter in backbone.parameters("fake").values())
        step.fake_step(batch, generator(4))
        assert all(parameter.grad is not None for parameter in backbone.parameters("fake").values())


@pytest.mark.parametrize("name", ["paper", "dmd alone"])
def test_the_fake_models_gradients_equal_those_of_separate_models(make_step, batch, name):
    loss = LOSSES[name]
    step = make_step(loss)
    student, fake, rng = separate_model(step, "student"), separate_model(step, "fake"), generator(4)
    t = torch.full((4,), batch.t)
    with torch.no_grad():
        x0 = x0_of(
            student, noised(student, batch.source, torch.randn(4, 4, 8, 6, generator=rng), t), t, batch.cond
        )
    level, eps = draw_levels(loss.fake.levels, 4, rng), torch.randn(4, 4, 8, 6, generator=rng)
    total = F.mse_loss(x0_of(fake, noised(fake, x0, eps, level), level, batch.cond), x0)
    expected_head = []
    if step.head:
        seen, real = (
            features_of(fake, noised(fake, x, eps, level), level, batch.cond) for x in (x0, batch.target)
        )
        judged = F.softplus(step.head(seen)).mean() + F.softplus(-step.head(real)).mean()
        total = total + loss.gan.discriminator_weight * judged
        expected_head = list(torch.autograd.grad(total, list(step.head.parameters()), retain_graph=True))
        assert all(gradient.abs().max() > 0 for gradient in expected_head)
    total.backward()
    if step.head:
        step.head.zero_grad()
    step.fake_step(batch, generator(4))
    assert largest_error(gradients(step, "fake"), own_gradients(fake)) < 1e-5
    for parameter, gradient in zip(step.head.parameters() if step.head else (), expected_head, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["paper", "released"])
def test_gradient_checkpointing_changes_no_gradient(make_step, batch, name):
    for compute, role in (("student_step", "student"), ("fake_step", "fake")):
        plain, saving = make_step(LOSSES[name]), make_step(LOSSES[name], checkpointing=True)
        numbers = [getattr(step, compute)(batch, generator(3)) for step in (plain, saving)]
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
    step.student_step(batch, generator(3))
    assert all(torch.equal(p.grad, mark) for p, mark in zip(others, marks, strict=True))


def test_a_fake_update_leaves_the_students_gradients_alone(make_step, batch):
    step = make_step(LOSSES["paper"])
    student = list(step.backbone.parameters("student").values())
    marks = mark_gradients(student)
    step.fake_step(batch, generator(3))
    assert all(torch.equal(p.grad, mark) for p, mark in zip(student, marks, strict=True))
    assert all(p.grad is not None for p in step.head.parameters())


def test_a_step_leaves_the_base_without_gradients_and_as_the_teacher(make_step, batch):
    step = make_step(LOSSES["released"])
    step.student_step(batch, generator(3))
    step.fake_step(batch, generator(3))
    own = {id(p) for role in ("student", "fake") for p in step.backbone.parameters(role).values()}
    assert all(p.grad is None for p in step.backbone.model.denoiser.parameters() if id(p) not in own)
    assert step.backbone.roles.current == "teacher"


# Each term draws from a generator of its own, so that switching one off leaves the others' noise alone.
TERM_OF = {"mmd_gradient": "mmd", "dmd_gradient": "dmd_gan", "gan_gradient": "dmd_gan"}


def by_hand(step: DistillStep, batch: Batch, term) -> dict[str, torch.Tensor | None]:
    """Gradients of one term alone: the student's x0, the term's gradient in it, back through the student."""
    rng, t = generator(3), torch.full((4,), batch.t)
    x_t = step.process.add_noise(batch.source, torch.randn(batch.source.shape, generator=rng), t)
    x0 = step.backbone.predict_x0(x_t, t, batch.cond, role="student")
    leaf = x0.detach().requires_grad_()
    gradient = term(step, batch, leaf, generator(rng.initial_seed(), TERM_OF[term.__name__]))
    step.backbone.roles.module.zero_grad()
    x0.backward(gradient)
    return gradients(step, "student")


def mmd_gradient(step, batch, leaf, rng):
    t, eps = draw_levels(step.loss.mmd.levels, 4, rng), torch.randn(leaf.shape, generator=rng)
    real, fake = (
        step.backbone.features(step.process.add_noise(x, eps, t), t, batch.cond, role="teacher", block=BLOCK)
        for x in (batch.target, leaf)
    )
    return torch.autograd.grad(0.7 * losses.mmd_linear(real.detach(), fake), leaf)[0]


def dmd_gradient(step, batch, leaf, rng):
    t, eps = draw_levels(step.loss.dmd.levels, 4, rng), torch.randn(leaf.shape, generator=rng)
    with torch.no_grad():
        x_t = step.process.add_noise(leaf, eps, t)
        real = step.backbone.predict_x0(x_t, t, batch.cond, guidance=4.5, uncond=batch.uncond)
        fake = step.backbone.predict_x0(x_t, t, batch.cond, role="fake")
        return 1.3 * losses.dmd_gradient(leaf, real, fake) / leaf.numel()


def gan_gradient(step, batch, leaf, rng):
    t, eps = draw_levels(step.loss.dmd.levels, 4, rng), torch.randn(leaf.shape, generator=rng)
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
    numbers = step.student_step(batch, generator(3))
    assert numbers.keys() & {"mmd", "dmd", "gan"} == {reported}
    found = gradients(step, "student")
    expected = by_hand(make_step(LOSSES[name]), batch, term)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_mmd_alone_builds_no_fake_model_and_no_head(make_step, batch):
    loss = LOSSES["mmd alone"]
    assert (loss.needs_fake, loss.needs_head) == (False, False)
    step = make_step(loss)
    assert step.backbone.roles.names == ("student",)
    assert step.student_step(batch, generator(3))["mmd"] > 0


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
        getattr(step, compute)(replace(batch, **{field: broken(getattr(batch, field))}), generator(3))
    assert raised.value.term == term
    for role in step.backbone.roles.names:
        assert all(gradient is None for gradient in gradients(step, role).values())
    assert step.backbone.roles.current == "teacher"


@pytest.mark.parametrize(("compute", "role"), [("student_step", "student"), ("fake_step", "fake")])
def test_shares_of_a_gradient_add_up_to_the_whole(make_step, batch, compute, role):
    whole, parts = make_step(LOSSES["paper"]), make_step(LOSSES["paper"])
    numbers = getattr(whole, compute)(batch, generator(3))
    for _ in range(2):  # halves are exact in binary
        assert (
            getattr(parts, compute)(batch, generator(3), share=0.5) == numbers
        )  # what is reported is not scaled
    assert all(torch.equal(gradients(parts, role)[k], v) for k, v in gradients(whole, role).items())
    if role == "fake":
        heads = zip(parts.head.parameters(), whole.head.parameters(), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in heads)


class Rows:
    """Stands for the generator: draws for the whole batch of four, and hands out the rows of a part of it."""

    def __init__(self, rows: slice, *key: int | str) -> None:
        self.rows, self.rng = rows, generator(5, *key)

    def initial_seed(self) -> slice:
        return self.rows

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(4, *x.shape[1:], generator=self.rng)[self.rows]

    def levels(self, levels: Levels) -> torch.Tensor:
        return draw_levels(levels, 4, self.rng)[self.rows]


@pytest.mark.parametrize(("compute", "role"), [("student_step", "student"), ("fake_step", "fake")])
def test_two_half_batches_accumulate_to_the_whole_batch(make_step, batch, monkeypatch, compute, role):
    # The released form, whose terms are all means over images.
    monkeypatch.setattr(distill, "_noise_like", lambda x, rng: rng.noise(x))
    monkeypatch.setattr(distill, "generator", Rows)
    monkeypatch.setattr(distill, "draw_levels", lambda levels, count, rng, *, device: rng.levels(levels))
    whole, parts = make_step(LOSSES["released"]), make_step(LOSSES["released"])
    getattr(whole, compute)(batch, Rows(slice(None)))
    for rows in (slice(0, 2), slice(2, 4)):
        part = replace(batch, source=batch.source[rows], target=batch.target[rows], cond=batch.cond[rows])
        getattr(parts, compute)(part, Rows(rows), share=0.5)
    # Products over two and over four rows round differently in float32: 1.4e-5 at these draws.
    assert largest_error(gradients(parts, role), gradients(whole, role)) < 3e-5


def test_a_step_is_a_function_of_its_generator(make_step, batch):
    results = []
    for key in (3, 3, 4):
        step = make_step(LOSSES["released"])
        numbers = step.student_step(batch, generator(key))
        results.append((numbers, gradients(step, "student")))
    (one, one_gradient), (same, same_gradient), (other, _) = results
    assert one == same != other
    assert all(torch.equal(one_gradient[k], v) for k, v in same_gradient.items())


def test_statistics_show_a_student_that_leaves_the_range_of_real_latents(make_step, batch):
    numbers = make_step(LOSSES["mmd alone"]).student_step(batch, generator(3))
    t = torch.full((4,), batch.t)
    backbone = make_step(LOSSES["mmd alone"]).backbone
    eps = torch.randn(4, 4, 8, 6, generator=generator(3))
    x_t = noised(backbone.model, batch.source, eps, t)
    with torch.no_grad():
        x0 = backbone.predict_x0(x_t, t, batch.cond, role="student")
    assert numbers["x0/mean"] == pytest.approx(x0.mean().item(), abs=1e-6)
    assert numbers["x0/std"] == pytest.approx(x0.std().item(), rel=1e-6)
    narrow = replace(batch, target=batch.target / 10)
    assert make_step(LOSSES["mmd alone"]).student_step(narrow, generator(3))["x0/beyond_4_sigma"] > 0.3
    assert numbers["x0/beyond_4_sigma"] < 0.3


def test_uniform_levels_fill_their_range():
    t = draw_levels(Levels(low=200, high=600), 4000, generator(1))
    assert t.shape == (4000,)
    assert 200 <= t.min() < 202
    assert 598 < t.max() <= 600
    assert t.mean().item() == pytest.approx(400, abs=8)


def test_levels_of_the_schedule_are_drawn_evenly_from_its_entries():
    levels = Levels(draw="schedule", high=603)
    t = draw_levels(levels, 4000, generator(1))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == pytest.approx(sorted(levels.entries()), rel=1e-6)
    assert counts.min() > 300
    assert torch.equal(t, draw_levels(levels, 4000, generator(1)))


def test_a_term_does_not_notice_that_another_is_switched_off(make_step, batch):
    both = make_step(LOSSES["released"]).student_step(batch, generator(3))
    without = LOSSES["released"].model_copy(
        update={"mmd": LOSSES["released"].mmd.model_copy(update={"weight": 0.0})}
    )
    alone = make_step(without).student_step(batch, generator(3))
    assert alone["dmd"] == both["dmd"] and alone["gan"] == both["gan"] and "mmd" not in alone

"""An iteration with separate models for teacher, student and fake, in one graph: the truth for a step."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from scalewise.method import losses
from scalewise.method.backbone import Backbone
from scalewise.method.discriminator import DiscriminatorHead
from scalewise.method.distill import Batch, DistillStep, draw_timesteps
from scalewise.method.loss_config import LossRecipe
from scalewise.method.rng import SampleNoise
from scalewise.models import SDXL, Flux, PipelineAdapter

BLOCK = 2
OFF = {"weight": 0.0}
MMD = {"weight": 0.7, "timesteps": {"high": 600.0}}
DMD = {"weight": 1.3, "guidance": 4.5}
GAN = {"weight": 0.4, "discriminator_weight": 0.6}
RELEASED_MMD = {"penalty": "huber", "features": "fake", "timesteps": {"draw": "schedule", "high": 603.0}}


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


def streams(key: int, count: int = 4) -> SampleNoise:
    return SampleNoise([1000 * key + i for i in range(count)])


def gradients(step: DistillStep, role: str) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in step.backbone.parameters(role).items()}


def separate_model(step: DistillStep, role: str | None) -> PipelineAdapter:
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


def own_gradients(model: PipelineAdapter) -> dict[str, torch.Tensor]:
    return {n.replace(".own.", "."): p.grad for n, p in model.denoiser.named_parameters() if ".own." in n}


def alpha_and_sigma(model: PipelineAdapter, t, like) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of x0 and noise at t, written out for both kinds of process."""
    if isinstance(model, SDXL):
        table = model.pipeline.scheduler.alphas_cumprod.double().numpy()
        abar = torch.from_numpy(np.interp(t.numpy().clip(0, 999), np.arange(1000), table)).float()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    else:
        alpha, sigma = 1 - t / 1000, t / 1000
    return tuple(v.view(-1, *[1] * (like.ndim - 1)) for v in (alpha, sigma))


def x0_of(model: PipelineAdapter, x_t, t, cond) -> torch.Tensor:
    alpha, sigma = alpha_and_sigma(model, t, x_t)
    predicted = model.predict(x_t, t, cond)
    return (x_t - sigma * predicted) / alpha if isinstance(model, SDXL) else x_t - sigma * predicted


def features_of(model: PipelineAdapter, x_t, t, cond) -> torch.Tensor:
    kept = []
    block = 0 if isinstance(model, SDXL) else BLOCK
    with model.block(block).register_forward_hook(lambda _m, _i, out: kept.append(model.image_tokens(out))):
        model.predict(x_t, t, cond)
    return kept[0]


def noised(model: PipelineAdapter, x0, eps, t) -> torch.Tensor:
    alpha, sigma = alpha_and_sigma(model, t, x0)
    return alpha * x0 + sigma * eps


def mmd_written_out(mmd, real, fake) -> torch.Tensor:
    if mmd.kernel == "rbf":
        return losses.mmd_rbf(real, fake, sigma=mmd.sigma)
    if mmd.whole_batch:
        return ((fake.mean((0, 1)) - real.mean((0, 1))) ** 2).mean()
    distance = fake.mean(1) - real.mean(1)
    return (
        (distance**2).mean() if mmd.penalty == "squared" else ((distance**2 + mmd.c**2).sqrt() - mmd.c).mean()
    )


def joint_student_loss(loss: LossRecipe, batch: Batch, rng, student, fake, teacher, head) -> torch.Tensor:
    """The whole loss of a student update in one graph through three models, as a textbook would write it."""
    n, cond = len(batch.source), batch.cond
    t = torch.full((n,), batch.t)
    x0 = x0_of(student, noised(student, batch.source, rng(batch.source.shape[1:]), t), t, cond)
    total = torch.zeros(())
    if loss.mmd.weight:
        if loss.mmd.clean:
            level, eps = torch.zeros(n), torch.zeros_like(x0)
        else:
            own = rng.fork("mmd")
            level, eps = draw_timesteps(loss.mmd.timesteps, own), own(x0.shape[1:])
        judge = teacher if loss.mmd.features == "teacher" else fake
        real_features = features_of(judge, noised(judge, batch.target, eps, level), level, cond)
        fake_features = features_of(judge, noised(judge, x0, eps, level), level, cond)
        total = total + loss.mmd.weight * mmd_written_out(loss.mmd, real_features, fake_features)
    if loss.dmd.weight or loss.gan.weight:
        own = rng.fork("dmd_gan")
        level, eps = draw_timesteps(loss.dmd.timesteps, own), own(x0.shape[1:])
        x_t = noised(student, x0, eps, level)
    if loss.gan.weight:
        total = total + loss.gan.weight * F.softplus(-head(features_of(fake, x_t, level, cond))).mean()
    if loss.dmd.weight:
        if isinstance(teacher, Flux):  # guidance is an input
            real = x0_of(teacher, x_t, level, cond.with_guidance(loss.dmd.guidance))
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


def fake_gradients(step: DistillStep, batch: Batch, rng) -> tuple[dict, list[torch.Tensor]]:
    """Gradients of a fake update in the fake model's LoRA and in the head, of separate models."""
    loss, n = step.loss, len(batch.source)
    student, fake = separate_model(step, "student"), separate_model(step, "fake")
    t = torch.full((n,), batch.t)
    with torch.no_grad():
        eps = rng(batch.source.shape[1:])
        x0 = x0_of(student, noised(student, batch.source, eps, t), t, batch.cond)
    level, eps = draw_timesteps(loss.fake.timesteps, rng), rng(x0.shape[1:])
    total = F.mse_loss(x0_of(fake, noised(fake, x0, eps, level), level, batch.cond), x0)
    head_gradients: list[torch.Tensor] = []
    if step.head:
        seen, real = (
            features_of(fake, noised(fake, x, eps, level), level, batch.cond) for x in (x0, batch.target)
        )
        judged = F.softplus(step.head(seen)).mean() + F.softplus(-step.head(real)).mean()
        total = total + loss.gan.discriminator_weight * judged
        head_gradients = list(torch.autograd.grad(total, list(step.head.parameters()), retain_graph=True))
        assert all(gradient.abs().max() > 0 for gradient in head_gradients)
    total.backward()
    if step.head:
        step.head.zero_grad()
    return own_gradients(fake), head_gradients


def make_head(backbone: Backbone, loss: LossRecipe) -> DiscriminatorHead | None:
    """The discriminator's head, if the loss has one; the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return DiscriminatorHead(backbone.model.width) if loss.needs_head else None

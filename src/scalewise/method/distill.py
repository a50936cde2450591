"""One training step of scale-wise distillation: losses out, gradients left on the role that is trained.

The terms of the student's loss run in roles that must not mix, so the backward pass is staged: the student
predicts x0, each term adds its gradient to a detached copy of it in its own role, and finally the sum flows
back into the student. This equals three separate models and frees the graph of each term in turn
(tests/test_distill.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalewise.method import losses
from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone
from scalewise.method.loss_config import LossRecipe, Timesteps
from scalewise.method.rng import SampleNoise
from scalewise.method.roles import TEACHER

Numbers = dict[str, float]


class LossError(ValueError):
    """A loss term that is not finite; carries its name."""

    def __init__(self, term: str, value: float) -> None:
        super().__init__(f"The loss term {term!r} became {value}.")
        self.term = term


@dataclass(frozen=True)
class Batch:
    """Inputs of one update: the latents of one step of the schedule and the conditions of their captions."""

    source: Tensor
    """s_{i-1} latents, already upscaled to s_i [N, C, H, W]: the student's input before noise."""
    target: Tensor
    """s_i latents of the same images [N, C, H, W]: the real samples."""
    cond: Condition
    uncond: Condition
    t: float
    """Timestep t_i of the step."""
    index: int
    """Number i of the step in the schedule."""


class DistillStep:
    """Gradients of a fake-model update and of a student update; owns no optimizer.

    Names: `fake` is the role (the model that follows the student's distribution), `x0_student` the student's
    output, `x0_fake` and `x0_teacher` the predictions of the fake model and the teacher for a noised
    x0_student.

    Every sample draws from its own random stream and every term is a mean over samples (except with
    mmd.whole_batch and mmd.sigma=null, which treat the batch as one): the gradients of parts of a batch, on
    one process or several, average to the gradient of the whole batch.
    """

    def __init__(self, backbone: Backbone, loss: LossRecipe, *, head: nn.Module | None = None) -> None:
        """`head` is the discriminator, needed exactly when the recipe gives the GAN a weight."""
        assert (head is not None) == loss.needs_head, "a discriminator head belongs to a GAN loss"
        self.backbone, self.loss, self.head = backbone, loss, head
        self.process = backbone.model.noise

    def student_step(self, batch: Batch, rng: SampleNoise, *, share: float = 1.0) -> Numbers:
        """Add `share` of the gradient of mmd + dmd + gan to the student's parameters, and to no others.

        Returns the value and gradient norm of each term and statistics of x0_student; raises LossError.
        """
        mmd, dmd, gan, cond = self.loss.mmd, self.loss.dmd, self.loss.gan, batch.cond
        output = self._x0_student(batch, rng)
        x0_student = output.detach().requires_grad_()  # its .grad collects the gradients of all terms
        numbers = Numbers()

        if mmd.weight > 0:  # section 4.2: features of real and student samples, same t and eps
            t, eps = draw_noise(mmd.timesteps, x0_student, rng.fork("mmd"), clean=mmd.clean)
            with torch.no_grad():
                real = self._features(self.process.add_noise(batch.target, eps, t), t, cond, mmd.features)
            with self.backbone.roles.role(mmd.features):
                x_t = self.process.add_noise(x0_student, eps, t)
                seen = self._features(x_t, t, cond, mmd.features)
                if mmd.kernel == "rbf":
                    value = losses.mmd_rbf(real, seen, sigma=mmd.sigma)
                else:
                    value = losses.mmd_linear(
                        real, seen, penalty=mmd.penalty, c=mmd.c, whole_batch=mmd.whole_batch
                    )
                numbers |= _add_loss("mmd", value, mmd.weight, x0_student)

        if dmd.weight > 0 or gan.weight > 0:  # one noised sample for both
            t, eps = draw_noise(dmd.timesteps, x0_student, rng.fork("dmd_gan"))

        if gan.weight > 0:
            assert self.head is not None
            with self.backbone.roles.role("fake"):
                x_t = self.process.add_noise(x0_student, eps, t)
                value = losses.gan_generator(self.head(self._features(x_t, t, cond, "fake")))
                numbers |= _add_loss("gan", value, gan.weight, x0_student)

        if dmd.weight > 0:  # closed form: no backward pass through teacher or fake model
            with torch.no_grad():
                x_t = self.process.add_noise(x0_student, eps, t)
                x0_teacher = self.backbone.predict_x0(
                    x_t, t, cond, role=TEACHER, guidance=dmd.guidance, uncond=batch.uncond
                )
                x0_fake = self.backbone.predict_x0(x_t, t, cond, role="fake")
                # The gradient turns NaN into 0 (as released); a broken teacher or fake model must not hide.
                _finite("dmd, teacher", x0_teacher.sum())
                _finite("dmd, fake model", x0_fake.sum())
                gradient = losses.dmd_gradient(x0_student, x0_teacher, x0_fake)
                value = losses.dmd(x0_student, gradient)
                numbers |= _add_gradient("dmd", value, dmd.weight * gradient / gradient.numel(), x0_student)

        assert x0_student.grad is not None, "at least one term is on"
        with self.backbone.roles.role("student"):
            output.backward(x0_student.grad * share)
        return numbers | _statistics(x0_student.detach(), batch.target)

    def fake_step(self, batch: Batch, rng: SampleNoise, *, share: float = 1.0) -> Numbers:
        """Add `share` of the gradient of the denoising and discriminator losses to the parameters of the fake
        model and of the head, and to no others. Returns both values; raises LossError.
        """
        with torch.no_grad():
            x0_student = self._x0_student(batch, rng)
        t, eps = draw_noise(self.loss.fake.timesteps, x0_student, rng)
        x_t = self.process.add_noise(x0_student, eps, t)

        if self.head is None:
            x0_fake = self.backbone.predict_x0(x_t, t, batch.cond, role="fake")
            total = value = losses.denoising(x0_fake, x0_student)
            numbers = {"fake/denoising": _finite("fake/denoising", value)}
        else:  # one forward gives x0_fake and the features of the student's sample
            x0_fake, features = self.backbone.predict_x0_and_features(
                x_t, t, batch.cond, role="fake", block=self.loss.feature_block
            )
            value = losses.denoising(x0_fake, x0_student)
            real = self._features(self.process.add_noise(batch.target, eps, t), t, batch.cond, "fake")
            discriminator = losses.gan_discriminator(self.head(features), self.head(real))
            total = value + self.loss.gan.discriminator_weight * discriminator
            numbers = {
                "fake/denoising": _finite("fake/denoising", value),
                "fake/discriminator": _finite("fake/discriminator", discriminator),
            }

        with self.backbone.roles.role("fake"):
            (total * share).backward()
        return numbers

    def _x0_student(self, batch: Batch, rng: SampleNoise) -> Tensor:
        """The student's x0 at s_i from the upscaled s_{i-1} latent noised to t_i (section 4.1)."""
        t = torch.full((len(batch.source),), batch.t, device=batch.source.device)
        x_t = self.process.add_noise(batch.source, _noise_like(batch.source, rng), t)
        return self.backbone.predict_x0(x_t, t, batch.cond, role="student")

    def _features(self, x_t: Tensor, t: Tensor, cond: Condition, role: str) -> Tensor:
        return self.backbone.features(x_t, t, cond, role=role, block=self.loss.feature_block)


def draw_noise(
    timesteps: Timesteps, x0: Tensor, rng: SampleNoise, *, clean: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw timesteps t [N] and noise eps like x0 [N, ...]; both are 0 with `clean` (ablation C)."""
    if clean:
        return torch.zeros(len(x0), device=x0.device), torch.zeros_like(x0)
    return draw_timesteps(timesteps, rng, device=x0.device), _noise_like(x0, rng)


def draw_timesteps(timesteps: Timesteps, rng: SampleNoise, *, device: torch.device | str = "cpu") -> Tensor:
    """Draw a timestep t for every stream [N]: uniform in [low, high], or one of the entries of the teacher's
    schedule within it.
    """
    entries = timesteps.entries()
    if entries:
        return torch.tensor(entries)[rng.choice(len(entries))].to(device)
    return (timesteps.low + (timesteps.high - timesteps.low) * rng.uniform()).to(device)


def _noise_like(x: Tensor, rng: SampleNoise) -> Tensor:
    assert len(rng) == len(x), "a batch needs a stream for every sample"
    return rng(x.shape[1:], x.device)


def _add_loss(term: str, value: Tensor, weight: float, x0: Tensor) -> Numbers:
    """Add weight * d value / d x0 to x0.grad; gradients of parameters stay as they are."""
    _finite(term, value)
    return _add_gradient(term, value, torch.autograd.grad(weight * value, x0)[0], x0)


def _add_gradient(term: str, value: Tensor, gradient: Tensor, x0: Tensor) -> Numbers:
    """Add a term's gradient [N, ...] to x0.grad; returns its value, and its norm to compare the terms by."""
    numbers = {term: _finite(term, value), f"{term}/gradient_norm": float(gradient.norm())}
    x0.grad = gradient if x0.grad is None else x0.grad + gradient
    return numbers


def _finite(term: str, value: Tensor) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise LossError(term, number)
    return number


def _statistics(x0: Tensor, real: Tensor) -> Numbers:
    """Mean, std and share beyond 4 sigma (of the real latents) of x0: a student that leaves the range of the
    VAE shows here.
    """
    mean, std = real.mean(), real.std()
    outside = ((x0 - mean).abs() > 4 * std).float().mean()
    return {"x0/mean": float(x0.mean()), "x0/std": float(x0.std()), "x0/beyond_4_sigma": float(outside)}

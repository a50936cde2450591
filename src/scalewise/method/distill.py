"""One training step of scale-wise distillation: losses out, gradients left on the role that is trained.

The student's terms run in roles that must not mix, so the backward pass is staged: the student makes x0, each
term adds its gradient to a detached copy of it in its own role, and last the sum flows back into the student.
This equals three separate models and frees the graph of each term in turn (tests/test_distill.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalewise.method import losses
from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone
from scalewise.method.loss_config import Levels, LossRecipe
from scalewise.method.rng import SampleNoise

Numbers = dict[str, float]


class LossError(ValueError):
    """A loss term that is not finite; carries its name."""

    def __init__(self, term: str, value: float) -> None:
        super().__init__(f"The loss term {term!r} became {value}.")
        self.term = term


@dataclass(frozen=True)
class Batch:
    """What one update sees: the latents of a step of the schedule, and their captions' conditions."""

    source: Tensor
    """s_{i-1} latents, already upscaled to s_i [N, C, H, W]: what the student denoises."""
    target: Tensor
    """s_i latents of the same pictures: the real samples."""
    cond: Condition
    uncond: Condition
    t: float
    """Noise level t_i of the step."""
    index: int
    """Number i of the step in the schedule."""


class DistillStep:
    """Computes the gradients of a fake-model update and of a student update; owns no optimizer.

    Every sample draws from a stream of its own, and every term is a mean over samples (but for
    mmd.whole_batch and mmd.sigma=null, which look at the batch as one): gradients of parts of a batch, on
    one process or several, average to those of the whole batch.
    """

    def __init__(self, backbone: Backbone, loss: LossRecipe, *, head: nn.Module | None = None) -> None:
        """`head` is the discriminator; it is needed just when the recipe gives the GAN a weight."""
        assert (head is not None) == loss.needs_head, "a discriminator head belongs to a GAN loss"
        self.backbone, self.loss, self.head = backbone, loss, head
        self.process = backbone.model.noise
        self._terms = {"mmd": self._mmd, "dmd_gan": self._dmd_and_gan}

    def student_step(self, batch: Batch, rng: SampleNoise, *, share: float = 1.0) -> Numbers:
        """Add `share` of the gradient of mmd + dmd + gan to the student's parameters; other roles stay
        untouched.
        """
        x0 = self._student(batch, rng)
        leaf = x0.detach().requires_grad_()
        numbers: Numbers = {}
        for name, term in self._terms.items():
            # Streams for each term: switching one off leaves the others' noise as it was.
            numbers |= term(leaf, batch, rng.fork(name))
        assert leaf.grad is not None, "at least one term is on"
        with self.backbone.roles.role("student"):
            x0.backward(leaf.grad * share)
        return numbers | _statistics(x0.detach(), batch.target)

    def fake_step(self, batch: Batch, rng: SampleNoise, *, share: float = 1.0) -> Numbers:
        """Add `share` of the gradient of denoising + discriminator loss to the fake model's parameters and
        the head's.
        """
        with torch.no_grad():
            fake = self._student(batch, rng)
        t = draw_levels(self.loss.fake.levels, rng, device=fake.device)
        eps = _noise_like(fake, rng)
        x_t = self.process.add_noise(fake, eps, t)
        if self.head is None:
            x0 = self.backbone.predict_x0(x_t, t, batch.cond, role="fake")
            total = value = losses.denoising(x0, fake)
            numbers = {"fake/denoising": _finite("fake/denoising", value)}
        else:
            x0, seen_fake = self._x0_and_features(x_t, t, batch.cond)
            value = losses.denoising(x0, fake)
            real_t = self.process.add_noise(batch.target, eps, t)
            seen_real = self._features(real_t, t, batch.cond, "fake")
            judged = losses.gan_discriminator(self.head(seen_fake), self.head(seen_real))
            total = value + self.loss.gan.discriminator_weight * judged
            numbers = {
                "fake/denoising": _finite("fake/denoising", value),
                "fake/discriminator": _finite("fake/discriminator", judged),
            }
        with self.backbone.roles.role("fake"):
            (total * share).backward()
        return numbers

    def _student(self, batch: Batch, rng: SampleNoise) -> Tensor:
        """The student's x0 at s_i from the upscaled s_{i-1} latent noised to t_i (section 4.1)."""
        t = torch.full((len(batch.source),), batch.t, device=batch.source.device)
        x_t = self.process.add_noise(batch.source, _noise_like(batch.source, rng), t)
        return self.backbone.predict_x0(x_t, t, batch.cond, role="student")

    def _mmd(self, leaf: Tensor, batch: Batch, rng: SampleNoise) -> Numbers:
        """Section 4.2: features of real and fake, noised with the same t and eps."""
        mmd = self.loss.mmd
        if mmd.weight == 0:
            return {}
        if mmd.clean:  # ablation C
            t, eps = torch.zeros(len(leaf), device=leaf.device), torch.zeros_like(leaf)
        else:
            t, eps = draw_levels(mmd.levels, rng, device=leaf.device), _noise_like(leaf, rng)
        with torch.no_grad():
            real = self._features(self.process.add_noise(batch.target, eps, t), t, batch.cond, mmd.features)
        with self.backbone.roles.role(mmd.features):
            fake = self._features(self.process.add_noise(leaf, eps, t), t, batch.cond, mmd.features)
            if mmd.kernel == "rbf":
                value = losses.mmd_rbf(real, fake, sigma=mmd.sigma)
            else:
                value = losses.mmd_linear(
                    real, fake, penalty=mmd.penalty, c=mmd.c, whole_batch=mmd.whole_batch
                )
            numbers = {"mmd": _finite("mmd", value)}
            return numbers | {"mmd/gradient_norm": _backward_to(leaf, mmd.weight * value)}

    def _dmd_and_gan(self, leaf: Tensor, batch: Batch, rng: SampleNoise) -> Numbers:
        """DMD's closed-form gradient and the GAN's, on the same noised fake sample."""
        dmd, gan, numbers = self.loss.dmd, self.loss.gan, Numbers()
        if dmd.weight == 0 and gan.weight == 0:
            return numbers
        t, eps = draw_levels(dmd.levels, rng, device=leaf.device), _noise_like(leaf, rng)
        if gan.weight > 0:
            assert self.head is not None
            with self.backbone.roles.role("fake"):
                seen = self._features(self.process.add_noise(leaf, eps, t), t, batch.cond, "fake")
                value = losses.gan_generator(self.head(seen))
                numbers["gan"] = _finite("gan", value)
                numbers["gan/gradient_norm"] = _backward_to(leaf, gan.weight * value)
        if dmd.weight > 0:
            with torch.no_grad():
                x_t = self.process.add_noise(leaf, eps, t)
                real = self.backbone.predict_x0(
                    x_t, t, batch.cond, guidance=dmd.guidance, uncond=batch.uncond
                )
                fake = self.backbone.predict_x0(x_t, t, batch.cond, role="fake")
                # The gradient turns NaN into 0 (as released); a broken teacher or fake model must show.
                _finite("dmd, teacher", real.sum())
                _finite("dmd, fake model", fake.sum())
                gradient = losses.dmd_gradient(leaf, real, fake)
                numbers["dmd"] = _finite("dmd", losses.dmd(leaf, gradient))
                numbers["dmd/gradient_norm"] = _add(leaf, dmd.weight * gradient / gradient.numel())
        return numbers

    def _features(self, x_t: Tensor, t: Tensor, cond: Condition, role: str) -> Tensor:
        return self.backbone.features(x_t, t, cond, role=role, block=self.loss.feature_block)

    def _x0_and_features(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        return self.backbone.predict_x0_and_features(x_t, t, cond, role="fake", block=self.loss.feature_block)


def draw_levels(levels: Levels, rng: SampleNoise, *, device: torch.device | str = "cpu") -> Tensor:
    """Draw a noise level t for every stream [N]: uniform in [low, high], or one of the entries of the
    teacher's schedule within it.
    """
    entries = levels.entries()
    if entries:
        return torch.tensor(entries)[rng.choice(len(entries))].to(device)
    return (levels.low + (levels.high - levels.low) * rng.uniform()).to(device)


def _noise_like(x: Tensor, rng: SampleNoise) -> Tensor:
    assert len(rng) == len(x), "a batch needs a stream for every sample"
    return rng(x.shape[1:], x.device)


def _backward_to(leaf: Tensor, value: Tensor) -> float:
    """Add d value / d leaf to leaf.grad and leave the gradients of every parameter alone; gives its norm."""
    return _add(leaf, torch.autograd.grad(value, leaf)[0])


def _add(leaf: Tensor, gradient: Tensor) -> float:
    """Add a term's gradient; its norm tells how strongly the term pulls, beside the others."""
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return float(gradient.norm())


def _finite(term: str, value: Tensor) -> float:
    number = float(value.detach())
    if not torch.isfinite(value.detach()):
        raise LossError(term, number)
    return number


def _statistics(x0: Tensor, real: Tensor) -> Numbers:
    """Mean, std and share beyond 4 sigma (of the real latents) of x0: a student leaving the VAE's range shows
    here.
    """
    mean, std = real.mean(), real.std()
    outside = ((x0 - mean).abs() > 4 * std).float().mean()
    return {"x0/mean": float(x0.mean()), "x0/std": float(x0.std()), "x0/beyond_4_sigma": float(outside)}

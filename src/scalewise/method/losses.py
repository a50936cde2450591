"""The losses of scale-wise distillation as functions of tensors: no model, schedule or recipe in sight.

N batch, L tokens, D width of the features. Equation numbers are those of the paper (arXiv 2503.16397).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Penalty = Literal["squared", "huber", "abs"]


def mmd_linear(
    real: Tensor, fake: Tensor, *, penalty: Penalty = "squared", c: float = 0.001, whole_batch: bool = False
) -> Tensor:
    """MMD with a linear kernel between features [N, L, D]: it compares per-image token means.

    With d [N, D] the difference of the means, every penalty is a mean over images and channels, so that its
    weight means the same whatever the batch, the accumulation and the number of processes. "squared" is
    mean d^2, the MSE of section 4.2. Eq. 2 writes the sum instead, N D times as much: on the mini it made MMD
    190 to 3,800 times as strong as DMD (docs/method.md). "huber" is the released form, mean
    sqrt(d^2 + c^2) - c; "abs" is its limit c -> 0.
    whole_batch averages the tokens over the batch as well (ablation B of table 6, worse).
    """
    axes = (0, 1) if whole_batch else (1,)
    difference = fake.float().mean(axes) - real.float().mean(axes)
    if penalty == "squared":
        return difference.square().mean()
    if penalty == "huber":
        return ((difference.square() + c**2).sqrt() - c).mean()
    if penalty == "abs":
        return difference.abs().mean()
    raise ValueError(f"Unknown penalty {penalty!r}; use squared, huber or abs.")


def mmd_rbf(real: Tensor, fake: Tensor, *, sigma: float | None = 100.0) -> Tensor:
    """Unbiased MMD^2 with a Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) over image tokens (ablation A).

    Features [N, L, D] -> mean over images of eq. 1, self-pairs left out. sigma None: the median distance
    between two real tokens of an image, over the batch (Gretton et al., JMLR 2012, section 8); ValueError if
    that is 0 or there is one token only.
    """
    real, fake = real.float(), fake.float()
    if sigma is None:
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        sigma = float(torch.cdist(real, real).detach()[:, ~itself].median())
        if not sigma > 0:
            raise ValueError(f"Real tokens are {sigma} apart (median); give loss.mmd.sigma a number.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * sigma**2))

    def mean_of_pairs(x: Tensor) -> Tensor:
        count = x.shape[1]
        k = kernel(x, x)
        return (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))

    return (mean_of_pairs(real) + mean_of_pairs(fake) - 2 * kernel(real, fake).mean((1, 2))).mean()


def dmd_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """Direction in which DMD moves the samples x [N, ...] (as DMD2): p_real - p_fake over mean |p_real| per
    sample.

    p_real = x - x0_real and p_fake = x - x0_fake are what the teacher and the fake model would take away;
    where the weight is not finite the gradient is 0.
    """
    p_real, p_fake = x.float() - x0_real.float(), x.float() - x0_fake.float()
    weight = p_real.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.nan_to_num((p_real - p_fake) / weight, nan=0.0, posinf=0.0, neginf=0.0)


def dmd(x: Tensor, gradient: Tensor) -> Tensor:
    """DMD as a loss: 0.5 MSE(x, stop(x - gradient)); its gradient in x is `gradient` / number of elements."""
    return 0.5 * F.mse_loss(x.float(), (x.float() - gradient).detach())


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of the student: mean softplus(-D(fake)); logits [N, 1]."""
    return F.softplus(-fake_logits.float()).mean()


def gan_discriminator(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Loss of the discriminator: mean softplus(D(fake)) + mean softplus(-D(real)); logits [N, 1]."""
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def denoising(x0_predicted: Tensor, x0: Tensor) -> Tensor:
    """The fake model's loss: mean squared error in x0 (released form)."""
    return F.mse_loss(x0_predicted.float(), x0.float())

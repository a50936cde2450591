"""The losses of scale-wise distillation as functions of tensors: no model, schedule or recipe inside.

Shapes: N batch, L tokens, D width of the features. Sources: "paper" is Scale-wise Distillation (arXiv
2503.16397), "DMD2" is Improved Distribution Matching Distillation (arXiv 2405.14867).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Penalty = Literal["squared", "huber", "abs"]


def mmd_linear(
    real: Tensor,
    generated: Tensor,
    *,
    penalty: Penalty = "squared",
    c: float = 0.001,
    whole_batch: bool = False,
) -> Tensor:
    """MMD with a linear kernel between features of real and generated samples [N, L, D] (paper, section 4.2,
    eq. 2): mean over n and channels of penalty(d_n), d_n = mean_l generated_nl - mean_l real_nl, d [N, D].

    penalty(d) is d^2 ("squared", the MSE of section 4.2), sqrt(d^2 + c^2) - c ("huber", the released form) or
    |d| ("abs", its limit c -> 0). Eq. 2 writes the sum over n and channels; the mean is N D times smaller and
    its weight means the same whatever the batch, the accumulation and the number of processes
    (docs/method.md has the measurement). whole_batch averages tokens over the batch as well (ablation B of
    table 6, worse). ValueError for an unknown penalty.
    """
    axes = (0, 1) if whole_batch else (1,)
    d = generated.float().mean(axes) - real.float().mean(axes)
    if penalty == "squared":
        return d.square().mean()
    if penalty == "huber":
        return ((d.square() + c**2).sqrt() - c).mean()
    if penalty == "abs":
        return d.abs().mean()
    raise ValueError(f"Unknown penalty {penalty!r}; use squared, huber or abs.")


def mmd_rbf(real: Tensor, generated: Tensor, *, sigma: float | None = 100.0) -> Tensor:
    """Unbiased MMD^2 with a Gaussian kernel between image tokens [N, L, D] (paper, eq. 1; ablation A of table
    6): mean over n of E k(x, x') + E k(y, y') - 2 E k(x, y), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    x and y are the tokens of the generated and of the real sample n, self-pairs left out. sigma None: the
    median distance between two real tokens of an image, over the batch (Gretton et al., JMLR 2012, section
    8); ValueError if that is 0 or there is only one token.
    """
    real, generated = real.float(), generated.float()
    if sigma is None:
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        sigma = float(torch.cdist(real, real).detach()[:, ~itself].median())
        if not sigma > 0:
            raise ValueError(
                f"The median distance between real tokens is {sigma}; give loss.mmd.sigma a number."
            )

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * sigma**2))

    def mean_of_pairs(x: Tensor) -> Tensor:
        count = x.shape[1]
        k = kernel(x, x)
        return (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))

    return (mean_of_pairs(real) + mean_of_pairs(generated) - 2 * kernel(real, generated).mean((1, 2))).mean()


def dmd_gradient(x0_student: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """Gradient of DMD in x0_student [N, ...] (paper, appendix A; weight of DMD, arXiv 2311.18828):
    (p_real - p_fake) / mean |p_real|, p_real = x0_student - x0_teacher, p_fake = x0_student - x0_fake.

    x0_teacher and x0_fake [N, ...] are the predictions of the (guided) teacher and of the fake model for the
    same noised x0_student; their difference is that of the two scores times sigma^2 / alpha. The mean is over
    one sample; where the quotient is not finite the gradient is 0.
    """
    p_real, p_fake = x0_student.float() - x0_teacher.float(), x0_student.float() - x0_fake.float()
    scale = p_real.abs().mean(dim=tuple(range(1, p_real.ndim)), keepdim=True)
    return torch.nan_to_num((p_real - p_fake) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def dmd(x0_student: Tensor, gradient: Tensor) -> Tensor:
    """DMD as a loss (paper, appendix A; arXiv 2311.18828): 0.5 mean (x0_student - stop(x0_student -
    gradient))^2.

    Both are [N, ...]; its gradient in x0_student is `gradient` / number of elements.
    """
    return 0.5 * F.mse_loss(x0_student.float(), (x0_student.float() - gradient).detach())


def gan_generator(generated_logits: Tensor) -> Tensor:
    """Non-saturating GAN loss of the student (DMD2, section 4.3): mean softplus(-D(generated)); logits [N,
    1].
    """
    return F.softplus(-generated_logits.float()).mean()


def gan_discriminator(generated_logits: Tensor, real_logits: Tensor) -> Tensor:
    """GAN loss of the discriminator (DMD2, section 4.3): mean softplus(D(generated)) + mean
    softplus(-D(real)).

    Logits are [N, 1].
    """
    return F.softplus(generated_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def denoising(x0_fake: Tensor, x0_student: Tensor) -> Tensor:
    """Loss of the fake model (DMD2, section 3; in x0, as released): mean (x0_fake - x0_student)^2.

    Both are [N, ...]: the fake model's prediction, and the student's sample that was noised.
    """
    return F.mse_loss(x0_fake.float(), x0_student.float())

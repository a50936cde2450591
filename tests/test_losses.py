"""Losses: each is held against an identity or against its own definition, written out naively."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from scalewise.method import losses


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def real() -> torch.Tensor:
    return draw(3, 7, 5)


@pytest.fixture
def fake() -> torch.Tensor:
    return draw(3, 7, 5, seed=1) + 0.3


def eq_1(real: torch.Tensor, fake: torch.Tensor, kernel, *, unbiased: bool) -> float:
    """MMD^2 of one image's tokens, pair by pair: E k(r, r') + E k(f, f') - 2 E k(r, f)."""

    def mean(xs, ys, *, skip_self):
        pairs = [
            kernel(x, y) for i, x in enumerate(xs) for j, y in enumerate(ys) if not (skip_self and i == j)
        ]
        return sum(pairs) / len(pairs)

    own = mean(real, real, skip_self=unbiased) + mean(fake, fake, skip_self=unbiased)
    return float(own - 2 * mean(real, fake, skip_self=False))


def test_linear_mmd_is_the_mse_of_token_means_over_images_and_channels(real, fake):
    expected = sum(float((real[i].mean(0) - fake[i].mean(0)).norm() ** 2) for i in range(3)) / (3 * 5)
    assert losses.mmd_linear(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_linear_mmd_is_equation_1_with_the_dot_product_as_kernel_by_channel(real, fake):
    expected = sum(eq_1(real[i], fake[i], torch.dot, unbiased=False) for i in range(3)) / (3 * 5)
    assert losses.mmd_linear(real, fake).item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_linear_mmd_spreads_the_mean_difference_evenly_over_tokens(real, fake):
    fake.requires_grad_()
    losses.mmd_linear(real, fake).backward()
    expected = 2 * (fake.detach().mean(1) - real.mean(1)) / (7 * 3 * 5)
    torch.testing.assert_close(fake.grad, expected[:, None].expand(3, 7, 5))


def test_rbf_mmd_is_equation_1_with_a_gaussian_kernel_and_without_self_pairs(real, fake):
    def gauss(x, y):
        return torch.exp(-((x - y) ** 2).sum() / (2 * 2.0**2))

    expected = sum(eq_1(real[i], fake[i], gauss, unbiased=True) for i in range(3)) / 3
    assert losses.mmd_rbf(real, fake, sigma=2.0).item() == pytest.approx(expected, rel=1e-4)


def test_a_wide_rbf_kernel_tends_to_the_unbiased_linear_mmd(real, fake):
    sigma = 30.0
    linear = sum(eq_1(real[i], fake[i], torch.dot, unbiased=True) for i in range(3)) / 3
    assert sigma**2 * losses.mmd_rbf(real, fake, sigma=sigma).item() == pytest.approx(linear, rel=0.02)


def test_an_rbf_kernel_without_a_width_takes_the_median_distance_of_real_tokens(real, fake):
    apart = [(a - b).norm().item() for image in real for i, a in enumerate(image) for b in image[i + 1 :]]
    # torch's median of an even number is the lower of the two in the middle; pairs count twice there.
    width = sorted(apart)[(len(apart) - 1) // 2]
    assert losses.mmd_rbf(real, fake, sigma=None).item() == pytest.approx(
        losses.mmd_rbf(real, fake, sigma=width).item(), rel=1e-4
    )


def test_rbf_mmd_has_a_finite_gradient_where_tokens_coincide(real):
    fake = real.clone().requires_grad_()
    losses.mmd_rbf(real, fake, sigma=2.0).backward()
    assert bool(fake.grad.isfinite().all())


@pytest.mark.parametrize("penalty", ["squared", "huber", "abs"])
def test_linear_mmd_compares_means_and_so_ignores_the_order_of_tokens(real, fake, penalty):
    shuffled = fake[:, torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    value = losses.mmd_linear(real, fake, penalty=penalty)
    assert value > 0
    torch.testing.assert_close(losses.mmd_linear(real, shuffled, penalty=penalty), value)
    assert losses.mmd_linear(real, real, penalty=penalty) == 0


def test_images_are_compared_with_their_own_counterpart_unless_the_whole_batch_is_averaged(real):
    rolled = real.roll(1, dims=0)
    assert losses.mmd_linear(real, rolled) > 0.1
    assert losses.mmd_linear(real, rolled, whole_batch=True).item() == pytest.approx(0, abs=1e-10)
    one = real[:1], rolled[:1]
    torch.testing.assert_close(losses.mmd_linear(*one, whole_batch=True), losses.mmd_linear(*one))


def test_the_huber_penalty_is_quadratic_near_0_and_absolute_far_from_it(real):
    c = 0.01
    near, far = real + 1e-4, real + 10.0
    assert losses.mmd_linear(real, near, penalty="huber", c=c).item() == pytest.approx(
        1e-8 / (2 * c), rel=0.05
    )
    assert losses.mmd_linear(real, far, penalty="huber", c=c).item() == pytest.approx(10 - c, rel=1e-4)


def test_a_small_c_makes_the_huber_penalty_absolute_but_keeps_its_gradient_finite_at_0(real, fake):
    absolute = losses.mmd_linear(real, fake, penalty="abs").item()
    assert losses.mmd_linear(real, fake, penalty="huber", c=1e-6).item() == pytest.approx(absolute, rel=1e-5)
    same = real.clone().requires_grad_()
    losses.mmd_linear(real, same, penalty="huber").backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_an_unknown_penalty_is_refused_with_those_there_are(real, fake):
    with pytest.raises(ValueError, match=r"'l2'.*squared, huber or abs"):
        losses.mmd_linear(real, fake, penalty="l2")


@pytest.mark.parametrize("loss", [losses.mmd_linear, losses.mmd_rbf, losses.denoising])
def test_bfloat16_features_are_compared_in_float32(loss, real, fake):
    real, fake = real.bfloat16(), fake.bfloat16()
    value = loss(real, fake)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(real.float(), fake.float()))


class Mixture:
    """A mixture of Gaussians in D dimensions, noised by x_t = (1 - sigma) x0 + sigma eps: all is known."""

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = torch.tensor(weights).double(), torch.tensor(means).double(), std

    def log_density(self, x_t, sigma):
        variance = ((1 - sigma) * self.std) ** 2 + sigma**2
        square = ((x_t[:, None] - (1 - sigma) * self.means) ** 2).sum(-1)
        normal = -square / (2 * variance) - x_t.shape[-1] / 2 * math.log(2 * math.pi * variance)
        return torch.logsumexp(self.weights.log() + normal, dim=1)

    def score(self, x_t, sigma):
        x_t = x_t.clone().requires_grad_()
        return torch.autograd.grad(self.log_density(x_t, sigma).sum(), x_t)[0]

    def x0(self, x_t, sigma):
        """E[x0 | x_t]: the components' posterior means, weighted by their responsibilities."""
        alpha, variance = 1 - sigma, self.std**2
        total = alpha**2 * variance + sigma**2
        square = ((x_t[:, None] - alpha * self.means) ** 2).sum(-1)
        responsibility = torch.softmax(self.weights.log() - square / (2 * total), dim=1)
        posterior = self.means + alpha * variance / total * (x_t[:, None] - alpha * self.means)
        return (responsibility[..., None] * posterior).sum(1)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.79])
def test_the_dmd_direction_is_the_difference_of_the_scores_of_two_gaussian_mixtures(sigma):
    # Tweedie: E[x0 | x_t] = (x_t + sigma^2 score) / alpha, so p_real - p_fake is
    # sigma^2 / alpha (score_fake - score_real).
    real = Mixture([0.5, 0.5], [[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0]], 0.4)
    fake = Mixture([0.2, 0.8], [[-1.0, 0.5, 0.5], [1.5, 0.0, 0.0]], 0.7)
    x, eps = draw(64, 3).double(), draw(64, 3, seed=1).double()
    x_t = (1 - sigma) * x + sigma * eps
    gradient = losses.dmd_gradient(x, real.x0(x_t, sigma), fake.x0(x_t, sigma))
    scores = fake.score(x_t, sigma) - real.score(x_t, sigma)
    scale = (x - real.x0(x_t, sigma)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(
        gradient.double(), sigma**2 / (1 - sigma) * scores / scale, rtol=1e-4, atol=1e-5
    )


def test_descending_the_dmd_gradient_moves_samples_towards_the_real_distribution():
    real, fake = Mixture([1.0], [[2.0, 2.0]], 0.5), Mixture([1.0], [[0.0, 0.0]], 0.5)
    x = 0.5 * draw(256, 2).double()
    x_t = 0.4 * x + 0.6 * draw(256, 2, seed=1).double()
    moved = x - 0.1 * losses.dmd_gradient(x, real.x0(x_t, 0.6), fake.x0(x_t, 0.6)).double()
    assert bool(((moved - x) > 0).all())  # the real mean lies above in both coordinates


def test_the_dmd_gradient_is_0_where_teacher_and_fake_agree():
    x, x0 = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    assert torch.equal(losses.dmd_gradient(x, x0, x0), torch.zeros_like(x))


def test_the_dmd_gradient_is_weighted_sample_by_sample_and_free_of_units():
    x, real, fake = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1), draw(2, 4, 3, 3, seed=2)
    both = losses.dmd_gradient(x, real, fake)
    torch.testing.assert_close(both[:1], losses.dmd_gradient(x[:1], real[:1], fake[:1]))
    torch.testing.assert_close(losses.dmd_gradient(8 * x, 8 * real, 8 * fake), both)


@pytest.mark.parametrize("fake_offset", [0.0, 1.0])
def test_the_dmd_gradient_is_0_where_its_weight_is_not_finite(fake_offset):
    x, other = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    real = torch.stack([x[0], other[1]])  # the teacher takes nothing away from sample 0: 0 / 0, or 1 / 0
    gradient = losses.dmd_gradient(x, real, x + fake_offset)
    assert torch.equal(gradient[0], torch.zeros_like(x[0]))
    assert gradient[1].abs().min() > 0


def test_the_dmd_loss_has_the_given_gradient_over_the_number_of_elements():
    x, gradient = draw(2, 4, 3, 3).requires_grad_(), draw(2, 4, 3, 3, seed=1)
    loss = losses.dmd(x, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(x.grad, gradient / gradient.numel(), rtol=1e-4, atol=1e-8)


def test_an_undecided_discriminator_costs_log_2_for_each_thing_it_judges():
    zero = torch.zeros(3, 1)
    assert losses.gan_generator(zero).item() == pytest.approx(math.log(2))
    assert losses.gan_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2))


def test_generator_and_discriminator_differ_by_the_logit_itself():
    # softplus(z) - softplus(-z) = z
    fake, real = draw(5, 1), draw(5, 1, seed=1)
    expected = losses.gan_generator(fake) + fake.mean() + losses.gan_generator(real)
    torch.testing.assert_close(losses.gan_discriminator(fake, real), expected)


def test_the_generators_gradient_does_not_vanish_where_the_discriminator_is_sure():
    logits = torch.tensor([[-20.0], [20.0]], requires_grad=True)
    losses.gan_generator(logits).backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.5, 0.0], abs=1e-6)


def test_the_denoising_loss_is_the_mean_squared_error_in_x0():
    predicted, x0 = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(losses.denoising(predicted, x0), F.mse_loss(predicted, x0))
    assert losses.denoising(x0 + 2, x0).item() == pytest.approx(4.0)


@pytest.mark.parametrize("real", [torch.ones(2, 5, 3), torch.randn(2, 1, 3)], ids=["equal", "single"])
def test_a_kernel_cannot_be_as_wide_as_nothing(real):
    with pytest.raises(ValueError, match=r"give loss\.mmd\.sigma a number"):
        losses.mmd_rbf(real, torch.randn(2, 5, 3), sigma=None)

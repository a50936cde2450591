"""Noise processes: identities, limits, and parity with diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from scalewise.method.noise import FlowMatching, NoiseProcess, VariancePreserving, per_sample

SDXL = DDPMScheduler(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
PROCESSES = [FlowMatching(), VariancePreserving(SDXL.alphas_cumprod)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PROCESSES, ids=lambda p: type(p).__name__)
def process(request) -> NoiseProcess:
    return request.param


@pytest.fixture
def t() -> torch.Tensor:
    return torch.tensor([1000.0, 895.9003, 400.0, 9.0])


def test_x0_and_prediction_are_each_others_inverse(process, t):
    x_t, prediction, x0 = draw(4, 3, 5, 6), draw(4, 3, 5, 6, seed=1), draw(4, 3, 5, 6, seed=2)
    torch.testing.assert_close(
        process.prediction(process.x0(prediction, x_t, t), x_t, t), prediction, atol=2e-3, rtol=0
    )
    torch.testing.assert_close(process.x0(process.prediction(x0, x_t, t), x_t, t), x0, atol=1e-5, rtol=0)


def test_the_true_prediction_of_a_noised_latent_gives_the_latent_back(process, t):
    x0, eps = draw(4, 3, 2, 5, 6), draw(4, 3, 2, 5, 6, seed=1)
    truth = {"velocity": eps - x0, "epsilon": eps}[process.predicts]
    x_t = process.add_noise(x0, eps, t)
    torch.testing.assert_close(process.x0(truth, x_t, t), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(process.prediction(x0, x_t, t), truth, atol=1e-4, rtol=0)


def test_every_sample_has_its_own_level(process, t):
    x0, eps = draw(4, 3, 5, 6), draw(4, 3, 5, 6, seed=1)
    together = process.add_noise(x0, eps, t)
    for i in range(4):
        alone = process.add_noise(x0[i : i + 1], eps[i : i + 1], t[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_alpha_and_sigma_are_float32_whatever_t_is(process, dtype):
    t = torch.tensor([737, 602], dtype=dtype)
    assert process.alpha(t).dtype == process.sigma(t).dtype == torch.float32
    assert torch.equal(process.sigma(t), process.sigma(t.float()))


def test_bfloat16_latents_are_noised_with_a_float32_sigma(process):
    x0, eps, t = draw(1, 3, 8, 8).bfloat16(), draw(1, 3, 8, 8, seed=1).bfloat16(), torch.tensor([895.9003])
    noisy = process.add_noise(x0, eps, t)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, process.add_noise(x0.float(), eps.float(), t).bfloat16())
    coarse = process.alpha(t).bfloat16() * x0 + process.sigma(t).bfloat16() * eps
    assert not torch.equal(noisy, coarse)
    assert process.x0(eps, noisy, t).dtype == torch.float32


def test_flow_matching_runs_from_pure_noise_to_the_clean_latent():
    x0, eps = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert torch.equal(FlowMatching().add_noise(x0, eps, torch.full((2,), 1000.0)), eps)
    assert torch.equal(FlowMatching().add_noise(x0, eps, torch.zeros(2)), x0)
    assert FlowMatching().sigma(torch.tensor([895.9003])).item() == pytest.approx(0.8959003, abs=1e-7)


def test_the_signal_to_noise_ratio_falls_with_t_between_its_known_limits(process):
    t = torch.linspace(1, 998, 200)
    ratio = (process.alpha(t) / process.sigma(t)) ** 2
    assert bool((ratio.diff() < 0).all())
    ends = torch.tensor([0.0, 1000.0])
    first, last = ((process.alpha(ends) / process.sigma(ends)) ** 2).tolist()
    if isinstance(process, FlowMatching):
        assert (first, last) == (float("inf"), 0.0)
    else:  # SDXL never reaches pure noise: abar runs from 0.99915 to 0.0047
        assert first == pytest.approx(0.99915 / 0.00085, rel=1e-3)
        assert last == pytest.approx(0.00469, rel=1e-2)


def test_the_variance_is_preserved():
    t, process = torch.linspace(0, 1000, 77), PROCESSES[1]
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(77))


def test_variance_preserving_noise_is_that_of_diffusers():
    x0, eps, levels = draw(4, 3, 5, 6), draw(4, 3, 5, 6, seed=1), torch.tensor([999, 800, 401, 0])
    theirs = SDXL.add_noise(x0, eps, levels)
    torch.testing.assert_close(PROCESSES[1].add_noise(x0, eps, levels), theirs)


def test_levels_between_training_levels_are_interpolated_and_1000_is_the_last():
    process = VariancePreserving([0.9, 0.5, 0.1])
    assert process.alpha(torch.tensor([0.5])).item() ** 2 == pytest.approx(0.7)
    assert process.alpha(torch.tensor([1000.0])).item() ** 2 == pytest.approx(0.1)


@pytest.mark.parametrize("table", [[0.1, 0.5, 0.9], [0.9, 0.9, 0.1], [[0.9, 0.1]]])
def test_a_table_that_does_not_fall_is_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod must be a strictly decreasing list"):
        VariancePreserving(table)


def test_values_per_sample_broadcast_over_any_number_of_axes():
    assert per_sample(torch.arange(2.0), torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert per_sample(torch.arange(2.0), torch.zeros(2, 3, 4, 5, 6)).shape == (2, 1, 1, 1, 1)

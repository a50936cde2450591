"""Parity with the authors' released functions, through the reference values in tests/golden."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalewise.method import losses
from scalewise.method.discriminator import DiscriminatorHead
from scalewise.method.noise import FlowMatching
from scalewise.method.sampling import sample_scale_wise
from scalewise.method.scales import Scale, ScaleSchedule, downscale_area, shifted_sigmas, upscale_latents

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "reference.safetensors")
NUMBERS = json.loads((GOLDEN / "reference.json").read_text())

MMD_VARIANTS = {
    "linear_huber": partial(losses.mmd_linear, penalty="huber", c=0.001),
    "linear_abs": partial(losses.mmd_linear, penalty="abs"),
    "linear_huber_batch": partial(losses.mmd_linear, penalty="huber", c=0.001, whole_batch=True),
    "rbf_100": partial(losses.mmd_rbf, sigma=100.0),
    "rbf_2": partial(losses.mmd_rbf, sigma=2.0),
}


@pytest.fixture
def head() -> DiscriminatorHead:
    head = DiscriminatorHead(5, depth=2)
    prefix = "gan.head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)})
    return head


@pytest.mark.parametrize("variant", MMD_VARIANTS)
def test_every_released_form_of_mmd_and_its_gradient_is_reproduced(variant):
    fake = TENSORS["mmd.fake"].clone().requires_grad_()
    loss = MMD_VARIANTS[variant](TENSORS["mmd.real"], fake)
    loss.backward()
    # With sigma 100 the loss is the small difference of numbers near 1: float32 leaves it about 1e-7.
    assert loss.item() == pytest.approx(NUMBERS[f"mmd.{variant}"], rel=1e-5, abs=2e-7)
    torch.testing.assert_close(fake.grad, TENSORS[f"mmd.{variant}.grad_fake"], rtol=1e-4, atol=1e-8)


def test_the_discriminator_head_and_both_gan_losses_are_reproduced(head):
    fake, real = head(TENSORS["mmd.fake"]), head(TENSORS["mmd.real"])
    assert fake.shape == (3, 1)
    assert losses.gan_generator(fake).item() == pytest.approx(NUMBERS["gan.generator"], rel=1e-6)
    assert losses.gan_discriminator(fake, real).item() == pytest.approx(
        NUMBERS["gan.discriminator"], rel=1e-6
    )


def test_the_dmd_gradient_and_its_loss_are_reproduced():
    sample = TENSORS["dmd.fake_sample"].clone().requires_grad_()
    gradient = losses.dmd_gradient(sample.detach(), TENSORS["dmd.real_x0"], TENSORS["dmd.fake_x0"])
    torch.testing.assert_close(gradient, TENSORS["dmd.gradient"], rtol=1e-5, atol=1e-6)
    loss = losses.dmd(sample, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(NUMBERS["dmd.loss"], rel=1e-6)
    torch.testing.assert_close(sample.grad, TENSORS["dmd.grad_fake_sample"], rtol=1e-4, atol=1e-8)


def test_the_28_step_schedule_with_shift_3_is_the_released_one():
    sigmas = shifted_sigmas(28, 3.0)
    assert sigmas == pytest.approx(NUMBERS["schedule.sigmas_28_shift3"], abs=1e-7)
    assert [1000 * s for s in sigmas[:-1]] == pytest.approx(NUMBERS["schedule.timesteps_28_shift3"], abs=1e-4)


def test_six_of_its_entries_are_the_levels_of_the_sd35_medium_student():
    sigmas = shifted_sigmas(28, 3.0)
    chosen = [sigmas[i] for i in (0, 4, 7, 12, 14, 18, 28)]
    assert chosen == pytest.approx(NUMBERS["schedule.boundaries6"], abs=1e-7)
    assert [round(1000 * s) for s in chosen] == [1000, 945, 896, 790, 737, 602, 0]


def test_resizing_is_the_released_one():
    x = TENSORS["resize.x"]
    torch.testing.assert_close(downscale_area(x, (8, 8)), TENSORS["resize.area_down_8"])
    torch.testing.assert_close(upscale_latents(x, Scale(1, 16, 16)), TENSORS["resize.bicubic_up_16"])
    there_and_back = upscale_latents(downscale_area(x, (6, 6)), Scale(1, 12, 12))
    torch.testing.assert_close(there_and_back, TENSORS["resize.area_down_6_then_bicubic_12"])


def test_the_scale_wise_sampler_is_the_released_one():
    timesteps = [1000 * sigma for sigma in NUMBERS["sampler.sigmas"][:-1]]
    schedule = ScaleSchedule.build(timesteps, NUMBERS["sampler.scales"])
    process, offset = FlowMatching(), 0.1 * TENSORS["sampler.prompt_embeds"].mean()

    def predict(x_t, t):
        mixed = torch.einsum("oc,nchw->nohw", TENSORS["sampler.W"], x_t)
        return process.x0(mixed * t.view(-1, 1, 1, 1) / 1000 + offset, x_t, t)

    noises = iter([TENSORS[f"sampler.noise{i}"] for i in (2, 3, 4, 5)])

    def noise(shape, device="cpu"):
        drawn = next(noises)
        assert drawn.shape[1:] == torch.Size(shape)
        return drawn.to(device)

    shapes = []
    sample = sample_scale_wise(
        predict, schedule, process, noise, channels=4, on_step=lambda _, x0: shapes.append(tuple(x0.shape))
    )
    assert shapes == [(2, 4, s, s) for s in (4, 6, 8, 12)]
    torch.testing.assert_close(sample, TENSORS["sampler.output"], rtol=1e-5, atol=1e-6)
    assert next(noises, None) is None

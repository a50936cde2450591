"""The spectral distance: known powers, known differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scalewise.metrics import ImageFeatures, measure
from scalewise.metrics.base import Gaussian
from scalewise.metrics.extras import parse_metric
from scalewise.metrics.spectral import EXTRA, RINGS, ROUNDING, SpectrumExtractor, power_levels


def noise(count: int, height: int, width: int, *, spread: float, seed: int = 0) -> np.ndarray:
    """Grey pictures with independent pixels of a standard deviation in [-1, 1]."""
    draw = np.random.default_rng(seed).normal(127.5, 127.5 * spread, (count, height, width, 3))
    return draw.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (96, 130)])
def test_white_noise_has_the_level_of_its_variance_at_every_frequency(size: tuple[int, int]) -> None:
    levels = 10 ** (power_levels(noise(200, *size, spread=0.2)) / 10)
    assert levels.shape == (200, RINGS)
    mean = levels.mean(0)
    assert torch.allclose(mean[2:], torch.tensor(0.04, dtype=torch.float64), rtol=0.1)
    assert 0.02 < float(mean[0]) < 0.04  # taking the mean away takes some of its neighbours along


def test_a_wave_is_found_at_its_frequency_with_its_power() -> None:
    x = np.arange(128)
    wave = 127.5 + 60 * np.cos(2 * np.pi * 20 / 128 * x)  # 0.15625 cycles a pixel: the end of ring 10
    picture = np.broadcast_to(wave.round()[None, None, :, None], (1, 128, 128, 3)).astype(np.uint8)
    levels = power_levels(picture)
    assert int(levels[0].argmax()) in (9, 10)
    far = [ring for ring in range(RINGS) if abs(ring - 9.5) > 3]
    assert float(levels[0, far].max()) < float(levels[0].max()) - 35


def test_a_picture_of_one_colour_has_no_power_but_that_of_rounding() -> None:
    levels = power_levels(np.full((1, 80, 64, 3), 200, np.uint8))
    assert torch.allclose(levels, torch.full_like(levels, 10 * math.log10(ROUNDING)), atol=1e-6)


def test_a_picture_is_judged_by_itself_and_small_ones_lack_some_frequencies() -> None:
    images, look = noise(70, 64, 64, spread=0.1), SpectrumExtractor().extract
    whole = look(images, [""] * 70)["spectrum"]
    assert torch.equal(whole[40:41], look(images[40:41], [""])["spectrum"]) and not whole.isnan().any()
    small = power_levels(noise(2, 32, 32, spread=0.1))
    assert small.isnan().any() and not small.isnan().all()


def distance(drawn: np.ndarray, real: np.ndarray) -> float:
    looks = {"spectrum": power_levels(drawn)}
    seen = ImageFeatures(
        None,
        torch.arange(len(drawn)),
        None,
        outputs=looks,
        real={"spectrum": Gaussian.fit(power_levels(real))},
    )
    found = measure(seen, rounds=20)
    assert list(found) == ["spectrum"] and found["spectrum"].low <= found["spectrum"].value
    return found["spectrum"].value


def test_half_the_contrast_is_6_decibels_away_and_the_same_pictures_none() -> None:
    real = noise(60, 64, 64, spread=0.2)
    assert distance(real, real) == pytest.approx(0, abs=1e-9)
    assert distance(noise(60, 64, 64, spread=0.1, seed=1), real) == pytest.approx(20 * math.log10(2), abs=0.1)


def test_blur_is_seen_where_no_subject_changes() -> None:
    real = noise(60, 64, 64, spread=0.2)
    rows = real.astype(float)
    blurred = ((rows + np.roll(rows, 1, 1) + np.roll(rows, 1, 2)) / 3).round().astype(np.uint8)
    assert distance(blurred, real) > 10 * distance(noise(60, 64, 64, spread=0.2, seed=1), real)


def test_it_takes_no_weights() -> None:
    assert parse_metric("spectrum", {"spectrum": EXTRA}) == (EXTRA, "")
    with pytest.raises(ValueError, match="has no weights"):
        parse_metric("spectrum=folder", {"spectrum": EXTRA})

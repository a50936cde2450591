"""Spectral distance: difference in fine structure of generated and real images (blur, grids, noise).

Features of vision models depend mainly on subject and colors; errors of upscaling show in the power spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scalewise.metrics.base import ImageFeatures, Metric, Statistic
from scalewise.metrics.extras import Device, Extra, join_chunks, split_chunks

RINGS = 32
ROUNDING = (
    2 / 255
) ** 2 / 12  # power of rounding pixels in [-1, 1] to uint8, the smallest power that matters
CHUNK = 32


def power_levels(images: np.ndarray) -> Tensor:
    """Compute the power of uint8 images [N, H, W, 3] in dB [N, RINGS], in rings of 1/64 cycles per pixel.

    Power is averaged over a ring and over colors. The mean color is subtracted, and a Hann window avoids
    artifacts of image borders. Rings without a frequency at this size (sides below 64 pixels) are NaN.
    """
    height, width = images.shape[1:3]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    window = torch.outer(*(torch.hann_window(n, dtype=torch.float64) for n in (height, width)))
    window = window / window.square().mean().sqrt()
    mean = (pixels * window).mean((2, 3), keepdim=True) / window.mean()
    power = torch.fft.fft2((pixels - mean) * window, norm="ortho").abs().square().mean(1)
    radius = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, dtype=torch.float64)[None],
    )
    ring = (radius * 2 * RINGS).ceil().long()  # ring 0 is the constant, rings above RINGS are the corners
    sums = torch.zeros(len(images), int(ring.max()) + 1, dtype=torch.float64)
    sums.index_add_(1, ring.flatten(), power.flatten(1))
    count = torch.bincount(ring.flatten(), minlength=sums.shape[1])
    return 10 * torch.log10(sums / count + ROUNDING)[:, 1 : RINGS + 1]


class SpectrumExtractor:
    """Extracts the power spectrum of images; needs no weights."""

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the power spectra [N, RINGS] of uint8 images [N, H, W, 3]; see `FeatureExtractor`."""
        return {
            "spectrum": join_chunks([power_levels(part) for part, _ in split_chunks(images, captions, CHUNK)])
        }


def _load(_source: str, _device: Device) -> SpectrumExtractor:
    return SpectrumExtractor()


def _statistic(features: ImageFeatures) -> Statistic | None:
    if "spectrum" not in features.outputs or "spectrum" not in features.real:
        return None
    power, real = features.outputs["spectrum"].double(), features.real["spectrum"].mean

    def distance(prompts: Tensor) -> float:
        difference = power[features.rows(prompts)].mean(0) - real
        return float(difference.square().nanmean().sqrt())  # over the rings that both image sizes have

    return distance


EXTRA = Extra(
    name="spectrum", load=_load, source=None, real=True,
    metrics=(Metric(
        name="spectrum", title="Spectral distance", better="lower", digits=2, bounds=(0, float("inf")),
        statistic=_statistic,
        about="RMS difference in dB, over frequencies, between the mean power spectra of generated and real "
              "images: detects blur, grids and noise, independent of the subject",
    ),),
)  # fmt: skip

"""How the fine structure of drawn pictures differs from that of real ones: blur, grids and noise.

Features of vision models know subject and colours first; what upscaling spoils is in the power spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scalewise.metrics.base import Metric, Seen, Statistic
from scalewise.metrics.extras import Device, Extra, in_chunks, joined

RINGS = 32
ROUNDING = (2 / 255) ** 2 / 12  # power of rounding pixels in [-1, 1] to bytes: nothing weaker is seen
CHUNK = 32


def power_levels(images: np.ndarray) -> Tensor:
    """Power of pictures in decibels [N, RINGS], in rings of 1/64 cycles a pixel; of bytes [N, H, W, 3].

    The mean over the ring and the colours, under a Hann window, so that opposite edges need not fit, without
    the mean colour. A ring that holds no frequency at this size (sides below 64 pixels) is NaN.
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
    ring = (radius * 2 * RINGS).ceil().long()  # 0 is the constant part, beyond RINGS are the corners
    sums = torch.zeros(len(images), int(ring.max()) + 1, dtype=torch.float64)
    sums.index_add_(1, ring.flatten(), power.flatten(1))
    count = torch.bincount(ring.flatten(), minlength=sums.shape[1])
    return 10 * torch.log10(sums / count + ROUNDING)[:, 1 : RINGS + 1]


class SpectralExaminer:
    """Gives the power levels of pictures; needs no weights."""

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Levels [N, RINGS] of images; see `Examiner`."""
        return {"spectrum": joined([power_levels(part) for part, _ in in_chunks(images, captions, CHUNK)])}


def _load(_source: str, _device: Device) -> SpectralExaminer:
    return SpectralExaminer()


def _statistic(seen: Seen) -> Statistic | None:
    if "spectrum" not in seen.looks or "spectrum" not in seen.real:
        return None
    levels, real = seen.looks["spectrum"].double(), seen.real["spectrum"].mean

    def distance(prompts: Tensor) -> float:
        apart = levels[seen.rows(prompts)].mean(0) - real
        return float(apart.square().nanmean().sqrt())  # over the rings that both sizes have

    return distance


EXTRA = Extra(
    name="spectrum", load=_load, source=None, real=True,
    metrics=(Metric(
        name="spectrum", title="Spectral distance", better="lower", digits=2, bounds=(0, float("inf")),
        statistic=_statistic,
        about="how far the mean power level of drawn pictures is from that of real ones of their size, in "
              "dB, root mean square over frequencies: sees blur, grids, noise, and nothing of the subject",
    ),),
)  # fmt: skip

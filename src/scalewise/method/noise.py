"""Noise processes: noising of clean latents, and conversion between a network's prediction and x0.

All are x_t = alpha(t) x0 + sigma(t) eps with timesteps t in [0, 1000]; they differ in alpha, sigma and the
network's prediction. Everything is computed in float32: in bfloat16 sigma is off by up to 0.002 near 0.9.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape `value` [N] to broadcast over `like` [N, ...]."""
    return value.reshape(-1, *([1] * (like.ndim - 1)))


class NoiseProcess(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps with timesteps t [N] in [0, 1000]."""

    predicts: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of x0 at t [N], float32 [N]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the weight of the noise at t [N], float32 [N]."""

    @abstractmethod
    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x0 [N, ...] from the network's prediction [N, ...] for x_t [N, ...] at t [N]."""

    @abstractmethod
    def prediction(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction [N, ...] that gives x0 [N, ...] for x_t [N, ...] at t [N]: the inverse of
        `x0`.
        """

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t [N, ...] from x0 and eps [N, ...] at t [N], in the dtype of x0."""
        alpha, sigma = (per_sample(v, x0) for v in (self.alpha(t), self.sigma(t)))
        return (alpha * x0.float() + sigma * eps.float()).to(x0.dtype)


class FlowMatching(NoiseProcess):
    """SD3.5, FLUX, Wan2.1: x_t = (1 - sigma) x0 + sigma eps with sigma = t / 1000; predicts v = eps - x0."""

    predicts: ClassVar[str] = "velocity"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.float() / 1000

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = per_sample(self.sigma(t), x_t)
        return x_t.float() - sigma * prediction.float()

    def prediction(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = per_sample(self.sigma(t), x_t)
        return (x_t.float() - x0.float()) / sigma


class VariancePreserving(NoiseProcess):
    """SDXL: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; predicts eps.

    `alphas_cumprod` holds abar [1000] of the training timesteps 0 .. 999. t = 1000 is the last of them, and
    abar is interpolated linearly between them. ValueError if it does not decrease strictly.
    """

    predicts: ClassVar[str] = "epsilon"

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        self.abar = torch.as_tensor(alphas_cumprod, dtype=torch.float32)
        if self.abar.ndim != 1 or bool((self.abar.diff() >= 0).any()):
            raise ValueError(
                "alphas_cumprod must be a strictly decreasing list, one value for each training timestep."
            )

    def _abar(self, t: Tensor) -> Tensor:
        table = self.abar.to(t.device)
        position = t.float().clamp(0, len(table) - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], position - low)

    def alpha(self, t: Tensor) -> Tensor:
        return self._abar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._abar(t)).sqrt()

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (per_sample(v, x_t) for v in (self.alpha(t), self.sigma(t)))
        return (x_t.float() - sigma * prediction.float()) / alpha

    def prediction(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (per_sample(v, x_t) for v in (self.alpha(t), self.sigma(t)))
        return (x_t.float() - alpha * x0.float()) / sigma

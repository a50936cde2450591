"""Frechet distance between two sets of features: as FID (arXiv 1706.08500), of any features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scalewise.metrics.base import Metric, Seen, Statistic


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """Fit features [N, D]."""
        if len(features) < 2:
            raise ValueError(
                f"A Frechet distance needs at least 2 images on each side, not {len(features)}; give more."
            )
        rows = features.double()
        mean = rows.mean(0)
        return cls(mean, (rows - mean).T @ (rows - mean) / (len(rows) - 1))


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix [D, D]; tiny negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2) of features a [N, D] and b [M, D].

    The root of the product is taken through symmetric eigendecompositions, which neither fail nor turn
    complex when there are fewer images than dimensions. The distance is biased upwards, more so with few
    images.
    """
    other = Gaussian.fit(b)
    return _distance(Gaussian.fit(a), other, square_root(other.covariance))


def _distance(one: Gaussian, other: Gaussian, root: Tensor) -> float:
    shared = torch.linalg.eigvalsh(root @ one.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean - other.mean).square().sum()
    return max(0.0, float(apart + one.covariance.trace() + other.covariance.trace() - 2 * shared))


def _statistic(seen: Seen) -> Statistic | None:
    if seen.reference is None:
        return None
    real = Gaussian.fit(seen.reference)  # the reference set stays as it is when images are resampled
    root = square_root(real.covariance)
    return lambda prompts: _distance(Gaussian.fit(seen.images[seen.rows(prompts)]), real, root)


METRIC = Metric(
    name="frechet", title="Fréchet distance", better="lower", statistic=_statistic,
    about="how far the drawn pictures as a whole are from real ones in the scorer's features; 0 is "
          "indistinguishable, and only figures of equally many pictures compare",
)  # fmt: skip

"""Frechet distance between two sets of features: as FID (arXiv 1706.08500), of any features."""

from __future__ import annotations

import torch
from torch import Tensor

from scalewise.metrics.base import Gaussian, Metric, Seen, Statistic, centered


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix [D, D]; tiny negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2) of features a [N, D] and b [M, D].

    The distance is biased upwards, more so with few images.
    """
    return distance(a, Gaussian.fit(b))


def distance(features: Tensor, real: Gaussian, *, root: Tensor | None = None) -> float:
    """The distance of features [N, D] to a fitted Gaussian; `root` is that of its covariance, if at hand.

    The trace of the root is the sum of the roots of eigenvalues of a symmetric matrix, which neither fails
    nor turns complex when there are fewer images than dimensions. With X the centred features over
    sqrt(N - 1), S_a = X^T X, and S_b^1/2 X^T X S_b^1/2 has the same eigenvalues but zeros as X S_b X^T:
    whichever is smaller is decomposed.
    """
    mean, rows = centered(features)
    if len(rows) <= rows.shape[1]:
        product = rows @ real.covariance @ rows.T
    else:
        root = square_root(real.covariance) if root is None else root
        product = root @ (rows.T @ rows) @ root
    shared = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    apart = (mean - real.mean).square().sum()
    return max(0.0, float(apart + rows.square().sum() + real.covariance.trace() - 2 * shared))


def distance_to(features: Tensor, seen: Seen, real: Gaussian) -> Statistic:
    """The distance of features [N, D] of what was seen to real ones, which stay whole when resampled."""
    root = square_root(real.covariance) if len(features) > features.shape[1] else None
    return lambda prompts: distance(features[seen.rows(prompts)], real, root=root)


def _statistic(seen: Seen) -> Statistic | None:
    if seen.reference is None or seen.images is None:
        return None
    return distance_to(seen.images, seen, Gaussian.fit(seen.reference))


METRIC = Metric(
    name="frechet", title="Fréchet distance", better="lower", statistic=_statistic,
    bounds=(0, float("inf")),
    about="how far the drawn pictures as a whole are from real ones in the scorer's features; 0 is "
          "indistinguishable, and only figures of equally many pictures compare",
)  # fmt: skip

"""Fréchet distance between two feature distributions: FID (arXiv 1706.08500) for any features."""

from __future__ import annotations

import torch
from torch import Tensor

from scalewise.metrics.base import Gaussian, ImageFeatures, Metric, Statistic, centered


def square_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root [D, D] of a positive semidefinite matrix [D, D].

    Negative eigenvalues (rounding errors) are set to 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Fréchet distance of features a [N, D] and b [M, D].

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2), with means m and covariances S. It is biased
    upwards, and more so for few images.
    """
    return distance(a, Gaussian.fit(b))


def distance(features: Tensor, real: Gaussian, *, root: Tensor | None = None) -> float:
    """Compute the Fréchet distance of features [N, D] to a Gaussian.

    `root` is the square root [D, D] of the Gaussian's covariance; None computes it if it is needed. The trace
    of the matrix root is computed from the eigenvalues of a symmetric matrix, so it stays real even with
    fewer images than dimensions. With X the centered features over sqrt(N - 1), S_a = X^T X; up to zeros,
    S_b^1/2 X^T X S_b^1/2 and X S_b X^T have the same eigenvalues, and the smaller one is decomposed.
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


def distance_to(rows: Tensor, features: ImageFeatures, real: Gaussian) -> Statistic:
    """Return the statistic of the distance of rows [N, D] to `real`; only the generated images are resampled.

    `features` assigns the N rows to prompts.
    """
    root = square_root(real.covariance) if len(rows) > rows.shape[1] else None
    return lambda prompts: distance(rows[features.rows(prompts)], real, root=root)


def _statistic(features: ImageFeatures) -> Statistic | None:
    if features.reference is None or features.images is None:
        return None
    return distance_to(features.images, features, Gaussian.fit(features.reference))


METRIC = Metric(
    name="frechet", title="Fréchet distance", better="lower", statistic=_statistic,
    bounds=(0, float("inf")),
    about="Fréchet distance between generated and real images in the scorer's features; compare only values "
          "of the same number of images",
)  # fmt: skip

"""Base types of metrics: the metric itself, its statistic, and the features it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from scalewise.metrics.intervals import ROUNDS

Statistic = Callable[[Tensor], float]
"""Computes a metric on some prompts, given by their indices [G]."""


class FeatureExtractor(Protocol):
    """A model that scores generated images or extracts their features; loaded only if its metric is
    requested.
    """

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return outputs by metric name for uint8 images [N, H, W, 3] and their N captions.

        An output is one value per image [N] (NaN if the metric does not apply to the caption) or features
        [N, D] to compare with the distribution of real images. The output for an image must not depend on
        the other images of the batch. Extractors for videos get uint8 [N, T, H, W, 3].
        """


@dataclass(frozen=True)
class ImageFeatures:
    """Features of generated images, and the captions and real images that metrics compare them with.

    Shapes: N images, P prompts, K captions, M real images, D scorer width. Scorer features have length 1.
    Images of the same prompt are not independent, so resampling is by prompt.
    """

    images: Tensor | None
    """The scorer's features [N, D]; None without a scorer."""
    prompt: Tensor
    """Index [N] of each image's prompt, in range(P)."""
    captions: Tensor | None
    """Embeddings [K, D] of distinct captions: the P prompts first, then distractors for prompt match."""
    reference: Tensor | None = None
    """The scorer's features of real images [M, D]."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of feature extractors by metric: values [N] or features [N, D]."""
    real: Mapping[str, Gaussian] = field(default_factory=dict)
    """Mean and covariance of the features of real images, by metric."""

    def __post_init__(self) -> None:
        for output in (self.images, *self.outputs.values()):
            assert output is None or len(output) == len(self.prompt), "every image needs a prompt"

    @property
    def prompts(self) -> int:
        """Number of prompts P."""
        return int(self.prompt.max()) + 1

    def rows(self, prompts: Tensor) -> Tensor:
        """Return the indices [R] of the images of some prompts, which are given by index [G]."""
        return torch.isin(self.prompt, prompts).nonzero().flatten()

    def mean_of(self, values: Tensor) -> Mean:
        """Return the statistic that averages one value per image [N], ignoring NaN."""
        return Mean(self, values[None])

    def mean_output(self, name: str) -> Statistic | None:
        """Return the statistic that averages an output [N]; None if it is missing or NaN for every image."""
        values = self.outputs.get(name)
        return None if values is None or bool(values.isnan().all()) else self.mean_of(values)


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean over parts K of the average value per image [K, N]; NaN where a part does not apply to an
    image.
    """

    features: ImageFeatures
    values: Tensor

    def __call__(self, prompts: Tensor) -> float:
        return float(self.values[:, self.features.rows(prompts)].double().nanmean(1).nanmean())

    @property
    def prompts(self) -> int:
        """Number of prompts with a value."""
        return len(self.features.prompt[~self.values.isnan().all(0)].unique())

    @property
    def parts(self) -> Tensor:
        """Values [K', N] of the parts that have any."""
        return self.values[~self.values.isnan().all(1)]


def count_prompts(statistic: Statistic, features: ImageFeatures) -> int:
    """Return the number of prompts that contribute to a statistic."""
    return statistic.prompts if isinstance(statistic, Mean) else features.prompts


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features in float64, and the number of images."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """Compute mean and covariance of features [N, D]."""
        mean, rows = centered(features)
        return cls(mean, rows.T @ rows, len(rows))


def centered(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] of features [N, D], and the deviations [N, D] from it over sqrt(N - 1), in float64.

    With X the deviations, X^T X is the covariance. Raises ValueError for fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(
            f"A Frechet distance needs at least 2 generated and 2 real images; got {len(features)}. Use "
            "more images."
        )
    rows = features.double()
    mean = rows.mean(0)
    return mean, (rows - mean) / (len(rows) - 1) ** 0.5


@dataclass(frozen=True)
class Metric:
    """A metric of generated images, and how it is displayed."""

    name: str
    title: str
    about: str
    """Description in one sentence, shown below tables."""
    better: Literal["lower", "higher"]
    statistic: Callable[[ImageFeatures], Statistic | None]
    """Builds the statistic; returns None if the features do not allow it (no reference, one image per
    prompt).
    """
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    percent: bool = False
    """Whether values are displayed times 100 with a percent sign."""
    digits: int = 3
    """Number of decimals displayed."""
    share: bool = False
    """Whether the metric is a share of images that pass, or a mean of such shares; its statistic is a
    `Mean`.
    """
    rounds: int = ROUNDS
    """Number of resampling rounds; fewer for slow metrics."""
    group: str = ""
    """Heading of the metrics of one kind, such as the tasks of a benchmark, that reports show in a table of
    their own; "" = in the main table.
    """

    @property
    def heading(self) -> str:
        """Title with an arrow for the direction that is better."""
        return f"{self.title} {'↓' if self.better == 'lower' else '↑'}"

    def show(self, value: float, *, finer: int = 0) -> str:
        """Format a value or difference with the metric's number of decimals plus `finer`."""
        return f"{100 * value:.{1 + finer}f}%" if self.percent else f"{value:.{self.digits + finer}f}"


def share_metric(name: str, title: str, *, about: str, group: str = "") -> Metric:
    """Return the metric of an output with 1 for images that pass, 0 for others, and NaN where it does not
    apply.
    """
    return Metric(
        name=name, title=title, better="higher", bounds=(0, 1), percent=True, share=True,
        statistic=lambda features: features.mean_output(name), about=about, group=group,
    )  # fmt: skip

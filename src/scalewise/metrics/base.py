"""What a metric is: a name, how to read it, and a statistic of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from scalewise.metrics.intervals import ROUNDS

Statistic = Callable[[Tensor], float]
"""A figure of some of the prompts, given by their numbers [G]."""


class Examiner(Protocol):
    """A model that judges drawn images; loaded only when it is asked for."""

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Figures by the name of their metric, of images [N, H, W, 3] drawn for captions (one each).

        A value per image [N], NaN where the metric does not apply to the caption, or features [N, D] whose
        distribution is held against that of real images. Image i's must not depend on its neighbours.
        Examiners of videos are given bytes [N, F, H, W, 3].
        """


@dataclass(frozen=True)
class Seen:
    """What judges made of drawn images, and what these are held against.

    N images of P prompts, K captions, M real images, D the scorer's width; its rows have length 1.

    Several images of one prompt are not independent, so whatever resamples does it by prompt.
    """

    images: Tensor | None
    """The scorer's features [N, D]; None without a scorer."""
    prompt: Tensor
    """Which of the P prompts each image was drawn for, [N]."""
    captions: Tensor | None
    """Embeddings of different captions [K, D], the P prompts first, then others to tell them from."""
    reference: Tensor | None = None
    """The scorer's features of real images [M, D]."""
    looks: Mapping[str, Tensor] = field(default_factory=dict)
    """What examiners found, by metric: values [N] or features [N, D]."""
    real: Mapping[str, Gaussian] = field(default_factory=dict)
    """Features of real images, by metric, as far as a Frechet distance needs them."""

    def __post_init__(self) -> None:
        for rows in (self.images, *self.looks.values()):
            assert rows is None or len(rows) == len(self.prompt), "every image belongs to a prompt"

    @property
    def prompts(self) -> int:
        """The number P of prompts."""
        return int(self.prompt.max()) + 1

    def rows(self, prompts: Tensor) -> Tensor:
        """Numbers of the images that were drawn for some of the prompts."""
        return torch.isin(self.prompt, prompts).nonzero().flatten()

    def mean_of(self, values: Tensor) -> Mean:
        """The statistic that averages one value per image [N]; NaN ones do not count."""
        return Mean(self, values[None])

    def mean_look(self, name: str) -> Statistic | None:
        """The average of what an examiner found, if it was asked and the metric applied to any image."""
        found = self.looks.get(name)
        return None if found is None or bool(found.isnan().all()) else self.mean_of(found)


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean over T parts of the average of one value per image [T, N], NaN where a part has none."""

    seen: Seen
    values: Tensor

    def __call__(self, prompts: Tensor) -> float:
        return float(self.values[:, self.seen.rows(prompts)].double().nanmean(1).nanmean())

    @property
    def prompts(self) -> int:
        """How many prompts have a value."""
        return len(self.seen.prompt[~self.values.isnan().all(0)].unique())

    @property
    def parts(self) -> Tensor:
        """The parts that have values, [T', N]."""
        return self.values[~self.values.isnan().all(1)]


def prompts_of(statistic: Statistic, seen: Seen) -> int:
    """How many independent prompts a figure rests on."""
    return statistic.prompts if isinstance(statistic, Mean) else seen.prompts


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, in float64, and how many they were."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """Fit features [N, D]."""
        mean, rows = centered(features)
        return cls(mean, rows.T @ rows, len(rows))


def centered(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and deviations [N, D] of features [N, D] in float64, these over sqrt(N - 1).

    X^T X of the deviations X is the covariance. Raises ValueError for fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(
            f"A Frechet distance needs at least 2 images on each side, not {len(features)}; give more."
        )
    rows = features.double()
    mean = rows.mean(0)
    return mean, (rows - mean) / (len(rows) - 1) ** 0.5


@dataclass(frozen=True)
class Metric:
    """One figure of a set of drawn images."""

    name: str
    title: str
    about: str
    """One sentence for whoever reads the table."""
    better: Literal["lower", "higher"]
    statistic: Callable[[Seen], Statistic | None]
    """Prepares the figure; None when what was seen does not allow it (no reference, one image per prompt)."""
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    percent: bool = False
    """Shown times 100 with a per cent sign."""
    digits: int = 3
    """Digits after the point."""
    share: bool = False
    """The share of images that pass, or a mean of such shares over parts: its statistic has `parts`."""
    rounds: int = ROUNDS
    """Of resampling; fewer where the figure takes long."""

    @property
    def heading(self) -> str:
        """The title with an arrow that says which way is better."""
        return f"{self.title} {'↓' if self.better == 'lower' else '↑'}"

    def show(self, value: float, *, finer: int = 0) -> str:
        """Print a value or difference with as many digits as it deserves, or some more."""
        return f"{100 * value:.{1 + finer}f}%" if self.percent else f"{value:.{self.digits + finer}f}"

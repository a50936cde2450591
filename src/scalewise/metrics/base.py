"""What a metric is: a name, how to read it, and a statistic of what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Callable[[Tensor], float]
"""A figure of some of the prompts, given by their numbers [G]."""


@dataclass(frozen=True)
class Seen:
    """Features of drawn images and of what they are held against; all rows have length 1.

    N images of P prompts, K captions, M real images, D the scorer's width.

    Several images of one prompt are not independent, so whatever resamples does it by prompt.
    """

    images: Tensor
    """[N, D]"""
    prompt: Tensor
    """Which of the P prompts each image was drawn for, [N]."""
    captions: Tensor
    """Embeddings of different captions [K, D], the P prompts first, then others to tell them from."""
    reference: Tensor | None = None
    """Features of real images [M, D]."""

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.prompt), "every image belongs to a prompt"

    @property
    def prompts(self) -> int:
        """The number P of prompts."""
        return int(self.prompt.max()) + 1

    def rows(self, prompts: Tensor) -> Tensor:
        """Numbers of the images that were drawn for some of the prompts."""
        return torch.isin(self.prompt, prompts).nonzero().flatten()

    def mean_of(self, values: Tensor) -> Statistic:
        """The statistic that averages one value per image [N]."""
        return lambda prompts: float(values[self.rows(prompts)].double().mean())


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

    def show(self, value: float) -> str:
        """Print a value or difference with as many digits as it deserves."""
        return f"{100 * value:.1f}%" if self.percent else f"{value:.{self.digits}f}"

    def to_dict(self) -> dict[str, str | int | bool]:
        """Plain data for reports: what the figure is and how to read it."""
        return {
            "name": self.name, "title": self.title, "about": self.about, "better": self.better,
            "digits": self.digits, "percent": self.percent,
        }  # fmt: skip

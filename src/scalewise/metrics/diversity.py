"""Diversity of the images of a prompt: few-step students tend to generate the same image for every seed."""

from __future__ import annotations

import torch
from torch import Tensor

from scalewise.metrics.base import ImageFeatures, Metric, Statistic


def diversity(images: Tensor, prompt: Tensor) -> float:
    """Compute the mean cosine distance of images [N, D] with equal prompt index [N], over pairs, then
    prompts.
    """
    values, _ = per_prompt(images, prompt)
    if not len(values):
        raise ValueError(
            "Diversity needs at least two images of a prompt; generate each prompt with several seeds."
        )
    return float(values.mean())


def per_prompt(images: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean pairwise cosine distance [G] of every prompt with several images, and its index [G].

    `images` are features [N, D], `prompt` is the index [N] of each image's prompt.
    """
    values, which = [], []
    for index in prompt.unique().tolist():
        rows = images[prompt == index].double()
        count = len(rows)
        if count < 2:
            continue
        rows = rows / rows.norm(dim=-1, keepdim=True)
        cosine = rows @ rows.T
        values.append(1 - (cosine.sum() - cosine.trace()) / (count * (count - 1)))
        which.append(index)
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64), torch.tensor(which)


def _statistic(features: ImageFeatures) -> Statistic | None:
    if features.images is None:
        return None
    values, which = per_prompt(features.images, features.prompt)
    if len(which) < features.prompts:  # some prompts have a single image
        return None
    return lambda prompts: float(values[prompts].mean())


METRIC = Metric(
    name="diversity", title="Diversity", better="higher", statistic=_statistic, bounds=(0, 2),
    about="mean cosine distance between images of the same prompt with different seeds; 0 means identical "
          "images",
)  # fmt: skip

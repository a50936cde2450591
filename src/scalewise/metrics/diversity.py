"""How different the images of one prompt are: few-step students tend to draw one picture from every seed."""

from __future__ import annotations

import torch
from torch import Tensor

from scalewise.metrics.base import Metric, Seen, Statistic


def diversity(images: Tensor, prompt: Tensor) -> float:
    """Mean cosine distance between images [N, D] of the same prompt [N], over pairs and then over prompts."""
    values, _ = per_prompt(images, prompt)
    if not len(values):
        raise ValueError(
            "Diversity needs two images of a prompt or more; draw each prompt with several seeds."
        )
    return float(values.mean())


def per_prompt(images: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Mean pairwise cosine distance of each prompt with several images [G], and which those are [G]."""
    values, which = [], []
    for number in prompt.unique().tolist():
        rows = images[prompt == number].double()
        count = len(rows)
        if count < 2:
            continue
        rows = rows / rows.norm(dim=-1, keepdim=True)
        cosine = rows @ rows.T
        values.append(1 - (cosine.sum() - cosine.trace()) / (count * (count - 1)))
        which.append(number)
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64), torch.tensor(which)


def _statistic(seen: Seen) -> Statistic | None:
    if seen.images is None:
        return None
    values, which = per_prompt(seen.images, seen.prompt)
    if len(which) < seen.prompts:  # every prompt counts, or the figure is of a chosen few
        return None
    return lambda prompts: float(values[prompts].mean())


METRIC = Metric(
    name="diversity", title="Diversity", better="higher", statistic=_statistic, bounds=(0, 2),
    about="mean cosine distance between pictures of the same prompt from different seeds; 0 is always "
          "the same picture",
)  # fmt: skip

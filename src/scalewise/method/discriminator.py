"""The discriminator head: a small MLP on the mean of a block's tokens."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class DiscriminatorHead(nn.Sequential):
    """`depth` x (LayerNorm -> GELU -> Linear) with widths falling evenly from `width` to 1, rounded down.

    These are the released widths: 1536 falls to 1152, 768, 384 and 1.
    """

    def __init__(self, width: int, *, depth: int = 4) -> None:
        widths = [width + (1 - width) * i // depth for i in range(depth + 1)]
        layers: list[nn.Module] = []
        for now, then in pairwise(widths):
            layers += [nn.LayerNorm(now), nn.GELU(), nn.Linear(now, then)]
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Score features [N, L, D]: tokens are averaged first. Returns logits [N, 1]."""
        return super().forward(features.float().mean(dim=1))

"""Discriminator head: a small MLP on the mean of a block's tokens."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class DiscriminatorHead(nn.Sequential):
    """`depth` x (LayerNorm -> GELU -> Linear); widths decrease evenly from `width` to 1, rounded down.

    Widths as released: 1536, 1152, 768, 384, 1.
    """

    def __init__(self, width: int, *, depth: int = 4) -> None:
        widths = [width + (1 - width) * i // depth for i in range(depth + 1)]
        layers: list[nn.Module] = []
        for now, then in pairwise(widths):
            layers += [nn.LayerNorm(now), nn.GELU(), nn.Linear(now, then)]
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [N, 1] from features [N, L, D], averaged over tokens."""
        return super().forward(features.float().mean(dim=1))

"""The discriminator head: the released widths, and what happens to a head of other widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalewise.common.checkpoint import CheckpointError
from scalewise.method.discriminator import DiscriminatorHead
from scalewise.training.trainer import load_head


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1536, [1536, 1152, 768, 384, 1]),  # SD3.5 Medium
        (2432, [2432, 1824, 1216, 608, 1]),  # SD3.5 Large
        (3072, [3072, 2304, 1536, 768, 1]),  # FLUX.1
    ],
)
def test_the_widths_of_the_head_are_those_of_the_released_trainer(width, expected):
    head = DiscriminatorHead(width)
    found = [layer.in_features for layer in head if isinstance(layer, nn.Linear)]
    assert [*found, head[-1].out_features] == expected
    assert expected == torch.linspace(width, 1, 5).int().tolist()  # as the released trainer computes them


def test_a_checkpoints_head_with_other_widths_is_rejected_with_both():
    old = nn.Sequential(
        *[layer for a, b in ((8, 7), (7, 1)) for layer in (nn.LayerNorm(a), nn.GELU(), nn.Linear(a, b))]
    )
    head = DiscriminatorHead(8, depth=2)
    with pytest.raises(
        CheckpointError, match=r"step-9 has the widths \[7, 1\], not \[4, 1\].*start a new one"
    ):
        load_head(head, old.state_dict(), "step-9")
    other = DiscriminatorHead(8, depth=2)
    load_head(head, other.state_dict(), "step-9")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))

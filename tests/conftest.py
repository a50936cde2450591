"""Fixtures shared by the tests: the random miniature of SD3 and a backbone on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from scalewise.method.backbone import Backbone
from scalewise.models import SD3


@pytest.fixture(autouse=True)
def without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub: what is not there is known at once, instead of after several attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def model() -> SD3:
    """A random miniature with SD3's real classes; equal in every test."""
    return SD3.tiny()


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """Build a miniature's backbone whose adapters already do something: LoRA's B is random, not zero."""

    def make(*roles: str, rank: int = 4, seed: int = 1, **options: object) -> Backbone:
        backbone = Backbone(SD3.tiny(), roles, rank=rank, **options)
        for number, role in enumerate(roles):
            draw = torch.Generator().manual_seed(100 * seed + number)
            for parameter in backbone.parameters(role).values():
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
        return backbone

    return make

"""Batches of several aspect buckets: the samples of an update do not depend on how its batch is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scalewise.data.batches import Batches
from scalewise.data.header import SetHeader
from scalewise.method.adapter import Condition
from scalewise.method.scales import Scale, ScaleSchedule


class Bucket:
    """A dataset whose latents contain the number of their bucket and row."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count, self.scales = number, count, [Scale(1, 4, 4)]
        self.header = SetHeader("synthetic", (Scale(1, 4, 4),), 1, "base")

    def __len__(self) -> int:
        return self.count

    def require(self, scales: Any) -> None:
        pass

    def latents(self, rows: list[int], scale: Scale) -> torch.Tensor:
        return torch.stack([torch.full((1, 4, 4), 100.0 * self.number + row) for row in rows])

    def captions(self, rows: list[int]) -> list[str]:
        return [""] * len(rows)


class Prompts:
    def condition(self, captions: list[str]) -> Condition:
        return Condition({"tokens": torch.zeros(len(captions), 1)})


def batches(size: int, rank: int = 0, world: int = 1) -> Batches:
    sets: Any = [Bucket(0, 9), Bucket(1, 7), Bucket(2, 11)]
    prompts: Any = Prompts()
    schedule = ScaleSchedule.parse("1000@4x4")
    return Batches(sets, schedule, prompts, batch=size, rank=rank, world=world)


def seen(parts: list[tuple[Batches, int]], update: int) -> list[tuple[float, float]]:
    """Sample and first noise of every row of an update."""
    found = []
    for source, position in parts:
        rows = source.at(position, update=update).target[:, 0, 0, 0].tolist()
        found += zip(rows, source.noise(position)((1,))[:, 0].tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("update", range(12))
def test_an_update_has_the_same_samples_and_noise_for_every_split_of_its_batch(update):
    whole = seen([(batches(4), update)], update)
    accumulated = seen([(batches(2), 2 * update), (batches(2), 2 * update + 1)], update)
    processes = seen([(batches(2, 0, 2), update), (batches(2, 1, 2), update)], update)
    assert whole == accumulated == processes
    assert len(set(whole)) == 4 and len({int(row) // 100 for row, _ in whole}) == 1

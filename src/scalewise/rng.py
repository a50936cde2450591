"""Random numbers that depend on what they are for, never on batch size, process count or history.

A generator is made anew from (seed, purpose, position), so there is no hidden state to save: a resumed run
draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(*key: int | str) -> int:
    """Hash a key such as (seed, "student", position) into a 63-bit seed."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a fresh CPU generator for a key; equal keys give equal numbers."""
    return torch.Generator().manual_seed(derive(*key))


class SampleNoise:
    """Noise for a batch of samples, one stream per sample seed: image i is the same in any batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [generator("sample", int(seed)) for seed in seeds]

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draw the next noise [N, *shape] of every stream; drawn on the CPU so that devices agree."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators]).to(device)


def permutation(count: int, *key: int | str) -> Tensor:
    """Return a shuffled range(count) for a key."""
    return torch.randperm(count, generator=generator(*key))

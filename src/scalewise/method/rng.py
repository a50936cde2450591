"""Random numbers that depend on their purpose, never on batch size, number of processes or history.

Every generator is created from (seed, purpose, position), so there is no hidden state to save: a resumed run
draws the same numbers as an uninterrupted one.
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
    """Return a new CPU generator for a key; equal keys give equal numbers."""
    return torch.Generator().manual_seed(derive(*key))


class SampleNoise:
    """Noise for a batch of N samples with one random stream per sample seed.

    A sample gets the same numbers in any batch, for any accumulation and number of processes.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = [int(seed) for seed in seeds]
        self._generators = [generator("sample", seed) for seed in self._seeds]

    def __len__(self) -> int:
        return len(self._seeds)

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draw the next normal noise [N, *shape], on the CPU so that all devices get the same."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators]).to(device)

    def uniform(self) -> Tensor:
        """Draw the next uniform numbers [N] in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators])

    def choice(self, count: int) -> Tensor:
        """Draw the next integers [N] in [0, count)."""
        return torch.cat([torch.randint(count, (1,), generator=g) for g in self._generators])

    def fork(self, purpose: str) -> SampleNoise:
        """Return new streams for a purpose, independent of how many numbers these have drawn."""
        return SampleNoise([derive(seed, purpose) for seed in self._seeds])


def permutation(count: int, *key: int | str) -> Tensor:
    """Return a shuffled range(count) [N] for a key, with N = count."""
    return torch.randperm(count, generator=generator(*key))

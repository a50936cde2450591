"""Training batches from latents on disk. A batch is a function of its number, so no loader state is saved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from scalewise.data import DataError, LatentSet, PromptCache
from scalewise.method.distill import Batch
from scalewise.method.rng import SampleNoise, derive, permutation
from scalewise.method.scales import Scale, ScaleSchedule, downscale_area, upscale_latents


class Batches:
    """Training batches by number: the schedule's step, latents and conditions of the samples.

    Samples come from shuffled passes over a dataset. With several datasets (aspect buckets), each batch comes
    from one of them, chosen at random in proportion to their sizes. Every process takes its share of the
    global batch.
    """

    def __init__(
        self,
        sets: Sequence[LatentSet],
        schedule: ScaleSchedule,
        prompts: PromptCache,
        *,
        batch: int,
        seed: int = 0,
        downscale: str = "pixel",
        step_choice: str = "round-robin",
        patch: int = 1,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        negative: str = "",
    ) -> None:
        """Combine datasets, schedule and prompt embeddings.

        `negative` is the teacher's negative prompt; its embedding is the unconditional condition. `downscale`
        is "pixel" for the stored or derived latents of every scale, or "latent" to downscale the full latents
        (an ablation). Raises DataError if a dataset is smaller than one global batch or does not have the
        schedule's scales.
        """
        self.sets, self.prompts, self.batch, self.seed = list(sets), prompts, batch, seed
        self.latent_downscale, self.step_choice = downscale == "latent", step_choice
        self.rank, self.world, self.device, self.negative = rank, world, device, negative
        self.schedules = [schedule.for_size(s.header.full, patch) for s in self.sets]
        for own, data in zip(self.schedules, self.sets, strict=True):
            self._check(own, data)
        self._passes = lru_cache(maxsize=4)(self._pass)

    def _check(self, schedule: ScaleSchedule, data: LatentSet) -> None:
        if len(data) < self.batch * self.world:
            raise DataError(
                f"The dataset {data.folder} has {len(data)} samples, fewer than one batch of "
                f"{self.batch * self.world}; add data or lower train.batch."
            )
        if not self.latent_downscale:
            data.require(schedule.scales)

    @property
    def steps(self) -> int:
        """Number of steps in the schedule."""
        return len(self.schedules[0])

    def index_at(self, position: int) -> int:
        """Return the step of the schedule that iteration `position` trains, equal in all processes."""
        if self.step_choice == "round-robin":
            return position % self.steps
        return derive(self.seed, "step", position) % self.steps

    def at(self, position: int, index: int | None = None, *, update: int | None = None) -> Batch:
        """Return batch number `position` for step `index` of the schedule (default: `index_at(position)`).

        Its source and target are latents [N, C, (T,) H, W] at the target scale of the step. `update` is the
        number of the optimizer update that the batch belongs to (default: `position`); all batches of an
        update come from the same aspect bucket.
        """
        index = self.index_at(position) if index is None else index
        which = self._set_at(position if update is None else update)
        data, schedule = self.sets[which], self.schedules[which]
        chosen = self._samples(which, position)
        target = self._latents(data, chosen, schedule.target(index))
        source = upscale_latents(self._latents(data, chosen, schedule.source(index)), schedule.target(index))
        captions = data.captions(chosen)
        return Batch(
            source=source.to(self.device),
            target=target.to(self.device),
            cond=self.prompts.condition(captions).to(self.device),
            uncond=self.prompts.condition([self.negative]).to(self.device),
            t=schedule[index].t,
            index=index,
        )

    def _latents(self, data: LatentSet, chosen: Sequence[int], scale: Scale) -> Tensor:
        if not self.latent_downscale:
            return data.latents(chosen, scale)
        return downscale_area(data.latents(chosen, data.header.full), scale.size)

    def rows(self, position: int) -> range:
        """Return the numbers, counted over the whole run, of this process's samples in batch `position`.

        Data and noise depend on them alone, not on batch size, accumulation or the number of processes.
        """
        size = self.batch * self.world
        return range(position * size + self.rank, (position + 1) * size, self.world)

    def noise(self, position: int) -> SampleNoise:
        """Return the random streams for the noise [N, ...] of this process's samples in batch `position`."""
        return SampleNoise([derive(self.seed, "update", row) for row in self.rows(position)])

    def _set_at(self, update: int) -> int:
        if len(self.sets) == 1:
            return 0
        point = derive(self.seed, "bucket", update) % sum(map(len, self.sets))
        for which, data in enumerate(self.sets):
            point -= len(data)
            if point < 0:
                return which
        raise AssertionError("unreachable: the point lies within the sum")

    def _samples(self, which: int, position: int) -> list[int]:
        """Return this process's samples of a batch as indices into dataset number `which`."""
        count = len(self.sets[which])
        return [int(self._passes(which, row // count)[row % count]) for row in self.rows(position)]

    def _pass(self, which: int, number: int) -> Tensor:
        return permutation(len(self.sets[which]), self.seed, "pass", which, number)

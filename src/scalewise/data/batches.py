"""From latents on disk to what an update sees. A batch is a function of its position: nothing is saved."""

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
    """Batch number `position` of a run: the schedule's step, the samples and their conditions.

    Samples come in shuffled passes over all sets; with several sets (aspect buckets) a batch is drawn from
    one of them, in proportion to their sizes. Each process takes its own part of the global batch.
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
        """`negative` is the teacher's negative prompt, whose encoding is the unconditional condition.

        `downscale` "latent" makes every scale from the full latent (ablation) instead of from pixels."""
        self.sets, self.prompts, self.batch, self.seed = list(sets), prompts, batch, seed
        self.latent_downscale, self.step_choice = downscale == "latent", step_choice
        self.rank, self.world, self.device, self.negative = rank, world, device, negative
        self.schedules = [schedule.for_size(largest(s), patch) for s in self.sets]
        for own, data in zip(self.schedules, self.sets, strict=True):
            self._check(own, data)
        self._passes = lru_cache(maxsize=4)(self._pass)

    def _check(self, schedule: ScaleSchedule, data: LatentSet) -> None:
        if len(data) < self.batch * self.world:
            raise DataError(
                f"The set has {len(data)} samples, fewer than one batch of {self.batch * self.world}; "
                "add data or lower train.batch."
            )
        if not self.latent_downscale:
            data.require(schedule.scales)

    @property
    def steps(self) -> int:
        """Number of steps of the schedule."""
        return len(self.schedules[0])

    def index_at(self, position: int) -> int:
        """Step of the schedule that iteration `position` trains; equal on every process."""
        if self.step_choice == "round-robin":
            return position % self.steps
        return derive(self.seed, "step", position) % self.steps

    def at(self, position: int, index: int | None = None, *, update: int | None = None) -> Batch:
        """Return batch number `position`, for step `index` of the schedule (default: the position's own).

        `update` is the number of the optimizer's update that it belongs to (default: the position); all
        batches of one update come from the same aspect bucket.
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
        return downscale_area(data.latents(chosen, largest(data)), scale.size)

    def rows(self, position: int) -> range:
        """Numbers of this process's samples in batch number `position`, counted over the whole run.

        They are the same for any batch size, accumulation and number of processes, so that noise can be.
        """
        size = self.batch * self.world
        return range(position * size + self.rank, (position + 1) * size, self.world)

    def noise(self, position: int) -> SampleNoise:
        """The random streams of those samples."""
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
        """This process's rows: its stride of the global batch, from shuffled passes over the set."""
        count = len(self.sets[which])
        return [int(self._passes(which, row // count)[row % count]) for row in self.rows(position)]

    def _pass(self, which: int, number: int) -> Tensor:
        return permutation(len(self.sets[which]), self.seed, "pass", which, number)


def largest(data: LatentSet) -> Scale:
    """The full size of a set: its largest scale."""
    return max(data.scales, key=lambda scale: scale.cells)

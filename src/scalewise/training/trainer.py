"""The training loop: updates of the fake model, one update of the student, checkpoints.

All randomness is derived from (seed, purpose, position), so a checkpoint has only the roles' weights, the
discriminator head, both optimizers, the average and one counter.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalewise.common import checkpoint, distributed
from scalewise.common.errors import TrainingInterrupted, TrainingStopped
from scalewise.common.finite import non_finite
from scalewise.common.signals import STOP_SIGNALS, handle_signals
from scalewise.config.recipe import OptimizerRecipe, Recipe
from scalewise.data.batches import Batches
from scalewise.method.backbone import Backbone
from scalewise.method.discriminator import DiscriminatorHead
from scalewise.method.distill import DistillStep, LossError, Numbers
from scalewise.training.origin import Origin, check_resume


def build_head(backbone: Backbone, recipe: Recipe) -> DiscriminatorHead | None:
    """Build the discriminator head, from the seed alone, or return None if the loss has no GAN term."""
    if not recipe.loss.needs_head:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed + 1)
        return DiscriminatorHead(backbone.model.width).to(backbone.device)


def load_head(head: DiscriminatorHead, state: dict[str, Tensor], path: str) -> None:
    """Load a checkpoint's head: weights [D_out, D_in] and biases [D_out] by name.

    Raises CheckpointError if the layers have other widths.
    """
    own = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in state.items()}
    if own != stored:
        widths, found = ([shape[0] for shape in shapes.values()][2::4] for shapes in (own, stored))
        raise checkpoint.CheckpointError(
            f"The discriminator head in {path} has the widths {found}, not {widths}: it is from a version "
            "that rounds them differently. Finish the run with that version, or start a new one."
        )
    head.load_state_dict(state)


class RoleOptimizer:
    """AdamW for the parameters of one trained role."""

    def __init__(
        self, role: str, parameters: Sequence[nn.Parameter], recipe: OptimizerRecipe, *, lr: float
    ) -> None:
        self.role, self.parameters = role, list(parameters)
        self.lr, self.clip, self.warmup = lr, recipe.clip, recipe.warmup
        self.current_lr = lr
        """Learning rate of the last update; it rises to `lr` during warm-up."""
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    def apply(self, iteration: int) -> float:
        """Average gradients over processes, clip them and step; returns the gradient norm before clipping."""
        distributed.mean_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        if not math.isfinite(norm):
            raise LossError("gradient norm", norm)
        self.current_lr = self.lr * min(1.0, (iteration + 1) / max(1, self.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


class Average:
    """Exponential moving average of the student's weights."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.live = decay, parameters
        self.shadow = {k: v.detach().clone() for k, v in parameters.items()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Move towards the current weights; the decay rises over the first iterations."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, value in self.live.items():
            self.shadow[name].lerp_(value, 1 - decay)


@dataclass
class Trainer:
    """Trains the student of a recipe; `fit()` yields one log row per iteration."""

    recipe: Recipe
    backbone: Backbone
    batches: Batches
    folder: Path
    iteration: int = 0
    origin: Origin | None = None
    """Fingerprints of dataset and base, stored in every checkpoint."""
    _stop: str = field(default="", init=False)

    def __post_init__(self) -> None:
        recipe, backbone = self.recipe, self.backbone
        self.head = build_head(backbone, recipe)
        self.step = DistillStep(backbone, recipe.loss, head=self.head)
        if recipe.train.gradient_checkpointing:
            backbone.enable_checkpointing()
        optimizer = recipe.optimizer
        self.student = RoleOptimizer(
            "student", list(backbone.parameters("student").values()), optimizer, lr=optimizer.lr
        )
        self.fake: RoleOptimizer | None = None
        if recipe.loss.needs_fake:
            owned = list(backbone.parameters("fake").values()) + list(
                self.head.parameters() if self.head else ()
            )
            self.fake = RoleOptimizer("fake", owned, optimizer, lr=optimizer.fake_lr or optimizer.lr)
        self.average = Average(backbone.parameters("student"), recipe.train.ema) if recipe.train.ema else None
        self.checkpoints = self.folder / "checkpoints"

    @property
    def updates(self) -> int:
        """Optimizer updates per iteration: those of the fake model and one of the student."""
        return (self.recipe.loss.fake.updates if self.fake else 0) + 1

    def fit(self, log: Callable[[Numbers], None] = lambda row: None) -> Iterator[Numbers]:
        """Train for the recipe's number of iterations; save periodically, on a signal and at the end.

        Each row is logged and the checkpoint, if due, is written before the row is yielded, so an error in
        the caller's loop, for example while sampling, cannot lose a checkpoint.

        Raises TrainingInterrupted after a signal, TrainingStopped if a loss or gradient is not finite.
        """
        train = self.recipe.train
        with self._signals():
            while self.iteration < train.iterations:
                started = time.perf_counter()
                try:
                    row = self.iterate()
                except LossError as error:
                    raise TrainingStopped(self._describe_failure(error)) from error
                self.iteration += 1
                row = {"iteration": self.iteration, **row, "seconds": time.perf_counter() - started}
                log(row)
                # Read once: a signal that arrives after this stops the run after the next iteration.
                stop, step = self._stop_requested(), self.iteration
                if stop or step % train.checkpoint_every == 0 or step == train.iterations:
                    self.save()
                yield row
                if stop:
                    raise TrainingInterrupted(stop, step)

    def iterate(self) -> Numbers:
        """Update the fake model `loss.fake.updates` times, each on new batches, then the student once."""
        row = Numbers()
        if self.fake:
            for k in range(self.updates - 1):
                row |= self._update(self.fake, self.step.fake_step, k)
        row |= self._update(self.student, self.step.student_step, self.updates - 1)
        if self.average:
            self.average.update(self.iteration)
        return row

    def _update(self, role: RoleOptimizer, gradients: Callable[..., Numbers], k: int) -> Numbers:
        """Perform update k of this iteration: mean gradient of `train.accumulate` batches, clip, step.

        All updates of an iteration train the same step of the schedule, as in the released trainer. A loss
        that is not finite in one process stops all of them, because the others would wait for its gradients.
        """
        accumulate, update = self.recipe.train.accumulate, self.iteration * self.updates + k
        index = self.batches.index_at(self.iteration)
        means, error = Numbers(), None
        try:
            for position in range(update * accumulate, (update + 1) * accumulate):
                batch = self.batches.at(position, index, update=update)
                numbers = gradients(batch, self.batches.noise(position), share=1 / accumulate)
                for key, value in numbers.items():
                    means[key] = means.get(key, 0.0) + value / accumulate
        except LossError as found:
            error = found
        if distributed.any_of(error is not None):
            raise error or LossError("a term of another process", math.nan)
        norm = role.apply(self.iteration)
        means = distributed.mean_scalars(means | {"step": index})
        return means | {f"{role.role}/gradient_norm": norm, f"{role.role}/lr": role.current_lr}

    def state(self) -> dict[str, Any]:
        """Return all state needed to resume."""
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "student": self.backbone.roles.state("student"),
            "student_optimizer": self.student.optimizer.state_dict(),
        }
        if self.fake:
            state |= {
                "fake": self.backbone.roles.state("fake"),
                "fake_optimizer": self.fake.optimizer.state_dict(),
            }
        if self.head:
            state["head"] = self.head.state_dict()
        if self.average:
            state["average"] = self.average.shadow
        return state

    def save(self) -> Path:
        """Write a checkpoint and delete the oldest ones, both in the first process only."""
        path = self.checkpoints / f"step-{self.iteration:06d}"
        if distributed.is_main():
            meta: dict[str, Any] = {
                "recipe": self.recipe.model_dump(mode="json"),
                "denoiser": self.backbone.model.denoiser_name,
            }
            if self.origin:
                meta["origin"] = self.origin.to_dict()
            checkpoint.save(path, self.state(), meta=meta)
            checkpoint.prune(self.checkpoints, self.recipe.train.keep_checkpoints)
        distributed.barrier()
        return path

    def resume(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises CheckpointError if it is damaged, has NaN or infinity, or is from another recipe, dataset or
        base (see `check_resume`).
        """
        state, meta = checkpoint.load(path)
        check_resume(path, meta, self.recipe, self.origin)
        if broken := non_finite(state):
            raise checkpoint.CheckpointError(
                f"The checkpoint {path} cannot be resumed: its {checkpoint.TENSORS} has NaN or infinity in "
                f"{len(broken)} tensors, for example {broken[0]}. {checkpoint.RESUME_EARLIER}"
            )
        self.backbone.roles.load("student", state["student"])
        self.student.optimizer.load_state_dict(state["student_optimizer"])
        if self.fake:
            self.backbone.roles.load("fake", state["fake"])
            self.fake.optimizer.load_state_dict(state["fake_optimizer"])
        if self.head:
            load_head(self.head, state["head"], str(path))
        if self.average:
            for name, value in state["average"].items():
                self.average.shadow[name].copy_(value)
        self.iteration = state["iteration"]

    def student_weights(self) -> dict[str, Tensor]:
        """Return the weights to save as the student: the average if there is one, else the current ones.

        They are LoRA matrices by name, of the shapes [rank, D_in] and [D_out, rank].
        """
        return dict(self.average.shadow) if self.average else self.backbone.roles.state("student")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGHUP stop training after the current iteration, with a checkpoint."""

        def request_stop(number: int, _frame: Any) -> None:
            if self._stop:  # the second signal stops immediately
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        with handle_signals(request_stop):
            yield

    def _stop_requested(self) -> str:
        """Return the signal that any process received, or "", so that all stop after the same iteration."""
        votes = distributed.mean_scalars({name: float(self._stop == name) for name in STOP_SIGNALS})
        return next((name for name, vote in votes.items() if vote), "")

    def _describe_failure(self, error: LossError) -> str:
        """Describe a non-finite loss and the checkpoint to resume from.

        A checkpoint of the iteration just before is renamed, because its weights lead to the same failure.
        """
        last = checkpoint.latest(self.checkpoints)
        renamed = ""
        if last and last.name == f"step-{self.iteration:06d}":
            broken = last.with_name(f"nan-{last.name}")
            if distributed.is_main():
                last.rename(broken)
            renamed = f"the checkpoint just before would fail again and was renamed to {broken.name}; "
            distributed.barrier()
            last = checkpoint.latest(self.checkpoints)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        remedy = "Resume with" if last else "Start again with"
        return (
            f"{str(error).rstrip('.')} at iteration {self.iteration + 1}; {renamed}{kept}. {remedy} a lower "
            "optimizer.lr or optimizer.clip."
        )

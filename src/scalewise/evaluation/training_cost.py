"""What a training iteration costs: seconds and peak memory, scale-wise and at full scale, loss by loss."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalewise.common import markdown
from scalewise.common.progress import Progress
from scalewise.common.results import write_json, write_text
from scalewise.config.recipe import Recipe
from scalewise.evaluation.sampling_speed import setting_of
from scalewise.evaluation.timing import device_clock, in_turns, rounds_told
from scalewise.metrics.intervals import Interval, median_interval
from scalewise.training import setup
from scalewise.training.trainer import Trainer

FULL_SCALE, MMD_ONLY = "schedule.full_scale=true", "loss.mmd_only=true"
MODES = {
    "scale-wise, full loss": (),
    "full scale, full loss": (FULL_SCALE,),
    "scale-wise, MMD alone": (MMD_ONLY,),
    "full scale, MMD alone": (MMD_ONLY, FULL_SCALE),
}
GB = 1e9


@dataclass(frozen=True)
class Mode:
    """What an iteration of one mode takes."""

    name: str
    seconds: Interval
    held: int
    """Bytes of the base, the roles that the loss needs, their moments and their average."""
    peak: int
    """Bytes at the fullest moment of an iteration at any step, `held` included."""


@dataclass(frozen=True)
class TrainingCost:
    """All modes, and their ratios within rounds."""

    modes: list[Mode]
    ratios: dict[str, Interval]
    """Seconds of one mode over those of another, by "one / other"."""
    setting: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write training.json and training.md."""
        write_json(folder / "training.json", self)
        write_text(folder / "training.md", self.markdown)

    @property
    def markdown(self) -> str:
        """Two tables."""
        show = "{:.3g}".format
        modes = [
            [mode.name, mode.seconds.show(show), show(mode.peak / GB), show(mode.held / GB)]
            for mode in self.modes
        ]
        head = ["training", "an iteration, s", "peak memory, GB", "of it held throughout"]
        ratios = [[name, ratio.show(show)] for name, ratio in self.ratios.items()]
        tables = [markdown.table(head, modes), markdown.table(["seconds of", "ratio"], ratios)]
        setting = self.setting
        told = f"Batch {setting['batch']}, {setting['dtype']} computed in {setting['precision']}, "
        told += f"{setting['device']}. {rounds_told(setting['rounds'])} Peak memory is that of tensors."
        return "\n\n".join([*tables, told]) + "\n"


def measure_training(recipe: Recipe, *, rounds: int, progress: Progress) -> TrainingCost:
    """Time and weigh training iterations of a recipe in all modes, on one base and its data.

    A round runs every mode once over all steps of its schedule. The modes share the adapters, which train on
    whatever the others left: times and sizes do not depend on the values.
    """
    data = setup.prepare_data(recipe, progress)
    # A recipe that is MMD alone to begin with has no other loss to compare with.
    wanted = [name for name, changes in MODES.items() if recipe.loss.needs_fake or MMD_ONLY in changes]
    recipes = {name: recipe.override(list(MODES[name])) for name in wanted}
    backbone = setup.training_backbone(recipe, data)
    with TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(own, backbone, setup.batches_for(own, data, backbone), Path(folder))
            for name, own in recipes.items()
        }
        clock = device_clock(str(backbone.device))
        laps: dict[str, list[float]] = {name: [] for name in trainers}
        passes = (rounds + 1) * sum(trainer.batches.steps for trainer in trainers.values())
        with progress("training iterations", passes) as done:
            ticks, peaks = itertools.count(1), {}

            def one_pass(trainer: Trainer) -> None:
                """One iteration for every step of the schedule."""
                for _ in range(trainer.batches.steps):
                    trainer.iterate()
                    trainer.iteration += 1
                    done(next(ticks))

            for name, trainer in trainers.items():
                trainer.iterate()  # the optimizers' moments are there from now on
                peaks[name] = peak_bytes(partial(one_pass, trainer), backbone.device)
            names = list(trainers)
            for number in range(rounds):
                for name in in_turns(names, number):
                    started = clock()
                    one_pass(trainers[name])
                    laps[name].append((clock() - started) / trainer.batches.steps)
    modes = [
        Mode(name, median_interval(laps[name]), held_bytes(own), held_bytes(own) + peaks[name])
        for name, own in trainers.items()
    ]
    setting = setting_of(recipe, backbone.device, rounds=rounds) | {
        "batch": recipe.train.batch, "accumulate": recipe.train.accumulate,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
    }  # fmt: skip
    return TrainingCost(modes, ratios(laps), setting)


def ratios(laps: dict[str, list[float]]) -> dict[str, Interval]:
    """Scale-wise over full scale for each loss, and the full loss over MMD alone for each scale."""
    pairs = [(f"scale-wise, {loss}", f"full scale, {loss}") for loss in ("full loss", "MMD alone")]
    pairs += [(f"{scale}, full loss", f"{scale}, MMD alone") for scale in ("scale-wise", "full scale")]
    return {
        f"{one} / {other}": median_interval([a / b for a, b in zip(laps[one], laps[other], strict=True)])
        for one, other in pairs
        if one in laps and other in laps
    }


def held_bytes(trainer: Trainer) -> int:
    """Bytes of the base, and of weights, two moments and average of what the trainer trains."""
    base = [p for n, p in trainer.backbone.model.denoiser.named_parameters() if ".lora_" not in n]
    trained = [*trainer.student.parameters, *(trainer.fake.parameters if trainer.fake else [])]
    average = sum(map(_bytes, trainer.average.shadow.values())) if trainer.average else 0
    return sum(map(_bytes, base)) + 3 * sum(map(_bytes, trained)) + average


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `work` has allocated at a time, beyond what was there before.

    On a CPU they are those of tensors, which do not depend on what the system's allocator keeps back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        work()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, until their storage goes.

    What an operator allocates for itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, *call: Any) -> Any:
        args, kwargs = call
        # Storages that an operator is given were there before, or are counted already.
        self._note((args, kwargs), new=False)
        found = func(*args, **(kwargs or {}))
        self._note(found, new=True)
        return found

    def _note(self, values: Any, *, new: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = storage.nbytes() if new else 0
            self._known.add(storage._cdata)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

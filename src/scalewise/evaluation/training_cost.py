"""Measure time and peak memory of a training iteration, scale-wise and at full scale, for both losses."""

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
from scalewise.evaluation.sampling_speed import describe_setting
from scalewise.evaluation.timing import describe_rounds, device_clock, rotate
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
    """Time and memory of a training iteration in one mode."""

    name: str
    seconds: Interval
    held: int
    """Bytes of the base, the adapters that the loss needs, their optimizer moments and moving average."""
    peak: int
    """Largest number of bytes during an iteration at any step, including `held`."""


@dataclass(frozen=True)
class TrainingCost:
    """Time and memory of all modes, with the ratios of their times."""

    modes: list[Mode]
    ratios: dict[str, Interval]
    """Time of one mode divided by that of another, by "one / other", computed within rounds."""
    setting: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write training.json and training.md to a folder."""
        write_json(folder / "training.json", self)
        write_text(folder / "training.md", self.markdown)

    @property
    def markdown(self) -> str:
        """The tables of modes and of ratios, with the settings."""
        show = "{:.3g}".format
        modes = [
            [mode.name, mode.seconds.show(show), show(mode.peak / GB), show(mode.held / GB)]
            for mode in self.modes
        ]
        head = ["training", "s per iteration", "peak memory, GB", "constant part, GB"]
        ratios = [[name, ratio.show(show)] for name, ratio in self.ratios.items()]
        tables = [markdown.table(head, modes), markdown.table(["time of", "ratio"], ratios)]
        setting = self.setting
        note = f"Batch {setting['batch']}, {setting['dtype']} computed in {setting['precision']}, "
        note += (
            f"{setting['device']}. {describe_rounds(setting['rounds'])} The peak memory counts tensors only."
        )
        return "\n\n".join([*tables, note]) + "\n"


def measure_training(recipe: Recipe, *, rounds: int, progress: Progress) -> TrainingCost:
    """Measure time and memory of training iterations of a recipe in all modes, on one base and dataset.

    A round runs every mode once over all steps of its schedule. The modes share and train the same adapters;
    time and memory do not depend on their values.
    """
    data = setup.prepare_data(recipe, progress)
    # A recipe with MMD alone has no full loss to compare with.
    names = [name for name, changes in MODES.items() if recipe.loss.needs_fake or MMD_ONLY in changes]
    recipes = {name: recipe.override(list(MODES[name])) for name in names}
    backbone = setup.training_backbone(recipe, data)
    with TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(own, backbone, setup.batches_for(own, data, backbone), Path(folder))
            for name, own in recipes.items()
        }
        clock = device_clock(str(backbone.device))
        times: dict[str, list[float]] = {name: [] for name in trainers}
        passes = (rounds + 1) * sum(trainer.batches.steps for trainer in trainers.values())
        with progress("training iterations", passes) as done:
            counter, peaks = itertools.count(1), {}

            def one_pass(trainer: Trainer) -> None:
                """Run one iteration for every step of the schedule."""
                for _ in range(trainer.batches.steps):
                    trainer.iterate()
                    trainer.iteration += 1
                    done(next(counter))

            for name, trainer in trainers.items():
                trainer.iterate()  # creates the optimizer moments
                peaks[name] = peak_bytes(partial(one_pass, trainer), backbone.device)
            for number in range(rounds):
                for name in rotate(list(trainers), number):
                    started = clock()
                    one_pass(trainers[name])
                    times[name].append((clock() - started) / trainer.batches.steps)
    modes = [
        Mode(name, median_interval(times[name]), held_bytes(own), held_bytes(own) + peaks[name])
        for name, own in trainers.items()
    ]
    setting = describe_setting(recipe, backbone.device, rounds=rounds) | {
        "batch": recipe.train.batch, "accumulate": recipe.train.accumulate,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
    }  # fmt: skip
    return TrainingCost(modes, ratios(times), setting)


def ratios(times: dict[str, list[float]]) -> dict[str, Interval]:
    """Return ratios of times: scale-wise / full scale for each loss, full loss / MMD alone for each mode."""
    pairs = [(f"scale-wise, {loss}", f"full scale, {loss}") for loss in ("full loss", "MMD alone")]
    pairs += [(f"{scale}, full loss", f"{scale}, MMD alone") for scale in ("scale-wise", "full scale")]
    return {
        f"{one} / {other}": median_interval([a / b for a, b in zip(times[one], times[other], strict=True)])
        for one, other in pairs
        if one in times and other in times
    }


def held_bytes(trainer: Trainer) -> int:
    """Return the bytes of the base and of the trained parameters with two moments and moving average."""
    base = [p for n, p in trainer.backbone.model.denoiser.named_parameters() if ".lora_" not in n]
    trained = [*trainer.student.parameters, *(trainer.fake.parameters if trainer.fake else [])]
    average = sum(map(_bytes, trainer.average.shadow.values())) if trainer.average else 0
    return sum(map(_bytes, base)) + 3 * sum(map(_bytes, trained)) + average


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak of bytes that `work` allocates, beyond those allocated before.

    On a CPU, the bytes of tensors are counted, independent of the memory that the allocator caches.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensorBytes() as live:
        work()
    return live.most


class _LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors created by operators until their storage is freed.

    Temporary memory inside an operator is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, *call: Any) -> Any:
        args, kwargs = call
        # The storages of inputs existed before or are counted already.
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

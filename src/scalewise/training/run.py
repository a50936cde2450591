"""A training run in a folder: recipe, versions, log, checkpoints, sample grids and the finished student."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalewise.common import checkpoint, distributed
from scalewise.common.images import contact_sheet, middle_frame, read_image, to_bytes
from scalewise.common.locks import locked
from scalewise.common.progress import Progress
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.method.backbone import Precision, choose_precision
from scalewise.method.distill import Numbers
from scalewise.method.rng import derive
from scalewise.method.sampling import sample_student
from scalewise.models.lora import load_student, save_student, versions
from scalewise.training import origin, setup
from scalewise.training.origin import TUNABLE_KEYS, Origin, check_resume
from scalewise.training.trainer import Trainer


class RunFolder:
    """The folder of a run.

    It has recipe.yaml, versions.json, log.jsonl, tensorboard/, checkpoints/, samples/, student.safetensors.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        """Open the folder of a run; raises RecipeError if it has a run and `resume` is False."""
        self.path, self.recipe = path, recipe
        if (path / "recipe.yaml").exists() and not resume:
            raise RecipeError(f"{path} already has a run; resume it with --resume, or give another --out.")

    def is_finished(self, step: int) -> bool:
        """Return whether the student after `step` iterations is written."""
        file = self.path / "student.safetensors"
        return file.exists() and load_student(file).recipe["train"]["iterations"] == step

    def describe(self) -> None:
        """Write recipe.yaml and versions.json, after everything was built and the checkpoint was accepted."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        recipe = self.recipe.to_yaml()
        checkpoint.write_atomically(
            self.path / "recipe.yaml", lambda path: path.write_text(recipe, encoding="utf-8")
        )
        machine = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(distributed.device()),
        }
        (self.path / "versions.json").write_text(json.dumps(versions() | machine, indent=1), encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Read the rows of the log, without a last row that was only partly written."""
        log = self.path / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise RecipeError(f"Line {number} of {log} is damaged; remove it and resume.") from error
        return rows

    def cut_log(self, iteration: int) -> None:
        """Remove the rows after the iteration that a run resumes from, because they are written again."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows() if row["iteration"] <= iteration)
        checkpoint.write_atomically(
            self.path / "log.jsonl", lambda path: path.write_text(text, encoding="utf-8")
        )


class Log:
    """Log of training, written as JSON lines and for TensorBoard."""

    def __init__(self, folder: RunFolder, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = open(folder.path / "log.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=after + 1)

    def write(self, row: Numbers) -> None:
        """Append a row, which must have an "iteration"."""
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "iteration":
                self._board.add_scalar(key, value, int(row["iteration"]))

    def preview(self, path: Path | None, iteration: int) -> None:
        """Add a saved sample grid to TensorBoard; does nothing if `path` is None."""
        if path is not None:
            self._board.add_image("samples", read_image(path), iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()


def distill(recipe: Recipe, out: Path, progress: Progress, *, resume: bool = False) -> Iterator[Numbers]:
    """Train a recipe's student in a folder; yields a row with the first iteration, then the rows of the log.

    The folder is locked during training. Resuming a finished run changes nothing.

    Raises FolderInUse, RecipeError if the folder has a run and resume=False, and CheckpointError if that run
    was started with another recipe, dataset or base.
    """
    with locked(out):
        recipe = resolve_precision(recipe, out)
        folder = RunFolder(out, recipe, resume=resume)
        found = checkpoint.latest(out / "checkpoints") if resume else None
        if found and (step := iteration_of(found)) >= recipe.train.iterations:
            meta = checkpoint.read_meta(found)
            check_resume(found, meta, recipe, None)
            if folder.is_finished(step):
                warnings.warn(
                    f"{out} is finished after {step} iterations and nothing was changed; set "
                    f"train.iterations above {step} to continue training.",
                    stacklevel=2,
                )
                yield {"iteration": step}
                return
            folder.recipe = recipe = recipe_as_trained(recipe, origin.recipe_in(found, meta), step)
        yield from train(folder, found, progress, resume=resume)


def train(folder: RunFolder, found: Path | None, progress: Progress, *, resume: bool) -> Iterator[Numbers]:
    """Train in a locked folder, from the checkpoint `found` or from the start."""
    recipe, out = folder.recipe, folder.path
    data = setup.prepare_data(recipe, progress, extra_prompts=recipe.train.sample_prompts)
    trainer = setup.build_trainer(recipe, data, out)
    trainer.origin = Origin.of(recipe, data.sets)
    if found:
        trainer.resume(found)
    elif resume:
        warnings.warn(
            f"{out} has no checkpoint to resume from; training starts at iteration 0.", stacklevel=2
        )
    main = distributed.is_main()
    if main:
        folder.describe()
        folder.cut_log(trainer.iteration)
    log = Log(folder, after=trainer.iteration) if main else None
    yield {"iteration": trainer.iteration}
    try:
        for row in trainer.fit(log.write) if log else trainer.fit():
            yield row
            every = recipe.train.sample_every
            if log and every and int(row["iteration"]) % every == 0:
                log.preview(save_sample_grid(trainer, data), trainer.iteration)
        if log:
            log.preview(finish(trainer, data), trainer.iteration)
    finally:
        if log:
            log.close()


def iteration_of(found: Path) -> int:
    """Return the number of iterations trained up to a checkpoint."""
    return int(found.name.rpartition("-")[2])


def recipe_as_trained(recipe: Recipe, stored: Recipe, step: int) -> Recipe:
    """Return the recipe to store with a student that was trained by an earlier command but not written.

    Iterations and tunable keys are those of the checkpoint, because the new values had no effect.
    """
    keys = {name: name.partition(".")[2] for name in TUNABLE_KEYS}
    trained = {name: getattr(stored.optimizer, key) for name, key in keys.items()}
    return recipe.with_values(trained | {"train.iterations": step})


def resolve_precision(recipe: Recipe, out: Path) -> Recipe:
    """Replace precision "auto" by the precision of the run in `out`, or the best one for this device."""
    if recipe.train.precision != "auto":
        return recipe
    stored = out / "recipe.yaml"
    wanted: Precision = Recipe.from_yaml(stored).train.precision if stored.exists() else "auto"
    return recipe.with_values({"train.precision": choose_precision(wanted, distributed.device())})


def finish(trainer: Trainer, data: setup.Data) -> Path | None:
    """Write the student and the last sample grid; returns the grid's path, or None without sample prompts."""
    recipe = trainer.recipe
    save_student(
        trainer.folder / "student.safetensors", trainer.student_weights(), recipe,
        denoiser=trainer.backbone.model.denoiser_name,
    )  # fmt: skip
    return save_sample_grid(trainer, data)


@torch.no_grad()
def save_sample_grid(trainer: Trainer, data: setup.Data) -> Path | None:
    """Save a grid of samples with fixed seeds: a row per sample prompt, a column per step (its x0).

    Returns its path, or None if the recipe has no sample prompts.
    """
    recipe = trainer.recipe
    prompts = list(recipe.train.sample_prompts)
    if not prompts:
        return None
    seeds = [derive(recipe.train.seed, "grid", i) for i in range(len(prompts))]
    cond = data.prompts.condition(prompts).to(trainer.backbone.device)
    schedule = recipe.schedule.build()
    # Loaded only for the grid: training keeps nothing but the denoiser in memory.
    decoder = setup.load(recipe, ["vae"])
    steps: list[list[np.ndarray]] = []

    def keep(_i: int, x0: Tensor) -> None:
        # One sample at a time, because decoding takes the most memory.
        steps.append([to_bytes(middle_frame(decoder.decode(one)))[0] for one in x0.split(1)])

    with averaged_weights(trainer):
        sample_student(trainer.backbone, schedule, cond, seeds, on_step=keep)
    images = [step[i] for i in range(len(prompts)) for step in steps]
    path = trainer.folder / "samples" / f"iteration-{trainer.iteration:06d}.png"
    titles = [f"t {step.t:.0f}, {step.scale}" for step in schedule]
    contact_sheet(images, columns=len(steps), titles=titles, captions=prompts).save(path)
    return path


class averaged_weights:
    """Context in which the student has the weights that will be saved, the average if there is one."""

    def __init__(self, trainer: Trainer) -> None:
        self.roles, self.shipped = trainer.backbone.roles, trainer.student_weights()

    def __enter__(self) -> None:
        self.live = self.roles.state("student")
        self.roles.load("student", self.shipped)

    def __exit__(self, *_: object) -> None:
        self.roles.load("student", self.live)

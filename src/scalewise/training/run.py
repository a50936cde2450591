"""A run on disk: recipe, versions, log, checkpoints, sample grids and the finished student in one folder."""

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
from scalewise.method.backbone import Precision, settle
from scalewise.method.distill import Numbers
from scalewise.method.rng import derive
from scalewise.method.sampling import sample_student
from scalewise.models.lora import load_student, save_student, versions
from scalewise.training import origin, setup
from scalewise.training.origin import TUNABLE, Origin, check_resume
from scalewise.training.trainer import Trainer


class RunFolder:
    """recipe.yaml, versions.json, log.jsonl, tensorboard/, checkpoints/, samples/, student.safetensors."""

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        """Name the folder; one that holds a run already is continued just when asked for."""
        self.path, self.recipe = path, recipe
        if (path / "recipe.yaml").exists() and not resume:
            raise RecipeError(
                f"{path} holds a run already; continue it with --resume, or give another --out."
            )

    def is_finished(self, step: int) -> bool:
        """Tell whether the student of so many iterations is written."""
        file = self.path / "student.safetensors"
        return file.exists() and load_student(file).recipe["train"]["iterations"] == step

    def describe(self) -> None:
        """Write recipe and versions: once everything is built, and a resumed checkpoint has fitted."""
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
        """Rows of the log; a last one that was cut off in the middle of writing does not count."""
        log = self.path / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise RecipeError(f"Line {number} of {log} is damaged; remove it and go on.") from error
        return rows

    def cut_log(self, iteration: int) -> None:
        """Drop rows after the checkpoint that a run goes on from: they will be written again."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows() if row["iteration"] <= iteration)
        checkpoint.write_atomically(
            self.path / "log.jsonl", lambda path: path.write_text(text, encoding="utf-8")
        )


class Log:
    """Writes rows of numbers as JSON lines and for TensorBoard."""

    def __init__(self, folder: RunFolder, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = open(folder.path / "log.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=after + 1)

    def write(self, row: Numbers) -> None:
        """Append one row; it carries its iteration."""
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "iteration":
                self._board.add_scalar(key, value, int(row["iteration"]))

    def preview(self, path: Path | None, iteration: int) -> None:
        """Show a sheet of samples in TensorBoard too."""
        if path is not None:
            self._board.add_image("samples", read_image(path), iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def distill(recipe: Recipe, out: Path, progress: Progress, *, resume: bool = False) -> Iterator[Numbers]:
    """Train a recipe's student into a folder; yields the log's rows, after one that says where it starts.

    The folder is held meanwhile. Resuming a run that is finished changes nothing, whatever is asked for.

    Raises FolderInUse, RecipeError for a folder that holds a run already, and CheckpointError for one that
    was begun with another recipe, dataset or base.
    """
    with locked(out):
        recipe = settled(recipe, out)
        folder = RunFolder(out, recipe, resume=resume)
        found = checkpoint.latest(out / "checkpoints") if resume else None
        if found and (step := step_of(found)) >= recipe.train.iterations:
            meta = checkpoint.read_meta(found)
            check_resume(found, meta, recipe, None)
            if folder.is_finished(step):
                warnings.warn(
                    f"{out} is finished, {step} iterations are trained, and nothing was changed; set "
                    f"train.iterations above {step} to train on.",
                    stacklevel=2,
                )
                yield {"iteration": step}
                return
            folder.recipe = recipe = as_trained(recipe, origin.recipe_of(found, meta), step)
        yield from train(folder, found, progress, resume=resume)


def train(folder: RunFolder, found: Path | None, progress: Progress, *, resume: bool) -> Iterator[Numbers]:
    """Train in a folder that is held, from the checkpoint `found` on or from the beginning."""
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
                log.preview(draw_samples(trainer, data), trainer.iteration)
        if log:
            log.preview(finish(trainer, data), trainer.iteration)
    finally:
        if log:
            log.close()


def step_of(found: Path) -> int:
    """Iterations that were trained before a checkpoint."""
    return int(found.name.rpartition("-")[2])


def as_trained(recipe: Recipe, there: Recipe, step: int) -> Recipe:
    """The recipe of a student that is trained but was not written: what is asked for now changed nothing."""
    keys = {name: name.partition(".")[2] for name in TUNABLE}
    rates = {name: getattr(there.optimizer, key) for name, key in keys.items()}
    return recipe.with_values(rates | {"train.iterations": step})


def settled(recipe: Recipe, out: Path) -> Recipe:
    """Replace precision "auto" by what the run in `out` began with, else by what this device is good at."""
    if recipe.train.precision != "auto":
        return recipe
    begun = out / "recipe.yaml"
    wanted: Precision = Recipe.from_yaml(begun).train.precision if begun.exists() else "auto"
    return recipe.with_values({"train.precision": settle(wanted, distributed.device())})


def finish(trainer: Trainer, data: setup.Data) -> Path | None:
    """Write the student and the last grid of samples; returns the grid's file, if samples are drawn."""
    recipe = trainer.recipe
    save_student(
        trainer.folder / "student.safetensors", trainer.student_weights(), recipe,
        denoiser=trainer.backbone.model.denoiser_name,
    )  # fmt: skip
    return draw_samples(trainer, data)


@torch.no_grad()
def draw_samples(trainer: Trainer, data: setup.Data) -> Path | None:
    """Draw the recipe's fixed prompts with fixed seeds, one labelled row per prompt: x0 of every step."""
    recipe = trainer.recipe
    prompts = list(recipe.train.sample_prompts)
    if not prompts:
        return None
    seeds = [derive(recipe.train.seed, "grid", i) for i in range(len(prompts))]
    cond = data.prompts.condition(prompts).to(trainer.backbone.device)
    schedule = recipe.schedule.build()
    # Held only for the grid: training keeps the denoiser alone in memory.
    decoder = setup.load(recipe, ["vae"])
    steps: list[list[np.ndarray]] = []

    def keep(_i: int, x0: Tensor) -> None:
        # One at a time: decoding takes more memory than anything else here.
        steps.append([to_bytes(middle_frame(decoder.decode(one)))[0] for one in x0.split(1)])

    with using_average(trainer):
        sample_student(trainer.backbone, schedule, cond, seeds, on_step=keep)
    pictures = [step[i] for i in range(len(prompts)) for step in steps]
    path = trainer.folder / "samples" / f"iteration-{trainer.iteration:06d}.png"
    titles = [f"t {step.t:.0f}, {step.scale}" for step in schedule]
    contact_sheet(pictures, columns=len(steps), titles=titles, captions=prompts).save(path)
    return path


class using_average:
    """Within it the student's live weights are replaced by the ones that will be shipped."""

    def __init__(self, trainer: Trainer) -> None:
        self.roles, self.shipped = trainer.backbone.roles, trainer.student_weights()

    def __enter__(self) -> None:
        self.live = self.roles.state("student")
        self.roles.load("student", self.shipped)

    def __exit__(self, *_: object) -> None:
        self.roles.load("student", self.live)

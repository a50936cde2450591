"""Time a training iteration against a plain one, organized as in the authors' description of the method.

    python scripts/authors_iteration.py                                  # mini and mini-mmd, float32 and bf16
    python scripts/authors_iteration.py mini-mmd --precision bf16 --rounds 9

Both train the same weights, batches, noise and losses with the same optimizers, in turns in one process. The
plain iteration is written from the paper (arXiv 2503.16397, section 4 and appendix A), not from the authors'
code:

- all terms are in one graph, and one backward pass goes through all networks;
- features of a block come from a whole forward pass, also those of real samples, whose graph is recorded;
- layers, attention and casts are those of torch, diffusers and peft.

In favor of the plain iteration, both have encoded latents and prompts, one forward pass of the student per
update, LoRA roles on one base, and no gradients for networks that an update does not train.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from scalewise.common import console
from scalewise.common.progress import silent
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.evaluation.timing import format_ratio, rotate
from scalewise.method import losses
from scalewise.method.adapter import Condition
from scalewise.method.backbone import Backbone
from scalewise.method.cpu import FastPaths
from scalewise.method.distill import Batch, DistillStep, Numbers, draw_noise
from scalewise.method.rng import SampleNoise
from scalewise.method.roles import TEACHER
from scalewise.metrics.intervals import median_interval
from scalewise.training import setup
from scalewise.training.trainer import Trainer


class PlainStep(DistillStep):
    """The same losses in one graph, with features from whole forward passes."""

    def student_step(self, batch: Batch, rng: SampleNoise, *, share: float = 1.0) -> Numbers:
        """Add `share` of the gradient of mmd + dmd + gan to the student's parameters."""
        mmd, dmd, gan, cond = self.loss.mmd, self.loss.dmd, self.loss.gan, batch.cond
        x0 = self._x0_student(batch, rng)
        total, numbers = x0.new_zeros(()), Numbers()
        if mmd.weight > 0:
            t, eps = draw_noise(mmd.timesteps, x0, rng.fork("mmd"), clean=mmd.clean)
            real = self._features(self.process.add_noise(batch.target, eps, t), t, cond, mmd.features)
            seen = self._features(self.process.add_noise(x0, eps, t), t, cond, mmd.features)
            value = losses.mmd_linear(real.detach(), seen, penalty=mmd.penalty, c=mmd.c)
            total, numbers["mmd"] = total + mmd.weight * value, float(value.detach())
        if dmd.weight > 0 or gan.weight > 0:
            t, eps = draw_noise(dmd.timesteps, x0, rng.fork("dmd_gan"))
            x_t = self.process.add_noise(x0, eps, t)
        if gan.weight > 0:
            assert self.head is not None
            value = losses.gan_generator(self.head(self._features(x_t, t, cond, "fake")))
            total, numbers["gan"] = total + gan.weight * value, float(value.detach())
        if dmd.weight > 0:
            with torch.no_grad():
                x0_teacher = self.backbone.predict_x0(
                    x_t, t, cond, role=TEACHER, guidance=dmd.guidance, uncond=batch.uncond
                )
                x0_fake = self.backbone.predict_x0(x_t, t, cond, role="fake")
                gradient = losses.dmd_gradient(x0, x0_teacher, x0_fake)
            value = losses.dmd(x0, gradient)
            total, numbers["dmd"] = total + dmd.weight * value, float(value.detach())
        parameters = list(self.backbone.parameters("student").values())
        for parameter, grad in zip(parameters, torch.autograd.grad(share * total, parameters), strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return numbers

    def _features(self, x_t: Tensor, t: Tensor, cond: Condition, role: str) -> Tensor:
        block = self.loss.feature_block
        return self.backbone.predict_x0_and_features(x_t, t, cond, role=role, block=block)[1]


def build(recipe: Recipe, data: setup.Data, folder: Path, *, plain: bool) -> Trainer:
    """Build the trainer of a recipe, or the plain one."""
    if not plain:
        return setup.build_trainer(recipe, data, folder)
    model = setup.load(recipe, ["denoiser"], training=True)
    roles = ["student", "fake"] if recipe.loss.needs_fake else ["student"]
    backbone = Backbone(
        model, roles, rank=recipe.lora.rank, alpha=recipe.lora.alpha, targets=recipe.lora.targets,
        precision=recipe.train.precision, seed=recipe.train.seed, fast=FastPaths(),
    )  # fmt: skip
    trainer = Trainer(recipe, backbone, setup.batches_for(recipe, data, backbone), folder)
    trainer.step = PlainStep(backbone, recipe.loss, head=trainer.head)
    return trainer


def measure(name: str, precision: str, rounds: int) -> str:
    """Return a line with the times of both and their ratio; a round is one iteration per schedule step."""
    recipe = find_recipe(name).override([f"train.precision={precision}", "train.sample_prompts=[]"])
    data = setup.prepare_data(recipe, silent)
    with TemporaryDirectory() as folder:
        trainers = {plain: build(recipe, data, Path(folder), plain=plain) for plain in (False, True)}
        first = {plain: trainer.iterate() for plain, trainer in trainers.items()}
        # Later losses differ by roundings that training amplifies.
        for term in ("mmd", "dmd", "gan"):
            assert abs(first[True].get(term, 0) - first[False].get(term, 0)) < 0.05, (term, first)
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            for plain in rotate(list(trainers), number):
                trainer, started = trainers[plain], time.perf_counter()
                for _ in range(trainer.batches.steps):
                    trainer.iteration += 1
                    trainer.iterate()
                times[plain].append((time.perf_counter() - started) / trainer.batches.steps)
    ratio = median_interval([plain / ours for plain, ours in zip(times[True], times[False], strict=True)])
    seconds = [median_interval(times[plain]).value for plain in (True, False)]
    return f"{name}, {precision}: plain {seconds[0]:.3g} s, ours {seconds[1]:.3g} s, {format_ratio(ratio)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["mini", "mini-mmd"])
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    console.quiet_libraries()
    for chosen in options.recipes:
        for precision in options.precision:
            console.print_note(measure(chosen, precision, options.rounds))

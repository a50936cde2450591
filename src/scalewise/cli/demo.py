"""The demo: distil the embedded teacher before the user's eyes and write a report on what came out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from scalewise import mini
from scalewise.cli.run_making import follow
from scalewise.common import console, distributed
from scalewise.common.errors import resumed_by_same_command
from scalewise.common.results import write_json
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.evaluation import compare
from scalewise.evaluation.report import Column, ReportContent, Stage, StepSequence, write_report
from scalewise.evaluation.samplers import Prompts, SamplerSpec, generate_images, generate_steps, parse_sampler
from scalewise.models import PipelineAdapter
from scalewise.models.lora import versions
from scalewise.training import setup
from scalewise.training.run import distill

SHOWN = 12
"""Prompts in the report's gallery."""
JOURNEYS = 3
FEWEST_ITERATIONS = 60
TIMING_ROUNDS = 7


@dataclass(frozen=True)
class Plan:
    """What the demo will do on this machine, and the seconds that it should take."""

    iterations: int
    prompts: int
    seconds_of_training: float
    seconds_of_drawing: float
    seconds_of_timing: float

    @property
    def minutes(self) -> float:
        """All of it, with a little for loading and writing."""
        return (self.seconds_of_training + self.seconds_of_drawing + self.seconds_of_timing + 25) / 60


def run_demo(out: Path, *, minutes: float) -> Path:
    """Plan, distil, compare and report; a stopped demo goes on from its last checkpoint."""
    recipe = find_recipe("mini-demo")
    stages: list[Stage] = []
    with timed(stages, "getting ready", "prompts embedded, speed of this machine measured"):
        plan = make_plan(recipe, out, minutes)
    recipe = recipe.override([f"train.iterations={plan.iterations}"])
    with timed(stages, "distilling", f"{plan.iterations} iterations on the teacher's own pictures"):
        run = train(recipe, out / "run")
    names = [
        "teacher",
        f"student=student:{run / 'student.safetensors'}",
        "undistilled",
        f"shipped student=student:{mini.STUDENT}",
    ]
    with timed(
        stages, "comparing", f"{plan.prompts} captions that nothing was trained on, by each contender"
    ):
        texts = mini.captions("test")[: plan.prompts]
        outcome = compare.compare(
            recipe, names, texts, console.progress, out=out / "comparison", rounds=TIMING_ROUNDS
        )
    with timed(stages, "drawing the gallery", f"{SHOWN} prompts side by side"):
        content = collect(recipe, names, outcome, stages=stages, run=run, out=out)
    return write_report(out / "report.html", content)


@contextmanager
def timed(stages: list[Stage], name: str, about: str) -> Iterator[None]:
    """Note how long a stage took."""
    started = time.perf_counter()
    yield
    stages.append(Stage(name, about, time.perf_counter() - started))


def make_plan(recipe: Recipe, out: Path, minutes: float) -> Plan:
    """Measure this machine for some seconds and fit the demo into the time, once per demo folder."""
    file = out / "plan.json"
    if file.exists():
        plan = Plan(**json.loads(file.read_text(encoding="utf-8")))
        console.err.print(f"Going on with the demo in {out}: {plan.iterations} iterations.")
        return plan
    console.err.print("Measuring this machine for a few seconds ...")
    iteration, teacher_image = probe(recipe)
    plan = fit_plan(recipe.train.iterations, iteration, teacher_image, minutes=minutes)
    write_json(file, asdict(plan))
    console.err.print(
        f"This will take about {plan.minutes:.0f} minutes: {plan.iterations} iterations of training, "
        f"{plan.prompts} captions drawn by the teacher and by few-step models, timing, a report."
    )
    return plan


def probe(recipe: Recipe) -> tuple[float, float]:
    """Seconds of a training iteration (mean over the schedule's steps), and of a picture by the teacher."""
    data = setup.prepare_data(recipe, console.progress, extra_prompts=recipe.train.sample_prompts)
    trainer = setup.build_trainer(recipe, data, Path("unused"))

    def one_pass() -> float:
        started = time.perf_counter()
        for position in range(trainer.batches.steps):
            trainer.step.student_step(trainer.batches.at(position), trainer.batches.noise(position))
        return (time.perf_counter() - started) / trainer.batches.steps

    one_pass()  # the first touches memory and builds kernels
    # The quickest of some: a machine that others use for a moment looks slower than it is.
    iteration = min(one_pass() for _ in range(2))
    batch = trainer.batches.at(len(recipe.schedule.timesteps) - 1)
    t = torch.full((len(batch.target),), 500.0)
    forwards = []
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            trainer.backbone.predict_x0(batch.target, t, batch.cond, guidance=2.0, uncond=batch.uncond)
            forwards.append(time.perf_counter() - started)
    return iteration, min(forwards) / len(batch.target) * recipe.teacher.steps


def fit_plan(iterations: int, iteration: float, teacher_image: float, *, minutes: float) -> Plan:
    """Fewer iterations and captions on a slow machine, never more than the recipe's."""
    # Timing draws the teacher about 9 times a round (batch 1 and 8), the others together about half as much.
    timing = (TIMING_ROUNDS + 1) * 13 * teacher_image
    budget = max(60.0, 60 * minutes - 25 - timing)
    prompts = int(min(100, max(24, 0.3 * budget / (1.6 * teacher_image))))
    drawing = (prompts + SHOWN) * 1.6 * teacher_image  # the few-step contenders together cost about half
    affordable = int((budget - drawing) / iteration)
    chosen = max(FEWEST_ITERATIONS, min(iterations, affordable))
    return Plan(chosen, prompts, chosen * iteration, drawing, timing)


def train(recipe: Recipe, folder: Path) -> Path:
    """Distil, or go on; a finished run is taken as it is."""
    if (folder / "student.safetensors").exists():
        return folder
    rows = distill(recipe, folder, console.progress, resume=(folder / "recipe.yaml").exists())
    with resumed_by_same_command():
        follow(rows, recipe.train.iterations)
    return folder


def collect(
    recipe: Recipe,
    names: list[str],
    outcome: compare.Outcome,
    *,
    stages: list[Stage],
    run: Path,
    out: Path,
) -> ReportContent:
    """Draw the gallery and gather everything that the report shows."""
    model = setup.load(recipe, ("denoiser", "vae", "text"))
    captions = mini.captions("test")
    shown = [*recipe.train.sample_prompts[:4], *captions[:: max(1, len(captions) // (SHOWN - 4))]][:SHOWN]
    prompts = Prompts.of(shown, seed=1)
    contenders = [parse_sampler(name, recipe) for name in names]
    precision = recipe.train.precision
    columns = [
        Column(c.name, c.about, generate_images(model, c, prompts, precision=precision)) for c in contenders
    ]
    schedule = recipe.schedule.build()
    labels = [f"t {step.t:.0f}, {step.scale}" for step in schedule]
    return ReportContent(
        title="Scale-wise distillation of the mini",
        summary=summary(recipe, outcome),
        stages=stages,
        prompts=shown,
        columns=columns,
        journeys=journeys(model, contenders[1], prompts=prompts, labels=labels, recipe=recipe),
        log=[json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()],
        schedule=labels,
        figures=outcome.rows,
        timings=outcome.timings,
        command=f"scalewise demo --out {out}",
        recipe=recipe.to_yaml(),
        versions=versions(),
        machine={
            "python": platform.python_version(),
            "processor": platform.machine(),
            "threads": str(torch.get_num_threads()),
            "device": str(distributed.device()),
        },
    )


def journeys(
    model: PipelineAdapter, student: SamplerSpec, *, prompts: Prompts, labels: list[str], recipe: Recipe
) -> list[StepSequence]:
    """x0 of every step of the student, for the first prompts."""
    some = prompts[:JOURNEYS]
    steps = generate_steps(model, student, some, precision=recipe.train.precision)
    return [
        StepSequence(caption, labels, [step[i] for step in steps]) for i, caption in enumerate(some.captions)
    ]


def summary(recipe: Recipe, outcome: compare.Outcome) -> str:
    """One paragraph for somebody who has not read the paper."""
    schedule = recipe.schedule.build()
    sizes = ", ".join(str(s) for s in schedule.scales)
    teacher = outcome.rows[0]
    return (
        "The teacher is a small text-to-image diffusion model in the architecture of Stable Diffusion 3.5, "
        f"trained on emoji; it draws in {teacher.about}. Its student, a LoRA on the same frozen network, was "
        f"trained just now on pictures that the teacher had drawn. It needs {len(schedule)} passes without "
        f"guidance and starts on a small latent that grows at every step ({sizes} cells): the early, noisy "
        "steps have no fine detail to compute. Both drew the same captions from the same seeds; the figures "
        "are taken on captions and against pictures that were never trained on."
    )

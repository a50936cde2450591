"""Time of a training iteration: scale-wise and full-scale, full loss and MMD alone, taking turns in one run.

    python scripts/iteration_times.py --out results/iterations.json

Paper, table 5: scale-wise about half of full-scale, MMD alone about a seventh of the full loss.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from scalewise import build, console
from scalewise.bench import Spread
from scalewise.recipe import Recipe
from scalewise.recipes import find_recipe
from scalewise.trainer import Trainer

SCALE_WISE, FULL_SCALE = "scale-wise", "full-scale"


def recipes() -> dict[tuple[str, str], Recipe]:
    """The four combinations, all with the same batch."""
    full_loss = find_recipe("mini")
    mmd_alone = find_recipe("mini-mmd").override([f"train.batch={full_loss.train.batch}"])
    full_scale = ["schedule.full_scale=true"]
    return {
        (SCALE_WISE, "full loss"): full_loss,
        (SCALE_WISE, "MMD alone"): mmd_alone,
        (FULL_SCALE, "full loss"): full_loss.override(full_scale),
        (FULL_SCALE, "MMD alone"): mmd_alone.override(full_scale),
    }


def one_pass(trainer: Trainer) -> float:
    """Seconds per iteration, over one iteration for every step of the schedule."""
    steps = trainer.batches.steps
    started = time.perf_counter()
    for _ in range(steps):
        trainer._iterate()
        trainer.iteration += 1
    return (time.perf_counter() - started) / steps


def main(rounds: int, out: Path) -> None:
    """Run every combination once a round, and summarise the ratios within rounds."""
    console.quiet_libraries()
    with TemporaryDirectory() as folder:
        trainers = {
            key: build.build_trainer(recipe, build.prepare_data(recipe, console.progress), Path(folder))
            for key, recipe in recipes().items()
        }
        laps: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
        with console.progress("rounds", rounds + 1) as done:
            for number in range(rounds + 1):
                for key, trainer in trainers.items():
                    seconds = one_pass(trainer)
                    if number:  # the first is warm-up
                        laps[key].append(seconds)
                done(number + 1)
    found = {" ".join(key): Spread.of(values).to_list() for key, values in laps.items()}

    def ratio(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        return Spread.of([a / b for a, b in zip(laps[one], laps[other], strict=True)]).to_list()

    for loss in ("full loss", "MMD alone"):
        found[f"scale-wise / full-scale, {loss}"] = ratio((SCALE_WISE, loss), (FULL_SCALE, loss))
    for scale in (SCALE_WISE, FULL_SCALE):
        found[f"full loss / MMD alone, {scale}"] = ratio((scale, "full loss"), (scale, "MMD alone"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for name, (median, low, high) in found.items():
        console.out.print(f"{name}: {median:.3g} [{low:.3g}, {high:.3g}]")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/iterations.json"))
    options = parser.parse_args()
    main(options.rounds, options.out)

"""Make tests/golden/mini_losses.json: the losses of twenty iterations of the mini recipe and of twelve in the
paper's form, to full precision.

    OMP_NUM_THREADS=1 python scripts/golden_losses.py

Run it again only when a change is meant to change the numbers, and say in the commit why.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from scalewise.common import console
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.training import setup

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "mini_losses.json"
KEYS = ("mmd", "dmd", "gan", "fake/denoising", "fake/discriminator", "x0/mean", "x0/std")


ITERATIONS = {"mini": 20, "mini-paper": 12}


def recipe(name: str) -> Recipe:
    """A recipe of the mini with small batches and one fake update, in float32."""
    return find_recipe(name).override(
        [f"train.iterations={ITERATIONS[name]}", "train.batch=2", "train.precision=float32",
         "loss.fake.updates=1", "train.checkpoint_every=1000", "train.sample_prompts=[]"]
    )  # fmt: skip


def losses(name: str, folder: Path) -> list[dict[str, float]]:
    """The losses of every iteration of a recipe, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = recipe(name)
        data = setup.prepare_data(chosen, lambda *_: nullcontext(lambda _: None))
        rows = setup.build_trainer(chosen, data, folder).fit()
        return [{key: row[key] for key in KEYS} for row in rows]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    console.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(name, Path(folder) / name) for name in ITERATIONS}
        TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

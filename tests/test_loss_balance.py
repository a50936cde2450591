"""The terms of the full loss pull about equally hard on the mini: none drowns the others."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from scalewise.config.presets import find_recipe
from scalewise.training import setup


@pytest.mark.parametrize("name", ["mini-paper", "mini"])
def test_mmd_and_dmd_pull_within_an_order_of_magnitude_of_each_other(name: str, tmp_path: Path) -> None:
    recipe = find_recipe(name).override(
        ["train.iterations=6", "train.batch=2", "train.precision=float32", "loss.fake.updates=1",
         "train.checkpoint_every=1000", "train.sample_prompts=[]"]
    )  # fmt: skip
    data = setup.prepare_data(recipe, lambda *_: nullcontext(lambda _: None))
    rows = list(setup.build_trainer(recipe, data, tmp_path).fit())
    ratios = [row["mmd/gradient_norm"] / row["dmd/gradient_norm"] for row in rows]
    # Measured over 12 iterations with a batch of 4: 0.35 to 1.56 in the paper's form, 0.52 to 2.53 in the
    # released one. Summed over images and channels, as eq. 2 writes it, MMD is 768 times as strong there.
    assert len(ratios) == 6 and min(ratios) > 0.1 and max(ratios) < 10, ratios

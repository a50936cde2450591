"""Caches shared by several processes, and caches of models whose files changed or moved."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from scalewise.common import checkpoint, console
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe
from scalewise.data import DataError, LatentSet, LatentSetWriter, PromptCache, encode_folder
from scalewise.method.scales import Scale
from scalewise.models import SD3, Condition
from scalewise.training import setup

PROCESSES = 4
CAPTIONS = ["a", "bb", "ccc", "dddd"]


class Slow:
    """A slow model that appends a line to a file for everything it encodes."""

    base, vae_factor, patch, channels = "fake", 2, 2, 3

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger

    def _enter(self, count: int) -> None:
        time.sleep(0.05)
        with self.ledger.open("a") as file:
            file.write(f"{os.getpid()}\n" * count)

    warn_of_truncation_once = staticmethod(nullcontext)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self._enter(len(prompts))
        return Condition({"tokens": torch.tensor([float(len(prompt)) for prompt in prompts]).view(-1, 1)})

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self._enter(len(pixels))
        return F.avg_pool2d(pixels, 2)


def slow_disk() -> None:
    """Delay every flush to disk, so that other processes have time to interfere."""
    sync = checkpoint._sync
    checkpoint._sync = lambda path: (time.sleep(0.05), sync(path))[1]  # type: ignore[func-returns-value]


def build_prompts(folder: Path) -> list[float]:
    cache = PromptCache.build(
        lambda: Slow(folder / "ledger"), CAPTIONS, folder / "prompts", fingerprint="f", batch=1
    )
    return cache.condition(CAPTIONS).tensors["tokens"].flatten().tolist()


def build_images(folder: Path) -> list[float]:
    (data,) = encode_folder(
        Slow(folder / "ledger"),  # type: ignore[arg-type]
        folder / "in",
        folder / "images",
        full=Scale(1, 8, 8),
        scales_for=lambda full: [full],
        vae_key="v",
        batch=1,
    )
    means = data.latents(range(len(data)), Scale(1, 8, 8)).mean(dim=(1, 2, 3))
    return [round(float(mean), 2) for mean in means]


def work(job: Callable[[Path], list[float]], folder: Path, start: Any, results: Any) -> None:
    slow_disk()
    start.wait()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.put(job(folder))
    except BaseException as error:
        results.put(repr(error))


def at_once(job: Callable[[Path], list[float]], folder: Path) -> list[Any]:
    """Return a job's results in several processes that start it at the same moment.

    Forked, since each would import torch for seconds otherwise.
    """
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=work, args=(job, folder, start, results)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_one_of_several_processes_builds_the_prompt_cache_and_the_others_wait(tmp_path):
    assert at_once(build_prompts, tmp_path) == [[1.0, 2.0, 3.0, 4.0]] * PROCESSES
    assert len((tmp_path / "ledger").read_text().split()) == len(CAPTIONS) + 1  # "" among them
    assert [path.name for path in (tmp_path / "prompts").glob(".*")] == []


def test_one_of_several_processes_encodes_a_folder_and_the_others_wait(tmp_path):
    (tmp_path / "in").mkdir()
    for number, level in enumerate((0, 51, 204, 255)):
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text(f"level {level}")
    assert at_once(build_images, tmp_path) == [[-1.0, -0.6, 0.6, 1.0]] * PROCESSES
    assert len((tmp_path / "ledger").read_text().split()) == 4


def test_waiting_for_another_process_warns(tmp_path):
    held = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with FileLock(tmp_path / "prompts.lock"):
            held.set()
            time.sleep(0.5)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    held.wait()
    with pytest.warns(UserWarning, match=r"Another process is writing .*prompts; waiting for it"):
        assert build_prompts(tmp_path) == [1.0, 2.0, 3.0, 4.0]
    process.join()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of a miniature base at `base` and four images at `in`, with a cache of its own."""
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    SD3.tiny().save(tmp_path / "base")
    (tmp_path / "in").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text(f"image {number}")
    return find_recipe("mini").with_values(
        {
            "model.base": str(tmp_path / "base"),
            "data.path": str(tmp_path / "in"),
            "schedule.scales": ["4", "6", "6", "8"],
            "train.batch": 4,
            "train.sample_prompts": [],
        }
    )


def latents(recipe: Recipe) -> torch.Tensor:
    (data,) = setup.prepare_data(recipe, console.progress).sets
    return data.latents(range(4), Scale(1, 8, 8))


def scale_weights(folder: Path, factor: float) -> None:
    """Change every weight of a component; sizes and times stay as they were."""
    for path in folder.glob("*.safetensors"):
        stat = path.stat()
        tensors = {name: value * factor for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_vae_under_the_same_path_is_noticed(tmp_path, recipe):
    before = latents(recipe)
    scale_weights(tmp_path / "base" / "vae", 1.5)
    after = latents(recipe)
    assert torch.equal(after, latents(recipe)) and not torch.allclose(after, before, atol=0.1)


def test_other_text_encoders_under_the_same_path_are_noticed(tmp_path, recipe):
    def embedded() -> torch.Tensor:
        return next(
            iter(setup.prompt_cache(recipe, ["a"], console.progress).condition(["a"]).tensors.values())
        )

    before = embedded()
    scale_weights(tmp_path / "base" / "text_encoder", 1.5)
    scale_weights(tmp_path / "base" / "text_encoder_3", 1.5)
    assert not torch.allclose(embedded(), before, atol=1e-3)


def test_a_base_with_a_new_path_or_a_new_denoiser_uses_the_same_caches(tmp_path, recipe):
    before = latents(recipe)
    made = sorted((tmp_path / "cache").rglob("*.*"))
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    scale_weights(Path(moved) / "transformer", 1.5)
    assert torch.equal(latents(recipe.with_values({"model.base": str(moved)})), before)
    assert sorted((tmp_path / "cache").rglob("*.*")) == made


def test_with_crops_another_batch_size_does_not_encode_a_folder_again(recipe, monkeypatch):
    before = latents(recipe)
    monkeypatch.setattr(SD3, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(latents(recipe.with_values({"train.batch": 2})), before)


def test_two_writers_of_one_dataset_do_not_damage_it(tmp_path):
    def writer() -> LatentSetWriter:
        return LatentSetWriter(
            tmp_path / "set", scales=[Scale(1, 2, 2)], channels=1, kind="synthetic", base="b", settings={},
            shard_rows=2,
        )  # fmt: skip

    def add(to: LatentSetWriter, *rows: int) -> None:
        to.add(rows, ["a"] * len(rows), rows, {Scale(1, 2, 2): torch.ones(len(rows), 1, 2, 2)})

    one, two = writer(), writer()
    add(one, 0, 1)
    with pytest.raises(DataError, match="Another process is writing the dataset"):
        add(two, 0, 1)
    add(one, 2)
    one.finish()
    assert LatentSet.open(tmp_path / "set").seeds(range(3)) == [0, 1, 2]

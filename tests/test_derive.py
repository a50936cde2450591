"""Smaller scales are derived from the full one once, bit for bit as encoded from its latents, and cached."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_run import PROMPTS, make_tiny

from scalewise.common.progress import silent
from scalewise.config.recipe import Recipe
from scalewise.data import DataError, LatentSet, LatentSetWriter, derive
from scalewise.data.derive import derive_batch, derive_scales, encode_all_scales
from scalewise.data.synthetic import generate
from scalewise.method.scales import Scale
from scalewise.models import ModelError, PipelineAdapter, Wan
from scalewise.training import setup

SMALL, MIDDLE, FULL = Scale(1, 4, 4), Scale(1, 6, 6), Scale(1, 8, 8)
OLD = Path(__file__).parent / "data" / "before-0.2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tiny")
        patch.setenv("SCALEWISE_CACHE", str(folder / "cache"))
        yield make_tiny(folder)


@pytest.fixture
def recipe(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe with a cache of its own for every test."""
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    return made


def vae(recipe: Recipe) -> PipelineAdapter:
    return setup.load(recipe, ["vae"])


def cached(tmp_path: Path) -> list[str]:
    """The scales in the cache of the only dataset."""
    return sorted(path.name for path in (tmp_path / "cache" / "scales").glob("*/*") if path.is_dir())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the samples of every batch that is decoded to derive scales."""
    batches, original = list[int](), derive.encode_all_scales

    def recorded(model: Any, latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        batches.append(len(latents))
        return original(model, latents, *args, **options)

    monkeypatch.setattr(derive, "encode_all_scales", recorded)
    return batches


def test_a_generated_set_stores_the_full_scale_and_training_derives_the_others(recipe, tmp_path):
    stored = LatentSet.open(recipe.data.folder)
    assert stored.scales == [FULL] and stored.header.dtype == "float16"
    (data,) = setup.prepare_data(recipe, silent).sets
    assert cached(tmp_path) == ["4x4", "6x6"]
    rows = range(12)  # one batch
    expected = encode_all_scales(vae(recipe), stored.latents(rows, FULL), [SMALL, MIDDLE, FULL])
    for scale, values in expected.items():
        assert torch.equal(data.latents(rows, scale), values.half().float()), scale
    assert data.fingerprint == stored.fingerprint
    # What was stored before was encoded from the samples before they were rounded to float16.
    assert torch.equal(data.latents([7, 2], SMALL), data.latents(rows, SMALL)[[7, 2]])


def test_a_second_schedule_only_derives_its_new_scales_and_a_second_run_none(recipe, tmp_path, monkeypatch):
    batches = counted(monkeypatch)
    setup.open_set(recipe, recipe.data.folder, [SMALL, FULL], silent)
    assert cached(tmp_path) == ["4x4"] and batches == [12]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    setup.open_set(recipe, recipe.data.folder, [SMALL, MIDDLE, FULL], silent)
    assert cached(tmp_path) == ["4x4", "6x6"] and batches == [12, 12]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    monkeypatch.setattr(setup, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    setup.open_set(recipe, recipe.data.folder, [SMALL, MIDDLE], silent)
    assert batches == [12, 12]


def test_a_killed_derivation_resumes_after_its_shards_with_the_same_bits(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(derive, "BATCH", 3)
    monkeypatch.setattr(derive, "SHARD_ROWS", 3)
    straight, killed = (LatentSet.open(recipe.data.folder) for _ in range(2))
    derive_scales(straight, [SMALL, MIDDLE], tmp_path / "straight", lambda: vae(recipe))
    batches = counted(monkeypatch)

    def stop(done: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derive_scales(killed, [SMALL, MIDDLE], tmp_path / "killed", lambda: vae(recipe), on_progress=stop)
    # Killed between the two scales of a batch: one has a shard that the other lacks.
    index = tmp_path / "killed" / "6x6" / "set.json"
    content = json.loads(index.read_text())
    assert [shard["rows"] for shard in content["shards"]] == [3, 3]
    index.write_text(json.dumps(content | {"shards": content["shards"][:1]}))
    derive_scales(killed, [SMALL, MIDDLE], tmp_path / "killed", lambda: vae(recipe))
    assert batches == [3, 3, 3, 3, 3]
    for scale in (SMALL, MIDDLE):
        assert torch.equal(killed.latents(range(12), scale), straight.latents(range(12), scale))


def test_a_damaged_shard_is_derived_again_with_a_warning(recipe, tmp_path):
    data = setup.open_set(recipe, recipe.data.folder, [SMALL], silent)
    before = data.latents(range(12), SMALL)
    [path] = (tmp_path / "cache").rglob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"shard-00000\.arrow .*checksum.*; its latents are derived again"):
        again = setup.open_set(recipe, recipe.data.folder, [SMALL], silent)
    assert torch.equal(again.latents(range(12), SMALL), before)


class Slow:
    """A slow model that appends a line to a file for every sample it decodes."""

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger

    def pixel_size(self, scale: Scale) -> tuple[int, ...]:
        return 2 * scale.height, 2 * scale.width

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        with self.ledger.open("a") as file:
            file.write("decoded\n" * len(latents))
        return latents.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(pixels, 2)


def work(folder: Path, data: LatentSet, start: Any, results: Any) -> None:
    start.wait()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            derive_scales(data, [SMALL, MIDDLE], folder / "derived", lambda: Slow(folder / "ledger"))  # type: ignore[arg-type, return-value]
        results.put(data.latents(range(12), SMALL).tolist())
    except BaseException as error:
        results.put(repr(error))


def test_two_commands_at_once_derive_a_set_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(derive, "BATCH", 2)
    data = LatentSet.open(recipe.data.folder)
    context = multiprocessing.get_context("fork")  # others would import torch for seconds
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=work, args=(tmp_path, data, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    expected = F.interpolate(data.latents(range(12), FULL), (4, 4), mode="area").half().float()
    for values in found:
        torch.testing.assert_close(torch.tensor(values), expected, rtol=2e-3, atol=2e-3)
    assert (tmp_path / "ledger").read_text().count("decoded") == 12


def test_another_vae_is_named_and_has_a_cache_of_its_own(recipe, tmp_path):
    shutil.copytree(recipe.model.base, tmp_path / "base")
    moved = recipe.with_values({"model.base": str(tmp_path / "base")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = setup.open_set(moved, recipe.data.folder, [SMALL], silent)
    for path in (tmp_path / "base" / "vae").glob("*.safetensors"):
        save_file({n: v * 1.5 for n, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"made with another VAE than that of .*Set model\.vae to the VAE"):
        second = setup.open_set(moved, recipe.data.folder, [SMALL], silent)
    assert not torch.allclose(first.latents([0], SMALL), second.latents([0], SMALL), atol=0.05)
    assert cached(tmp_path) == ["4x4", "4x4"]
    shutil.rmtree(tmp_path / "base" / "vae")
    with pytest.raises(ModelError, match="vae"):
        setup.open_set(moved, recipe.data.folder, [SMALL], silent)


def test_a_schedule_that_ends_at_another_size_is_rejected_before_any_work(recipe, monkeypatch):
    monkeypatch.setattr(setup, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for last, scales in (("6x6", "['4', '4', '6', '6']"), ("10x10", "['4', '6', '8', '10']")):
        with pytest.raises(DataError, match=f"has samples of 8x8, but the schedule ends at {last}"):
            setup.prepare_data(recipe.override([f"schedule.scales={scales}"]), silent)
    with pytest.raises(DataError, match="latents at 10x10 cannot be derived"):
        setup.open_set(recipe, recipe.data.folder, [SMALL, Scale(1, 10, 10)], silent)


def test_an_old_set_uses_the_scales_it_stores_and_derives_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    recipe = Recipe.from_yaml(Path("run") / "recipe.yaml")
    before = LatentSet.open("set").latents(range(4), SMALL)
    data = setup.open_set(recipe, Path("set"), [SMALL, MIDDLE, FULL], silent)
    assert cached(tmp_path) == ["6x6"] and torch.equal(data.latents(range(4), SMALL), before)
    full = data.latents(range(4), FULL)
    expected = encode_all_scales(vae(recipe), full, [MIDDLE, FULL])[MIDDLE]
    assert torch.equal(data.latents(range(4), MIDDLE), expected.half().float())


def test_an_old_set_is_extended_at_all_of_its_scales(recipe, tmp_path, monkeypatch):
    model, out, scales = setup.teacher(recipe), tmp_path / "set", [SMALL, MIDDLE, FULL]
    with monkeypatch.context() as patch:
        patch.setattr("scalewise.data.synthetic.scales_to_store", lambda *_: scales)
        list(generate(model, recipe, PROMPTS, out, count=2, batch=2))
    list(generate(model, recipe, PROMPTS, out, count=4, batch=2))
    assert LatentSet.open(out).scales == scales and len(LatentSet.open(out)) == 4


def test_stored_and_derived_latents_only_differ_by_the_rounding_of_the_full_scale(
    recipe, tmp_path, monkeypatch
):
    model, out = setup.teacher(recipe), tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr("scalewise.data.synthetic.scales_to_store", lambda *_: [SMALL, MIDDLE, FULL])
        list(generate(model, recipe, PROMPTS, out, count=12, batch=6))
    before, (now,) = LatentSet.open(out), setup.prepare_data(recipe, silent).sets
    assert torch.equal(before.latents(range(12), FULL), now.latents(range(12), FULL))
    for scale in (SMALL, MIDDLE):
        old, new = (data.latents(range(12), scale) for data in (before, now))
        assert (old - new).abs().max() < 4e-3 * old.std()  # four units in the last place of float16


@pytest.mark.parametrize("small", ["1x4x4", "2x2x4"])
def test_videos_are_derived_along_time_too(tmp_path, small):
    model, scale, full = Wan.tiny(), Scale.parse(small), Scale.parse("3x4x4")
    latents = torch.randn(3, model.channels, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    writer = LatentSetWriter(
        tmp_path / "set", scales=[full], channels=model.channels, kind="synthetic", base="tiny", settings={}
    )
    writer.add(range(3), ["a"] * 3, range(3), {full: latents.float()})
    writer.finish()
    data = LatentSet.open(tmp_path / "set")
    derive_scales(data, [scale], tmp_path / "cache", lambda: model)
    expected = encode_all_scales(model, latents.float(), [scale, full])[scale]
    got = data.latents(range(3), scale)
    assert got.shape == (3, model.channels, scale.frames, *scale.size)
    assert torch.equal(got, expected.half().float())


@pytest.mark.parametrize(
    ("pixels", "batch"), [(128**2, 16), (1024**2, 4), (832 * 1216, 4), (81 * 480 * 832, 1)]
)
def test_fewer_large_samples_are_decoded_at_once(pixels: int, batch: int) -> None:
    assert derive_batch(pixels) == batch


def test_latents_with_nan_and_a_full_disk_are_reported_and_finished_rows_kept(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(derive, "BATCH", 3)
    original: Callable[..., dict[Scale, torch.Tensor]] = derive.encode_all_scales
    calls = list[int]()

    def broken(model: Any, latents: torch.Tensor, scales: Sequence[Scale], **options: Any) -> Any:
        found, _ = original(model, latents, scales, **options), calls.append(len(latents))
        return {scale: values * (torch.nan if len(calls) == 3 else 1) for scale, values in found.items()}

    monkeypatch.setattr(derive, "encode_all_scales", broken)
    data = LatentSet.open(recipe.data.folder)
    with pytest.raises(DataError, match=r"latents at 4x4 of 3 of 3 samples have NaN"):
        derive_scales(data, [SMALL], tmp_path / "derived", lambda: vae(recipe))
    with pytest.warns(UserWarning, match="incomplete: its 6 finished rows"):
        LatentSet.open(tmp_path / "derived" / "4x4")
    derive_scales(data, [SMALL], tmp_path / "derived", lambda: vae(recipe))
    assert calls == [3, 3, 3, 3, 3] and torch.isfinite(data.latents(range(12), SMALL)).all()

"""Datasets in 8 bits: half the disk, errors far below what the VAE loses, and read row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scalewise import mini
from scalewise.common.progress import silent
from scalewise.config.presets import find_recipe
from scalewise.data import DataError, LatentSet, LatentSetWriter
from scalewise.data.header import SetHeader
from scalewise.data.storage import pack, unpack
from scalewise.method.scales import Scale
from scalewise.training import setup

FULL = Scale(1, 16, 16)


def write(path: Path, latents: torch.Tensor, **changes: str) -> Path:
    writer = LatentSetWriter(
        path, scales=[FULL], channels=latents.shape[1], kind="synthetic", base="mini", settings={},
        shard_rows=50, **{"dtype": "int8"} | changes,
    )  # fmt: skip
    rows = range(len(latents))
    writer.add(rows, [f"caption {i}" for i in rows], rows, {FULL: latents})
    writer.finish()
    return path


def bytes_of(path: Path) -> int:
    return sum(shard.bytes for shard in SetHeader.read(path).shards)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return LatentSet.open(mini.DATA, verify=False).latents(range(128), FULL)


def test_eight_bits_halve_the_disk_with_errors_far_below_those_of_the_vae(latents, tmp_path):
    paths = {form: write(tmp_path / form, latents, dtype=form) for form in ("float16", "int8")}
    stored = LatentSet.open(paths["int8"]).latents(range(128), FULL)
    error = stored - latents
    steps = latents.flatten(2).abs().amax(2) / 127
    assert bool((error.flatten(2).abs() <= steps[..., None] * 0.5001).all())
    assert error.square().mean().sqrt() < 0.01 * latents.std()  # measured: 0.0068
    assert bool((error.std((0, 2, 3)) < 0.02 * latents.std((0, 2, 3))).all())  # measured: at most 0.012
    model = setup.load(find_recipe("mini"), ["vae"])
    chosen = slice(0, 16)
    exact, rounded = model.decode(latents[chosen]), model.decode(stored[chosen])
    psnr = 10 * torch.log10(4 / (exact - rounded).square().mean((1, 2, 3)))
    assert psnr.min() > 50  # measured on 128 samples: at least 53; the VAE itself reaches about 30
    assert bytes_of(paths["int8"]) < 0.46 * bytes_of(paths["float16"])  # measured: 0.42


def test_rows_in_eight_bits_are_read_by_themselves_and_zeros_and_videos_are_kept():
    latents = torch.randn(5, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    latents[1, 2] = 0
    latents[2] *= 1e-30
    latents[3] *= 1e3
    cells = pack(latents, "int8")
    whole = unpack(cells, "int8", latents.shape[1:])
    assert whole.shape == latents.shape and bool((whole[1, 2] == 0).all())
    relative = (whole - latents).flatten(1).abs().amax(1) / latents.flatten(1).abs().amax(1)
    assert relative.max() < 0.005
    for row in (4, 0):
        assert torch.equal(unpack([cells[row]], "int8", latents.shape[1:])[0], whole[row])


def test_the_header_names_the_form_and_versions_without_it_reject_it(latents, tmp_path):
    path = write(tmp_path / "set", latents[:60])
    content = json.loads((path / "set.json").read_text())
    assert (content["format"], content["dtype"]) == (2, "int8")
    half = write(tmp_path / "half", latents[:60], dtype="float16")
    content = json.loads((half / "set.json").read_text())
    assert (content["format"], content["dtype"]) == (1, "float16")
    (half / "set.json").write_text(json.dumps(content | {"dtype": "int4"}))
    with pytest.raises(DataError, match="has format 1 with int4, but this version reads formats 1 and 2"):
        LatentSet.open(half)
    with pytest.raises(DataError, match="dtype is 'int8' in the stored dataset and 'float16' now"):
        write(path, latents[:60], dtype="float16")


def test_infinity_is_rejected_when_it_is_written_and_when_it_is_read(latents, tmp_path, monkeypatch):
    bad = latents[:2].clone()
    bad[1, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match="of 1 of 2 samples have NaN, infinity or values beyond float16"):
        write(tmp_path / "bad", bad)
    with monkeypatch.context() as patch:
        patch.setattr("scalewise.data.latent_set.LatentSetWriter._cells", lambda *_: pack(bad, "int8"))
        write(tmp_path / "unchecked", bad)
    with pytest.raises(DataError, match="has NaN or infinity in its latents at 16x16"):
        LatentSet.open(tmp_path / "unchecked")


def test_the_shipped_dataset_in_eight_bits_has_nearly_the_same_smaller_scales(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    recipe = find_recipe("mini").override([f"data.path={write(tmp_path / 'set', latents[:20])}"])
    data = setup.open_set(recipe, recipe.data.folder, recipe.schedule.build().scales, silent)
    stored = LatentSet.open(mini.DATA, verify=False)
    for scale in stored.scales:
        apart = (data.latents(range(20), scale) - stored.latents(range(20), scale)).square().mean().sqrt()
        assert apart < 0.05 * stored.latents(range(20), scale).std(), scale


def test_captions_and_seeds_of_an_eight_bit_set_are_those_given(latents, tmp_path):
    data = LatentSet.open(write(tmp_path / "set", latents[:60]))
    assert data.captions([59, 3]) == ["caption 59", "caption 3"] and data.seeds([59]) == [59]
    order = np.random.default_rng(0).permutation(60).tolist()
    assert torch.equal(data.latents(order, FULL), data.latents(range(60), FULL)[order])

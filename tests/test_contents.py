"""Fingerprints of models and datasets depend on contents, not on paths or times."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import PROMPTS, make_tiny

from scalewise import mini
from scalewise.cli.run_making import run_generate
from scalewise.common.contents import (
    component_fingerprints,
    file_fingerprint,
    local_folder,
    model_fingerprints,
    part_fingerprint,
)
from scalewise.data import DataError, LatentSet, sets_fingerprint
from scalewise.data.header import CONTENTS
from scalewise.training import setup


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini.TEACHER, tmp_path / "base"))


def test_a_base_that_was_moved_and_touched_has_the_same_fingerprints(base):
    before = component_fingerprints(mini.TEACHER)
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= before.keys()
    for path in base.rglob("*"):
        os.utime(path, (1, 1))
    (base / "README.md").write_text("a note")
    (base / "transformer" / "old.bin").write_bytes(b"never loaded")
    assert component_fingerprints(base.rename(base.with_name("moved"))) == before


def test_one_replaced_tensor_changes_only_its_components_fingerprint(base):
    before = component_fingerprints(base)
    (weights,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = min(tensors, key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name] * 1.01
    stat = weights.stat()
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = component_fingerprints(base)
    assert {key for key in before if before[key] != after[key]} == {"vae"}
    assert part_fingerprint(base, "vae") != part_fingerprint(mini.TEACHER, "vae")
    assert part_fingerprint(base, "text", "tok") == part_fingerprint(mini.TEACHER, "text", "tok") != ""


def test_single_components_and_variants_have_fingerprints(tmp_path, base):
    weights = {"a": torch.ones(3)}
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(weights, folder / "model.safetensors")
    plain = component_fingerprints(tmp_path / "one")
    assert list(plain) == [""] and plain == component_fingerprints(tmp_path / "two")
    save_file({"a": torch.zeros(3)}, tmp_path / "two" / "model.fp16.safetensors")
    assert component_fingerprints(tmp_path / "two") == plain  # plain weights are what is loaded
    assert component_fingerprints(tmp_path / "two", variant="fp16") != plain
    assert component_fingerprints("nobody/nothing") == {} and local_folder("no such folder") is None


def test_a_large_file_is_fingerprinted_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    header = b'{"big":{"dtype":"U8","shape":[24000000000],"data_offsets":[0,24000000000]}}'
    with path.open("wb") as file:  # a sparse file of 24 GB; only the header is on disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 24_000_000_000)
    started = time.perf_counter()
    before = file_fingerprint(path)
    assert time.perf_counter() - started < 1
    with path.open("r+b") as file:
        file.seek(8 + len(header) + 12_000_000_000)
        file.write(b"x")
    assert file_fingerprint(path) != before


def test_a_damaged_safetensors_file_has_a_fingerprint_too(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    first = file_fingerprint(path)
    path.write_bytes(b"\xff" * 99 + b"\xfe")
    assert file_fingerprint(path) != first


def test_the_fingerprint_of_a_dataset_depends_on_its_shards_not_its_path(tmp_path):
    data = LatentSet.open(mini.DATA)
    moved = LatentSet.open(shutil.copytree(mini.DATA, tmp_path / "moved"))
    assert moved.fingerprint == data.fingerprint == sets_fingerprint([moved])
    assert sets_fingerprint([data, moved]) != data.fingerprint


def test_a_synthetic_dataset_resumes_with_a_moved_base_but_not_with_a_changed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    recipe, prompts, out = make_tiny(tmp_path), tmp_path / "p.txt", tmp_path / "set"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")

    def generate(base: Path, count: int) -> LatentSet:
        moved = recipe.with_values({"model.base": str(base)})
        run_generate(moved, prompts, count=count, batch=2, seed=0, out=out)
        return LatentSet.open(out)

    assert LatentSet.open(out).settings[CONTENTS] == component_fingerprints(tmp_path / "tiny")
    base = (tmp_path / "tiny").rename(tmp_path / "elsewhere")
    assert len(generate(base, 14)) == 14  # the path is not compared
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no "was generated by another base" either
        moved = recipe.with_values({"model.base": str(base)})
        setup.prepare_data(moved, lambda *_: nullcontext(lambda done: None))
    again = Path(shutil.copytree(base, tmp_path / "tiny"))  # same name, one file differs
    file = again / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"shift": settings["shift"] + 1}), encoding="utf-8")
    with pytest.raises(DataError, match=r"the files of scheduler differ between .* \(stored\)"):
        generate(again, 16)
    assert len(LatentSet.open(out)) == 14


def test_the_fingerprints_of_a_teacher_include_another_vae(tmp_path, base):
    shutil.copytree(base / "vae", tmp_path / "alone")
    assert model_fingerprints(base, tmp_path / "alone") == component_fingerprints(base)
    for path in (tmp_path / "alone").glob("*.safetensors"):
        save_file({name: value * 2 for name, value in load_file(path).items()}, path)
    other = model_fingerprints(base, tmp_path / "alone")
    assert {key for key in other if other[key] != component_fingerprints(base)[key]} == {"vae"}

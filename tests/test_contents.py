"""Fingerprints of models and sets: the content decides, not the path or the time."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalewise import mini
from scalewise.contents import base_contents, file_fingerprint, local_folder, part_fingerprint
from scalewise.data import LatentSet, sets_fingerprint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini.TEACHER, tmp_path / "base"))


def test_a_base_that_was_moved_and_touched_has_the_same_fingerprints(base):
    before = base_contents(mini.TEACHER)
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= before.keys()
    for path in base.rglob("*"):
        os.utime(path, (1, 1))
    (base / "README.md").write_text("a note")
    (base / "transformer" / "old.bin").write_bytes(b"never loaded")
    assert base_contents(base.rename(base.with_name("moved"))) == before


def test_one_exchanged_tensor_shows_in_its_component_alone(base):
    before = base_contents(base)
    (weights,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = min(tensors, key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name] * 1.01
    stat = weights.stat()
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = base_contents(base)
    assert {key for key in before if before[key] != after[key]} == {"vae"}
    assert part_fingerprint(base, "vae") != part_fingerprint(mini.TEACHER, "vae")
    assert part_fingerprint(base, "text", "tok") == part_fingerprint(mini.TEACHER, "text", "tok") != ""


def test_a_component_alone_and_a_variant_are_known(tmp_path, base):
    weights = {"a": torch.ones(3)}
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(weights, folder / "model.safetensors")
    plain = base_contents(tmp_path / "one")
    assert list(plain) == [""] and plain == base_contents(tmp_path / "two")
    save_file({"a": torch.zeros(3)}, tmp_path / "two" / "model.fp16.safetensors")
    assert base_contents(tmp_path / "two") == plain  # plain weights are what is loaded
    assert base_contents(tmp_path / "two", variant="fp16") != plain
    assert base_contents("nobody/nothing") == {} and local_folder("no such folder") is None


def test_a_large_file_is_fingerprinted_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    header = b'{"big":{"dtype":"U8","shape":[24000000000],"data_offsets":[0,24000000000]}}'
    with path.open("wb") as file:  # 24 GB, of which the disk holds nothing but the header
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


def test_a_set_is_known_by_its_shards_wherever_it_lies(tmp_path):
    data = LatentSet.open(mini.DATA)
    moved = LatentSet.open(shutil.copytree(mini.DATA, tmp_path / "moved"))
    assert moved.fingerprint == data.fingerprint == sets_fingerprint([moved])
    assert sets_fingerprint([data, moved]) != data.fingerprint

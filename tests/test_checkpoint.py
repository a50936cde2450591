"""Checkpoints: exact round trips, atomic writes, and rejection of incomplete or damaged ones."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from scalewise.common import checkpoint
from scalewise.common.checkpoint import CheckpointError


def same(one: object, other: object) -> bool:
    """Equality of nested state: types, keys and their order, every bit of tensors and floats."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(
            type(a) is type(b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


def some_state(value: float = 1.0) -> dict[str, object]:
    return {"student": {"a": torch.full((64, 64), float(value))}, "iteration": int(value)}


def write_steps(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(root / f"step-{step:06d}", some_state(step), meta={})


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file short, like a killed write."""
    os.truncate(path, int(path.stat().st_size * keep))


def test_every_type_of_value_is_restored_exactly(tmp_path):
    wide = torch.arange(24.0).reshape(4, 6)
    state = {
        "plain": {"none": None, "yes": True, "number": 7, "large": 10**30, "text": 'é "/" \n'},
        "floats": [0.1, -0.0, 1e-310, math.pi, math.inf, -math.inf, math.nan, 5e-324],
        "nested": ({"betas": (0.9, 0.999)}, [], (), {}, [(1,), [2]]),
        "keys": {0: "int", "0": "text", True: "bool", 2.5: "float", None: "none", (1, "a"): "tuple"},
        "views": [wide.T, wide[1:3], wide[:, ::2], wide, wide, wide[0, 0], torch.ones(3).expand(5, 3)],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int16),
        "a/b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0)},
    }
    checkpoint.save(tmp_path / "step-1", state, meta={"recipe": {"lr": 4e-6}})
    back, meta = checkpoint.load(tmp_path / "step-1")
    assert same(state, back)
    assert meta == {"recipe": {"lr": 4e-6}}


@pytest.mark.parametrize(
    "name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "int64", "bool"]
)
def test_tensors_keep_their_dtype_and_every_bit(tmp_path, name):
    dtype = getattr(torch, name)
    bits = torch.randint(0, 256, (3, 40), dtype=torch.uint8)
    tensor = bits.bool() if dtype is torch.bool else bits.view(dtype)
    checkpoint.save(tmp_path / "step-1", {"x": tensor}, meta={})
    back = checkpoint.load(tmp_path / "step-1")[0]["x"]
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_an_optimizer_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.9))

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = build()
    train(straight, optimizer, range(10))

    model, optimizer = build()
    train(model, optimizer, range(4))
    checkpoint.save(
        tmp_path / "step-4", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, meta={}
    )
    resumed, optimizer = build()
    state, _ = checkpoint.load(tmp_path / "step-4")
    assert list(state["optimizer"]["state"]) == [0, 1]  # int keys, not text
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(4, 10))
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)


def test_changing_loaded_tensors_leaves_the_checkpoint_as_it_is(tmp_path):
    checkpoint.save(tmp_path / "step-1", some_state(), meta={})
    state, _ = checkpoint.load(tmp_path / "step-1")
    state["student"]["a"].zero_()
    assert checkpoint.load(tmp_path / "step-1")[0]["student"]["a"].sum() == 64 * 64


def test_only_safetensors_and_json_are_written(tmp_path):
    checkpoint.save(tmp_path / "step-1", some_state(), meta={"a": 1})
    names = sorted(path.name for path in (tmp_path / "step-1").iterdir())
    assert names == ["manifest.json", "meta.json", "state.json", "tensors.safetensors"]
    for name in names[:3]:
        json.loads((tmp_path / "step-1" / name).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.eye(3).to_sparse()])
def test_unsupported_values_are_rejected_with_their_path(tmp_path, value):
    with pytest.raises(CheckpointError, match="Cannot save fake/0/x"):
        checkpoint.save(tmp_path / "step-1", {"fake": [{"x": value}]}, meta={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "one bit"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, file, damage):
    checkpoint.save(tmp_path / "step-1", some_state(), meta={"a": 1})
    path = tmp_path / "step-1" / file
    if damage == "truncated":
        truncate(path)
    elif damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[content.rindex(b":") + 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-1.*Delete it and resume from an earlier one"):
        checkpoint.load(tmp_path / "step-1")
    with pytest.warns(UserWarning, match="step-1"):
        assert checkpoint.latest(tmp_path) is None


def test_the_message_names_the_file_and_both_sizes(tmp_path):
    checkpoint.save(tmp_path / "step-1", some_state(), meta={})
    path = tmp_path / "step-1" / "tensors.safetensors"
    size = path.stat().st_size
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=f"tensors.safetensors has 100 bytes instead of {size:,}"):
        checkpoint.load(tmp_path / "step-1")


def test_a_missing_checkpoint_is_reported_as_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*step-7"):
        checkpoint.load(tmp_path / "step-7")
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_latest_returns_the_highest_step_that_is_not_damaged(tmp_path):
    write_steps(tmp_path, 9, 100, 1000000)
    (tmp_path / "step-final").mkdir()
    (tmp_path / "step-2000000").write_text("a file")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    truncate(tmp_path / "step-1000000" / "tensors.safetensors")
    with pytest.warns(UserWarning, match="step-1000000 is damaged: tensors.safetensors has"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000100"


@pytest.mark.parametrize("moment", ["save_file", "_write", "_swap_in"])
def test_a_half_written_checkpoint_is_never_loaded(tmp_path, moment):
    """A process is killed (SIGKILL) while it writes its second checkpoint, at three moments."""
    script = f"""
import os, signal, torch
from pathlib import Path
from scalewise.common import checkpoint
root = Path({str(tmp_path)!r})
checkpoint.save(root / "step-000001", {{"x": torch.ones(100)}}, meta={{}})
original = checkpoint.{moment}
def cut(*arguments):
    if {moment!r} != "_swap_in":
        original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.{moment} = cut
checkpoint.save(root / "step-000002", {{"x": torch.zeros(100)}}, meta={{}})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000002.tmp", "step-000001"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    checkpoint.save(tmp_path / "step-1", some_state(1), meta={})
    checkpoint.save(tmp_path / "step-1", some_state(2), meta={"second": True})
    state, meta = checkpoint.load(tmp_path / "step-1")
    assert state["iteration"] == 2 and meta == {"second": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("look", [checkpoint.latest, lambda root: root / "step-1"])
def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch, look):
    checkpoint.save(tmp_path / "step-1", some_state(1), meta={})
    (tmp_path / "step-1").rename(tmp_path / ".step-1.old")  # the state after such a kill
    (tmp_path / ".step-1.tmp").mkdir()
    assert checkpoint.load(look(tmp_path))[0]["iteration"] == 1


def test_a_failed_replacement_puts_the_earlier_checkpoint_back(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "step-1", some_state(1), meta={})
    original = os.replace

    def fail(source, target):
        if Path(source).name.endswith(".tmp") and Path(target).name == "step-1":
            raise OSError(errno.EIO, "Input/output error")
        return original(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written .*Input/output"):
        checkpoint.save(tmp_path / "step-1", some_state(2), meta={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.load(tmp_path / "step-1")[0]["iteration"] == 1


def full_disk_in_safetensors(monkeypatch):
    def fail(*_arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)


def full_disk_in_text(monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", fail)


def full_disk_in_fsync(monkeypatch):
    def fail(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("fill", [full_disk_in_safetensors, full_disk_in_text, full_disk_in_fsync])
def test_a_full_disk_is_reported_and_keeps_earlier_checkpoints(tmp_path, monkeypatch, fill):
    write_steps(tmp_path, 1)
    with monkeypatch.context() as patched:
        fill(patched)
        with pytest.raises(
            CheckpointError, match=r"disk is full.*step-000002 needs 16,\d+ bytes and [\d,]+ are free"
        ):
            write_steps(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"


def test_prune_keeps_the_newest_complete_ones(tmp_path):
    write_steps(tmp_path, 1, 2, 3, 4, 10)
    truncate(tmp_path / "step-000010" / "tensors.safetensors")
    (tmp_path / "notes").mkdir()
    checkpoint.prune(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes", "step-000003", "step-000004", "step-000010"]
    with pytest.raises(CheckpointError, match="checkpoints to keep must be at least 1; got 0"):
        checkpoint.prune(tmp_path, 0)


def test_a_failed_write_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "step-000001", {"a": torch.ones(3)}, meta={})

    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(checkpoint, "_write", too_large)
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be written \(.*File too large"):
        checkpoint.save(tmp_path / "step-000002", {"a": torch.ones(3)}, meta={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]

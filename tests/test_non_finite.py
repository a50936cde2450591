"""Weights, latents and pixels with NaN or infinity are rejected when read and when written."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import scalewise
from scalewise import mini
from scalewise.cli import main
from scalewise.common.images import to_bytes
from scalewise.data import DataError, LatentSet, LatentSetWriter, PromptCache, latent_set
from scalewise.method.scales import Scale
from scalewise.models import Condition
from scalewise.models.lora import StudentError, load_student, write_student

SCALE = Scale(1, 4, 4)


def broken_student(path: Path, value: float = float("nan")) -> Path:
    """The mini's student with one weight of one layer replaced."""
    with safe_open(mini.STUDENT, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(mini.STUDENT)
    name = max(tensors)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_with_nan_or_infinity_is_rejected_by_every_loader(tmp_path, value, capsys):
    path = broken_student(tmp_path / "student.safetensors", value)
    words = rf"student {path} has NaN or infinity in 1 of its \d+ weights, for example "
    with pytest.raises(StudentError, match=words):
        load_student(path)
    with pytest.raises(StudentError, match=words):
        scalewise.load("mini", student=str(path))
    for arguments in (
        ["sample", "a dog", "--student", str(path), "--out", str(tmp_path / "drawn")],
        ["export", str(path), str(tmp_path / "out.safetensors")],
        ["evaluate", "mini", f"student:{path}", "--out", str(tmp_path / "judged")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code != 0 and "NaN or infinity" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.rglob("*.png"))


def test_a_student_that_overflows_half_precision_is_not_saved(tmp_path):
    good = load_student(mini.STUDENT)
    name = max(good.tensors)
    large = replace(good, tensors=good.tensors | {name: good.tensors[name] + 1e5})
    with pytest.raises(StudentError, match=r"was not written .*infinity in 1 of its"):
        write_student(tmp_path / "student.safetensors", large)
    assert list(tmp_path.iterdir()) == []
    write_student(tmp_path / "student.safetensors", large, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
    with pytest.raises(StudentError, match="NaN or infinity"):
        replace(good, tensors=good.tensors | {name: good.tensors[name] * float("nan")})


def test_a_dataset_with_nan_or_infinity_is_rejected_when_opened(tmp_path, monkeypatch):
    def write(path: Path, spoil: bool) -> Path:
        writer = LatentSetWriter(
            path, scales=[SCALE], channels=2, kind="synthetic", base="b", settings={}, shard_rows=2
        )
        values = torch.zeros(4, 2, 4, 4)
        with monkeypatch.context() as patched:
            if spoil:
                values[3, 1, 2, 2] = float("inf")
                patched.setattr(latent_set.torch, "isfinite", torch.ones_like)
            writer.add(range(4), ["a"] * 4, range(4), {SCALE: values})
            writer.finish()
        return path

    assert len(LatentSet.open(write(tmp_path / "good", spoil=False))) == 4
    with pytest.raises(DataError, match=r"shard-00001.arrow has NaN or infinity in its latents at 4x4"):
        LatentSet.open(write(tmp_path / "bad", spoil=True))


def test_a_teacher_that_generates_nan_keeps_the_earlier_samples_of_the_dataset(tmp_path):
    writer = LatentSetWriter(
        tmp_path, scales=[SCALE], channels=2, kind="synthetic", base="b", settings={}, shard_rows=8
    )
    writer.add([0], ["a"], [0], {SCALE: torch.zeros(1, 2, 4, 4)})
    values = torch.zeros(3, 2, 4, 4)
    values[1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"at 4x4 of 1 of 3 samples have NaN, infinity"):
        writer.add([1, 2, 3], ["a"] * 3, [1, 2, 3], {SCALE: values})
    writer.finish()
    assert LatentSet.open(tmp_path).seeds([0]) == [0]
    assert json.loads((tmp_path / "set.json").read_text())["shards"][0]["rows"] == 1


def test_embeddings_with_nan_are_not_cached(tmp_path):
    class Overflowing:
        warn_of_truncation_once = staticmethod(nullcontext)

        def encode_prompts(self, prompts):
            return Condition(
                {"tokens": torch.tensor([[len(p) / 1.0 if p else float("nan")] for p in prompts])}
            )

    with pytest.raises(DataError, match=r"embedding of the prompt '' has NaN or infinity"):
        PromptCache.build(Overflowing, ["a"], tmp_path / "p", fingerprint="f")
    assert PromptCache.open(tmp_path / "p", fingerprint="f").missing(["a"]) == ["", "a"]


def test_pixels_with_nan_do_not_become_black_images():
    pixels = torch.zeros(3, 3, 2, 2)
    assert (to_bytes(pixels) == 128).all()
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"1 of 3 generated samples have NaN or infinity, the first .* number 2"
    ):
        to_bytes(pixels)


def test_the_pipeline_does_not_return_latents_or_images_of_nan():
    pipe = scalewise.load("mini")
    with torch.no_grad():
        next(pipe.transformer.parameters()).view(-1)[0] = float("nan")
    for kind in ("latent", "np"):
        with pytest.raises(ValueError, match="1 of 1 generated samples have NaN or infinity"):
            pipe("a dog", seed=0, output_type=kind)

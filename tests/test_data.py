"""Latent datasets and prompt caches on disk: exact, resumable, damage is reported."""

from __future__ import annotations

import errno
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from scalewise.data import DataError, LatentSet, LatentSetWriter, PromptCache, latent_set
from scalewise.method.adapter import Condition
from scalewise.method.scales import Scale

SCALES = [Scale(1, 4, 6), Scale(1, 8, 12)]
CHANNELS = 3


def latents_of(indices: Sequence[int], scales: Sequence[Scale] = SCALES) -> dict[Scale, torch.Tensor]:
    """Latents [N, C, (T,) H, W] that depend on each sample's index alone."""
    video = any(scale.frames > 1 for scale in scales)

    def sample(index: int, scale: Scale) -> torch.Tensor:
        return torch.randn(
            scale.shape(1, CHANNELS, video=video)[1:], generator=torch.Generator().manual_seed(index)
        )

    return {scale: torch.stack([sample(i, scale) for i in indices]) for scale in scales}


def writer_at(path: Path, **changes: Any) -> LatentSetWriter:
    options = {"scales": SCALES, "channels": CHANNELS, "kind": "synthetic", "base": "mini", "shard_rows": 4}
    return LatentSetWriter(path, **options | {"settings": {"guidance": 4.5, "steps": 28}} | changes)


def add(writer: LatentSetWriter, indices: Sequence[int]) -> None:
    captions = [f"caption {i % 3}" for i in indices]
    writer.add(indices, captions, [100 + i for i in indices], latents_of(indices, writer.header.scales))


def make_set(path: Path, rows: int = 10, **changes: Any) -> Path:
    writer = writer_at(path, **changes)
    for index in range(0, rows, 2):
        add(writer, [index, index + 1])
    writer.finish()
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_latents_are_restored_exactly_as_float16(tmp_path):
    data = LatentSet.open(make_set(tmp_path / "set"))
    assert len(data) == 10 and data.scales == SCALES and data.settings == {"guidance": 4.5, "steps": 28}
    chosen = [7, 0, 9, 0]
    for scale, expected in latents_of(chosen).items():
        got = data.latents(chosen, scale)
        assert got.dtype == torch.float32 and got.shape == (4, CHANNELS, *scale.size)
        assert torch.equal(got, expected.half().float())
    assert data.captions([4, 3]) == ["caption 1", "caption 0"]
    assert data.unique_captions() == ["caption 0", "caption 1", "caption 2"]
    assert data.seeds([9, 2]) == [109, 102]
    assert torch.equal(data.latents(torch.tensor([7]), SCALES[0]), data.latents([7], SCALES[0]))


def test_video_latents_keep_their_frame_axis_even_with_one_frame(tmp_path):
    scales = [Scale(1, 2, 3), Scale(3, 4, 6)]
    data = LatentSet.open(make_set(tmp_path / "set", scales=scales))
    assert data.latents([0, 1], scales[0]).shape == (2, CHANNELS, 1, 2, 3)
    assert torch.equal(data.latents([5], scales[1]), latents_of([5], scales)[scales[1]].half().float())


def test_thirty_two_rows_are_read_in_a_few_milliseconds(tmp_path):
    scale = Scale(1, 32, 32)
    writer = writer_at(tmp_path / "set", scales=[scale], channels=16, shard_rows=64)
    values = torch.randn(256, 16, 32, 32)
    writer.add(range(256), [""] * 256, range(256), {scale: values})
    writer.finish()
    data = LatentSet.open(tmp_path / "set")
    best = 1.0
    for _ in range(10):
        chosen = random.sample(range(256), 32)
        started = time.perf_counter()
        read = data.latents(chosen, scale)
        best = min(best, time.perf_counter() - started)
        assert torch.equal(read, values[chosen].half().float())
    assert best < 0.02  # measured: 0.3 ms


def test_a_killed_writer_resumes_after_its_last_finished_shard(tmp_path):
    path = tmp_path / "set"
    add(writer_at(path), range(10))  # not finished, like a killed writer
    (path / ".shard-00002.arrow.tmp").write_text("half a shard")
    with pytest.warns(UserWarning, match="incomplete: its 8 finished rows are used"):
        assert len(LatentSet.open(path)) == 8
    writer = writer_at(path)
    assert writer.done == 8 and writer.missing(11) == [8, 9, 10]
    add(writer, [8, 9, 10])
    assert writer.done == 8 and writer.missing(11) == []
    writer.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = LatentSet.open(path)
    straight = LatentSet.open(make_set(tmp_path / "straight", rows=12))
    for scale in SCALES:
        assert torch.equal(data.latents(range(11), scale), straight.latents(range(11), scale))
    assert sorted(p.name for p in path.iterdir()) == [
        ".lock",
        "set.json",
        *(f"shard-0000{i}.arrow" for i in range(3)),
    ]


def test_a_shard_that_was_written_but_not_listed_is_made_again(tmp_path):
    path = make_set(tmp_path / "set", rows=8)
    index = json.loads((path / "set.json").read_text())
    index |= {"shards": index["shards"][:1], "complete": False}
    (path / "set.json").write_text(json.dumps(index))
    writer = writer_at(path)
    assert writer.done == 4
    add(writer, writer.missing(8))
    writer.finish()
    assert len(LatentSet.open(path)) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"settings": {"guidance": 7.0, "steps": 28}},
            "settings.guidance is 4.5 in the stored dataset and 7.0 now",
        ),
        ({"settings": {"guidance": 4.5}}, "settings.steps is 28 in the stored dataset and None now"),
        ({"scales": SCALES[:1]}, "scales is '4x6 8x12' in the stored dataset and '4x6' now"),
        ({"base": "other"}, "base is 'mini' in the stored dataset and 'other' now"),
    ],
)
def test_a_writer_with_other_settings_is_rejected_with_the_difference(tmp_path, change, words):
    make_set(tmp_path / "set")
    with pytest.raises(DataError, match=words):
        writer_at(tmp_path / "set", **change)


def test_a_finished_set_can_be_finished_again_and_extended(tmp_path):
    path = make_set(tmp_path / "set", rows=6)
    writer = writer_at(path, settings={"steps": 28, "guidance": 4.5}, shard_rows=2)
    writer.finish()
    assert writer.done == 6
    add(writer, writer.missing(9))
    writer.flush()
    with pytest.warns(UserWarning, match="its 9 finished rows are used"):
        LatentSet.open(path)
    writer.finish()
    assert LatentSet.open(path).seeds(range(9)) == list(range(100, 109))


def test_a_corrupt_shard_is_named_with_the_remedy_and_the_remedy_works(tmp_path):
    path = make_set(tmp_path / "set")
    before = LatentSet.open(path).latents(range(10), SCALES[1])
    flip_a_bit(path / "shard-00001.arrow")
    for act in (lambda: LatentSet.open(path), lambda: writer_at(path)):
        with pytest.raises(
            DataError, match=r"shard-00001.arrow .*checksum.*delete it and run .*generate.* it resumes"
        ):
            act()
    (path / "shard-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"shard-00001.arrow is missing"):
        LatentSet.open(path)
    with pytest.warns(UserWarning, match=r"shard-00001.arrow is missing: its 4 rows"):
        writer = writer_at(path)
    assert writer.missing(10) == [4, 5, 6, 7]
    add(writer, writer.missing(10))
    writer.finish()
    assert torch.equal(LatentSet.open(path).latents(range(10), SCALES[1]), before)


def test_a_truncated_shard_is_found_even_without_checksums(tmp_path):
    path = make_set(tmp_path / "set")
    os.truncate(path / "shard-00002.arrow", 100)
    with pytest.raises(DataError, match=r"shard-00002.arrow has 100 bytes instead of"):
        LatentSet.open(path, verify=False)


def test_rows_are_ordered_by_index_not_by_the_order_of_writing(tmp_path):
    writer = writer_at(tmp_path / "set")
    for indices in ([5, 2], [7, 0, 1], [6], [3, 4]):
        add(writer, indices)
    writer.finish()
    data = LatentSet.open(tmp_path / "set")
    assert data.seeds(range(8)) == list(range(100, 108))
    assert torch.equal(data.latents(range(8), SCALES[0]), latents_of(range(8))[SCALES[0]].half().float())


def test_missing_and_incomplete_datasets_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"There is no dataset .*nowhere"):
        LatentSet.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no set\.json"):
        LatentSet.open(tmp_path)
    path = make_set(tmp_path / "set")
    with pytest.raises(DataError, match=r"samples of 8x12, from which latents at 16x16 cannot be derived"):
        LatentSet.open(path).latents([0], Scale(1, 16, 16))
    with pytest.raises(DataError, match=r"no latents at 4x4, only at 4x6, 8x12\. Open it with .*open_set"):
        LatentSet.open(path).latents([0], Scale(1, 4, 4))
    (path / "set.json").write_text('{"format": 1, "shards"')
    with pytest.raises(DataError, match=r"set\.json is not valid JSON"):
        LatentSet.open(path)
    writer_at(tmp_path / "empty").header.write(tmp_path)
    with pytest.raises(DataError, match=r"is empty; run .*generate"):
        LatentSet.open(tmp_path)
    with pytest.raises(DataError, match="would be empty"):
        writer_at(tmp_path / "empty").finish()


def test_bad_samples_are_rejected_before_they_are_written(tmp_path):
    writer = writer_at(tmp_path / "set")
    add(writer, [0])
    with pytest.raises(DataError, match=r"Samples \[0\] would be stored twice"):
        add(writer, [0, 1])
    with pytest.raises(DataError, match=r"8x12 have the shape \[1, 3, 8, 8\] instead of \[1, 3, 8, 12\]"):
        writer.add([1], [""], [1], latents_of([1]) | {SCALES[1]: torch.zeros(1, 3, 8, 8)})
    with pytest.raises(DataError, match="NaN, infinity or values beyond float16"):
        writer.add([1], [""], [1], latents_of([1]) | {SCALES[1]: torch.full((1, 3, 8, 12), 1e5)})
    with pytest.raises(DataError, match="8x12 are missing"):
        writer.add([1], [""], [1], {SCALES[0]: latents_of([1])[SCALES[0]]})
    add(writer, [1])
    writer.finish()
    assert len(LatentSet.open(tmp_path / "set")) == 2


def test_a_full_disk_leaves_no_half_written_shard_in_the_index(tmp_path, monkeypatch):
    path = tmp_path / "set"
    writer = writer_at(path)
    add(writer, range(6))

    def fail(target: Path, table: pa.Table) -> None:
        target.write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(latent_set, "_write_arrow", fail)
        with pytest.raises(
            DataError, match=r"disk is full: .* needs [\d,]+ bytes and [\d,]+ are free. The 4 rows"
        ):
            add(writer, range(6, 9))
    assert sorted(p.name for p in path.iterdir()) == [".lock", "set.json", "shard-00000.arrow"]
    assert writer_at(path).missing(9) == [4, 5, 6, 7, 8]
    writer.finish()  # space was freed: the same writer still has the rows
    assert LatentSet.open(path).seeds(range(9)) == list(range(100, 109))


class Prompts:
    """Encodes a prompt by its length, and records the prompts."""

    warn_of_truncation_once = staticmethod(nullcontext)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.asked: list[str] = []
        self.dtype = dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self.asked += prompts
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=self.dtype)
        mask = lengths.view(-1, 1) > 0
        return Condition({"tokens": lengths.view(-1, 1, 1).expand(-1, 3, 2), "mask": mask})


def test_each_prompt_is_encoded_once_and_restored_exactly(tmp_path):
    model, seen = Prompts(), []
    prompts, done = ["bb", "a", "bb", "cccc"], seen.append
    cache = PromptCache.build(
        lambda: model, prompts, tmp_path / "p", fingerprint="f", batch=2, on_progress=done
    )
    assert model.asked == ["", "bb", "a", "cccc"] and seen == [2, 4] and len(cache) == 4
    cond = cache.condition(["cccc", "", "cccc", "a"])
    assert len(cond) == 4 and cond.tensors["tokens"].dtype == torch.bfloat16
    assert cond.tensors["tokens"].shape == (4, 3, 2)
    assert cond.tensors["tokens"][:, 0, 0].tolist() == [4, 0, 4, 1]
    assert cond.tensors["mask"].flatten().tolist() == [True, False, True, True]
    assert cache.uncond(3).tensors["tokens"].abs().sum() == 0 and len(cache.uncond(3)) == 3
    with pytest.raises(DataError, match="'dog' is not in the cache"):
        cache.condition(["a", "dog"])


def test_a_prompt_cache_is_reused_extended_and_replaced(tmp_path):
    PromptCache.build(lambda: Prompts(), ["a", "bb"], tmp_path, fingerprint="f")
    again, more, other = Prompts(), Prompts(), Prompts(torch.float32)
    PromptCache.build(lambda: again, ["bb", "a"], tmp_path, fingerprint="f")
    assert again.asked == []
    assert PromptCache.open(tmp_path, fingerprint="f").missing(["a", "ccc"]) == ["ccc"]
    cache = PromptCache.build(lambda: more, ["ccc", "a"], tmp_path, fingerprint="f")
    assert more.asked == ["ccc"]
    assert cache.condition(["bb", "ccc"]).tensors["tokens"][:, 0, 0].tolist() == [2, 3]
    assert PromptCache.open(tmp_path, fingerprint="g").missing(["a"]) == ["", "a"]
    cache = PromptCache.build(lambda: other, ["a"], tmp_path, fingerprint="g")
    assert other.asked == ["", "a"] and cache.condition(["a"]).tensors["tokens"].dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts-00000.safetensors", "prompts.json"]


def test_a_damaged_prompt_file_is_encoded_again_and_a_killed_build_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("scalewise.data.encode.SHARD_BYTES", 1)  # a file for every batch
    stopped = Prompts()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stopped, "asked", Stop(after=2))
        PromptCache.build(lambda: stopped, ["a", "bb", "ccc"], tmp_path, fingerprint="f", batch=1)
    assert PromptCache.open(tmp_path, fingerprint="f").missing(["a", "bb", "ccc"]) == ["bb", "ccc"]
    PromptCache.build(lambda: Prompts(), ["a", "bb", "ccc"], tmp_path, fingerprint="f", batch=1)
    flip_a_bit(tmp_path / "prompts-00001.safetensors")
    model = Prompts()
    with pytest.warns(UserWarning, match=r"prompts-00001.safetensors .*encoded again"):
        cache = PromptCache.build(lambda: model, ["a", "bb", "ccc"], tmp_path, fingerprint="f", batch=1)
    assert model.asked == ["a"]
    assert cache.condition(["a", "ccc", "bb"]).tensors["tokens"][:, 0, 0].tolist() == [1, 3, 2]


class Stop(list):
    """A list that raises KeyboardInterrupt when it would grow beyond `after` items."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def __iadd__(self, items: Sequence[str]) -> Stop:
        if len(self) >= self.after:
            raise KeyboardInterrupt
        self.extend(items)
        return self

"""`scalewise distill` in two gloo processes: rows read by each, files written by one, and equal students."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny_run import make_tiny

from scalewise.cli import main
from scalewise.data import LatentSet
from scalewise.models.lora import load_student
from scalewise.training.trainer import Trainer

WORLD, BATCH, ROWS, ITERATIONS = 2, 2, 12, 3


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(rank: int, folder: Path, port: int) -> None:
    """Set torchrun's variables and run the command; record rows read and weights at every checkpoint."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["SCALEWISE_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    read: list[list[int]] = []
    weights: dict[str, torch.Tensor] = {}
    captions, save = LatentSet.captions, Trainer.save

    def note_rows(self: LatentSet, indices: Any) -> list[str]:
        if len(indices) != ROWS:  # all rows are read once, to embed their captions
            read.append(list(map(int, indices)))
        return captions(self, indices)

    def note_weights(self: Trainer) -> Path:
        weights.update({name: p.detach().clone() for name, p in self.backbone.parameters("student").items()})
        return save(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentSet, "captions", note_rows)
        patch.setattr(Trainer, "save", note_weights)
        with pytest.raises(SystemExit) as end:
            main(["distill", str(folder / "recipe.yaml"), "--out", str(folder / "run")])
    assert not end.value.code
    torch.save({"read": read, "weights": weights}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three iterations, each one update of the fake model and one of the student."""
    folder = tmp_path_factory.mktemp("two")
    recipe = make_tiny(folder).override(
        [f"train.batch={BATCH}", f"train.iterations={ITERATIONS}", "loss.fake.updates=1",
         "train.sample_prompts=[]", "optimizer.lr=0.01"]
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    mp.spawn(start, (folder, free_port()), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def ranks(run: Path) -> list[dict[str, Any]]:
    return [torch.load(run / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_two_training_processes_read_different_rows_and_together_all_of_them(ranks) -> None:
    """Six batches of two rows by two processes: two passes over twelve rows."""
    first, second = (found["read"] for found in ranks)
    assert [len(rows) for rows in first + second] == [BATCH] * 4 * ITERATIONS
    together = [[*one, *other] for one, other in zip(first, second, strict=True)]
    assert all(len(set(rows)) == WORLD * BATCH for rows in together)
    for part in (together[:3], together[3:]):
        assert sorted(row for rows in part for row in rows) == [*range(ROWS)]


def test_two_training_processes_have_bit_identical_students(ranks) -> None:
    one, other = (found["weights"] for found in ranks)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_of_two_training_processes_writes_the_run(run: Path) -> None:
    log = [json.loads(line) for line in (run / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["iteration"] for row in log] == [1, 2, 3]
    assert len(list((run / "run" / "tensorboard").iterdir())) == 1
    assert len(load_student(run / "run").tensors) > 10

"""Two gloo processes give the same results as one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from scalewise.cli import main
from scalewise.common import distributed
from scalewise.common.images import read_image
from scalewise.data import LatentSet

WORLD = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(rank: int, folder: Path, port: int, port_later: int) -> None:
    """Run in each process: set torchrun's variables, do the work, save its results."""
    with pytest.MonkeyPatch.context() as patch:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
        for name, value in environment.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        torch.set_num_threads(1)
        assert distributed.init_from_env("cpu") == torch.device("cpu")
        assert distributed.init_from_env("cpu") == torch.device("cpu")  # a second call changes nothing
        torch.save(
            {
                "share": gradients_of_a_share(),
                "odd": odd_gradients(rank),
                "any": [distributed.any_of(rank == 1), distributed.any_of(False)],
                "rows": distributed.gather_rows({"n": torch.tensor(distributed.split(5)).float()[:, None]}),
            },
            folder / f"{rank}.pt",
        )
        distributed.barrier()
        evaluate(folder / "evaluation")  # destroys the group
        patch.setenv("MASTER_PORT", str(port_later))
        generate(folder / "set")


FLOAT32 = "train.precision=float32"
"""Batch sizes differ between processes, and bfloat16 products are rounded differently for each batch size."""


def evaluate(out: Path) -> None:
    run("evaluate", "mini", FLOAT32, "undistilled", "teacher:1", "--count", "5", "--each", "2",
        "--batch", "3", "--no-speed", "--out", str(out))  # fmt: skip


def generate(out: Path) -> None:
    run("generate", "mini", FLOAT32, "teacher.steps=2", "--count", "5", "--batch", "2", "--out", str(out))


def run(*arguments: str) -> None:
    """The work of a command in any number of processes."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert not end.value.code


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two processes, which are started once because that takes seconds."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(start, (folder, free_port(), free_port()), nprocs=WORLD)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    return [{**numbers, "folder": folder} for numbers in found]


def model_and_data() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(12, 7, dtype=torch.float64)


def gradients_of_a_share() -> list[torch.Tensor]:
    model, data = model_and_data()
    model(data[list(distributed.split(len(data)))]).square().mean().backward()
    distributed.mean_gradients(model.parameters())
    return [parameter.grad for parameter in model.parameters()]


def test_two_processes_have_the_mean_gradient_of_the_whole_batch(results):
    model, data = model_and_data()
    model(data).square().mean().backward()
    for result in results:
        for mine, theirs in zip(model.parameters(), result["share"], strict=True):
            assert torch.allclose(mine.grad, theirs, rtol=0, atol=1e-15)


def odd_gradients(rank: int) -> dict[str, Any]:
    """One gradient on both ranks, one on rank 0 only, one on neither; a bfloat16 one; numbers; the rest."""
    both, first, none = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    both.grad = torch.full((3, 2), float(rank)).T  # not contiguous
    half.grad = torch.full((4,), 3.0 * rank, dtype=torch.bfloat16)
    if rank == 0:
        first.grad = torch.full((2, 3), 8.0)
    distributed.mean_gradients(parameter for parameter in (both, first, none, half))
    numbers = distributed.mean_scalars({"b": rank, "a": 10.0 * rank, "nan": float("nan") if rank else 1.0})
    return {
        "gradients": [both.grad, first.grad, half.grad],
        "none": none.grad is None,
        "numbers": numbers,
        "who": (distributed.rank(), distributed.world(), distributed.is_main()),
        "split": list(distributed.split(5)),
    }


def test_missing_gradients_count_as_zero_and_numbers_are_averaged(results):
    for rank, result in enumerate(each["odd"] for each in results):
        both, first, half = result["gradients"]
        assert both.shape == (2, 3) and torch.equal(both, torch.full((2, 3), 0.5))
        assert torch.equal(first, torch.full((2, 3), 4.0))
        assert half.dtype == torch.bfloat16 and half.tolist() == [1.5] * 4
        assert result["none"]  # None in every process stays None, as in one process
        numbers = result["numbers"]
        assert list(numbers) == ["b", "a", "nan"] and numbers["b"] == 0.5 and numbers["a"] == 5.0
        assert numbers["nan"] != numbers["nan"]  # every process gets the NaN of one process
        assert result["who"] == (rank, 2, rank == 0)
        assert result["split"] == [[0, 2, 4], [1, 3]][rank]


def test_a_single_process_sends_nothing_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init_from_env("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    parameter, untouched = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    parameter.grad = gradient = torch.tensor([1.0, 2.0])
    distributed.mean_gradients([parameter, untouched])
    assert parameter.grad is gradient and gradient.tolist() == [1.0, 2.0] and untouched.grad is None
    assert distributed.mean_scalars({"loss": 2}) == {"loss": 2.0}
    assert distributed.split(3) == range(3)
    distributed.barrier()
    distributed.shutdown()


def test_torchrun_with_one_process_needs_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.init_from_env("cpu")
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_rejected_with_the_remedy(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"Process 3 .* there are 2. Start torchrun with --nproc-per-node 2"):
        distributed.init_from_env("cuda")


def test_a_process_has_the_gpu_of_its_number_and_without_gpus_the_cpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there, expected in ((True, torch.device("cuda", 1)), (False, torch.device("cpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert distributed.device() == expected


def test_any_of_reports_a_flag_of_one_process_to_all(results):
    assert [found["any"] for found in results] == [[True, False]] * WORLD
    assert distributed.any_of(True) and not distributed.any_of(False)


def test_rows_of_all_processes_are_gathered_in_order_in_the_first_one(results):
    assert results[0]["rows"]["n"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert results[1]["rows"] is None
    alone = distributed.gather_rows({"n": torch.arange(3)})
    assert alone is not None and alone["n"].tolist() == [0, 1, 2]


def test_an_evaluation_by_two_processes_equals_that_of_one(results, tmp_path, capsys):
    evaluate(tmp_path)
    there = results[0]["folder"] / "evaluation"
    ours, theirs = (json.loads((folder / "figures.json").read_text()) for folder in (tmp_path, there))
    assert [row["name"] for row in ours] == [row["name"] for row in theirs]
    assert "spectrum" in ours[0]["values"] and "diversity" in ours[0]["values"]
    for own, other in zip(ours, theirs, strict=True):
        for part in ("values", "differences"):
            for metric, interval in own[part].items():
                ends = other[part][metric]  # None where 5 prompts are too few for an interval
                assert [end is None for end in ends] == [end is None for end in interval]
                known = [end for end in interval if end is not None]
                assert [e for e in ends if e is not None] == pytest.approx(known, rel=1e-3, abs=2e-3), metric
    for name in ("undistilled", "teacher--1-steps"):
        a, b = (folder / "pictures" / name for folder in (tmp_path, there))
        for file in [f"{i}.png" for i in range(10)]:
            apart = read_image(a / file).astype(int) - read_image(b / file)
            assert abs(apart).max() <= 1  # rounding depends on the other samples of a batch
        assert (a / "prompts.json").read_text() == (b / "prompts.json").read_text()


def test_a_dataset_made_by_two_processes_equals_that_of_one(results, tmp_path):
    """Five samples in batches of two: the second process has two, then none."""
    generate(tmp_path / "set")
    ours, theirs = LatentSet.open(tmp_path / "set"), LatentSet.open(results[0]["folder"] / "set")
    rows = range(5)
    assert len(ours) == len(theirs) == 5
    assert ours.captions(rows) == theirs.captions(rows) and ours.seeds(rows) == theirs.seeds(rows)
    for scale in ours.scales:
        torch.testing.assert_close(
            ours.latents(rows, scale), theirs.latents(rows, scale), rtol=2e-3, atol=2e-3
        )

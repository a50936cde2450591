"""Data parallelism without a model wrapper: rank, world size, mean of gradients, division of work.

Every function also works in a single process, without communication.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if _initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _initialized() else 1


def is_main() -> bool:
    """Return whether this is the first process, which writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return the GPU with the index LOCAL_RANK, or the CPU if there is no GPU.

    ValueError if there are fewer GPUs than processes.
    """
    return torch.device("cuda", _local_gpu()) if torch.cuda.is_available() else torch.device("cpu")


def init_from_env(wanted: torch.device | str | None = None) -> torch.device:
    """Initialize the process group if torchrun started several processes; return this process's device.

    By default that is `device()`. The backend is nccl for CUDA devices and gloo for others.
    """
    kind = torch.device(wanted) if wanted else device()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if kind.type == "cuda" and several and kind.index is None:
        kind = torch.device("cuda", _local_gpu())
    if kind.type == "cuda" and kind.index is not None:
        torch.cuda.set_device(kind)
    if several and not _initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return kind


def shutdown() -> None:
    """Destroy the process group at the end of a run."""
    if _initialized():
        _group_without_timeout.cache_clear()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process gets here, within the backend's timeout."""
    if world() > 1:
        dist.barrier()


def barrier_without_timeout() -> None:
    """Wait until every process gets here, even if one of them works for hours before."""
    if world() > 1:
        dist.barrier(group=_group_without_timeout())


def split(count: int) -> range:
    """Return this process's share of the indices below `count`: every world()-th, starting at rank()."""
    return range(rank(), count, world())


def gather_rows(parts: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Gather tensors [n, ...], the rows of each process's `split`, into whole ones [N, ...] on the CPU.

    Returns None in all processes but the first. Waits without a timeout.
    """
    own = {name: rows.cpu() for name, rows in parts.items()}
    if world() == 1:
        return own
    received: list[dict[str, Tensor]] | None = [{}] * world() if is_main() else None
    dist.gather_object(own, received, group=_group_without_timeout())
    if received is None:
        return None
    return {name: _interleaved([part[name] for part in received]) for name in own}


def _interleaved(parts: list[Tensor]) -> Tensor:
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for number, rows in enumerate(parts):
        whole[number :: len(parts)] = rows
    return whole


@cache
def _group_without_timeout() -> dist.ProcessGroup:
    """Return a gloo group of all processes for waiting up to a day while one of them works alone."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of parameters (any shapes) by their mean over processes, reduced in >= float32.

    A gradient that is None in this process counts as zero. One that is None in every process stays None, as
    in a single process: a zero gradient would make AdamW apply weight decay to that parameter.
    """
    if world() == 1:
        return
    owned = list(parameters)
    if not owned:
        return
    flat = torch.cat([*map(_flat_gradient, owned), _presence(owned)])
    dist.all_reduce(flat)
    *sums, present = flat.split([p.numel() for p in owned] + [len(owned)])
    for parameter, total, count in zip(owned, sums, present.tolist(), strict=True):
        if count:
            parameter.grad = (total / world()).view_as(parameter).to(parameter.dtype)


def mean_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of every number over processes; all of them must pass the same names."""
    names = sorted(values)
    if world() == 1 or not names:
        return {name: float(value) for name, value in values.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    means = dict(zip(names, (sums / world()).tolist(), strict=True))
    return {name: means[name] for name in values}


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return mean_scalars({"flag": float(flag)})["flag"] > 0


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    kind = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
    return parameter.grad.detach().to(kind).flatten()


def _presence(parameters: list[nn.Parameter]) -> Tensor:
    """Return 1 for each parameter with a gradient in this process, else 0; sent in the same all-reduce."""
    return torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)


def _local_gpu() -> int:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"Process {number} on this machine has no GPU: there are {count}. "
            f"Start torchrun with --nproc-per-node {count}."
        )
    return number


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()

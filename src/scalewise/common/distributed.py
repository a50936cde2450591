"""Data parallelism without a wrapper: who am I, the mean of gradients over processes, and who does what.

Every function also works in a single process, where nothing is sent.
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
    """Number of this process, from 0."""
    return dist.get_rank() if _initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialized() else 1


def is_main() -> bool:
    """Tell whether this process writes the files and talks to the user."""
    return rank() == 0


def init_from_env(device: torch.device | str | None = None) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this process's device.

    Without a device named, that is the GPU of this process's number on its machine, else the CPU. CUDA
    communicates through nccl, everything else through gloo.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if kind.type == "cuda" and several and kind.index is None:
        kind = torch.device("cuda", _local_gpu())
    if kind.type == "cuda" and kind.index is not None:
        torch.cuda.set_device(kind)
    if several and not _initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return kind


def shutdown() -> None:
    """Leave the group of processes at the end of a run."""
    if _initialized():
        _patient.cache_clear()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def meet() -> None:
    """Wait until every process is here, for as long as the work of one alone may take."""
    if world() > 1:
        dist.barrier(group=_patient())


def split(count: int) -> range:
    """The indices below `count` that are this process's: every world()-th, from rank()."""
    return range(rank(), count, world())


def gather_rows(parts: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Tensors by name whose rows every process made for its `split`: whole, in the first process; None in
    the others. It may keep them waiting for as long as it likes.
    """
    own = {name: rows.cpu() for name, rows in parts.items()}
    if world() == 1:
        return own
    received: list[dict[str, Tensor]] | None = [{}] * world() if is_main() else None
    dist.gather_object(own, received, group=_patient())
    if received is None:
        return None
    return {name: _interleaved([part[name] for part in received]) for name in own}


def _interleaved(parts: list[Tensor]) -> Tensor:
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for number, rows in enumerate(parts):
        whole[number :: len(parts)] = rows
    return whole


@cache
def _patient() -> dist.ProcessGroup:
    """All processes over gloo, which work of one of them (figures, references) may keep waiting for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, in one all-reduce of at least float32.

    A gradient missing here counts as zero; one missing everywhere stays missing, as it would in a single
    process (AdamW would otherwise decay that parameter).
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
    """Mean of every number over the processes, which must all give the same names."""
    names = sorted(values)
    if world() == 1 or not names:
        return {name: float(value) for name, value in values.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    means = dict(zip(names, (sums / world()).tolist(), strict=True))
    return {name: means[name] for name in values}


def any_of(flag: bool) -> bool:
    """Tell whether the flag is set in any process."""
    return mean_scalars({"flag": float(flag)})["flag"] > 0


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    kind = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
    return parameter.grad.detach().to(kind).flatten()


def _presence(parameters: list[nn.Parameter]) -> Tensor:
    """One for every parameter that has a gradient here, as a tail to the same message."""
    return torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)


def _local_gpu() -> int:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"Process {number} of this machine has no GPU of its own: there are {count}. "
            f"Start torchrun with --nproc-per-node {count}."
        )
    return number


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()

"""FLOPs and saved bytes of a network on the meta device, where tensors have shapes but no values.

Counts the real operators (FlopCounterMode of torch), including attention. Most blocks of a network are equal
and an operator on the meta device takes milliseconds, so each distinct block runs once, separately, forward
and backward; equal blocks reuse its outputs and its counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Count:
    """FLOPs and memory of a run."""

    flops: float = 0.0
    saved: dict[int, int] = field(default_factory=dict)
    """Bytes saved for the backward pass, by storage."""
    inside: int = 0
    """Bytes saved inside blocks, without their inputs."""
    largest: int = 0
    """Maximum bytes saved inside one block."""
    inputs: dict[int, int] = field(default_factory=dict)
    """Bytes of the inputs of blocks, by storage: what checkpointing saves."""
    outside: dict[int, int] = field(default_factory=dict)
    """Bytes saved outside blocks, by storage."""

    @property
    def activations(self) -> int:
        """Bytes saved without checkpointing."""
        return sum(self.saved.values()) + self.inside

    @property
    def checkpointed(self) -> int:
        """Bytes saved with every block checkpointed: inputs of blocks, and one recomputed block."""
        return sum((self.outside | self.inputs).values()) + self.largest


@dataclass(frozen=True)
class _Block:
    """One block by itself."""

    flops: float
    inside: int
    saved_inputs: tuple[int, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype, bool], ...]
    layout: Any
    plain: tuple[Any, ...]


class _StandIn(torch.autograd.Function):
    """Outputs and gradients of the right shapes, without an operation.

    `anchor` stands for the block's own weights: with it an output needs a gradient where no input does.
    """

    @staticmethod
    def forward(
        ctx: Any, made: Sequence[tuple[torch.Size, torch.dtype, bool]], anchor: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.shapes = [(i.shape, i.dtype) for i in inputs]
        outputs = tuple(torch.empty(shape, dtype=kind, device="meta") for shape, kind, _ in made)
        ctx.mark_non_differentiable(*[o for o, (_, _, needs) in zip(outputs, made, strict=True) if not needs])
        return outputs

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        return (None, None, *(torch.empty(shape, dtype=kind, device="meta") for shape, kind in ctx.shapes))


class _Flash(torch.autograd.Function):
    """Attention as in flash kernels: scores are not saved but recomputed in the backward pass.

    On the meta device torch would use the math kernel, which saves the L x L scores of every head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = (query @ key.transpose(-1, -2)) @ value
        # Plus the log-sum-exp of the softmax, one float32 per query.
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        weights = query @ key.transpose(-1, -2)
        scores = gradient @ value.transpose(-1, -2)
        return scores @ key, scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient


class _AttentionMode(TorchFunctionMode):
    """Replaces torch's attention by a function of query, key and value."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        args = given[0] if given else ()
        options: dict[str, Any] = (given[1] if len(given) > 1 else None) or {}
        if func is F.scaled_dot_product_attention:
            names = dict(zip(("query", "key", "value"), args, strict=False)) | options
            return self.attention(names["query"], names["key"], names["value"])
        return func(*args, **options)


def _flash_operator(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """Run the operator of the flash kernel, which does not allocate the L x L scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class _Alive(TorchDispatchMode):
    """Tracks the bytes of live tensors, from creation to their last reference."""

    def __init__(self, *, without: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = without

    def __torch_dispatch__(self, func: Any, types: Any, *given: Any) -> Any:
        options: dict[str, Any] = (given[1] if len(given) > 1 else None) or {}
        result = func(*(given[0] if given else ()), **options)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(_storage(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, _storage(tensor), storage.nbytes())
        return result

    def _gone(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


def measure(run: Callable[[], object], networks: Sequence[nn.Module]) -> tuple[int, float]:
    """Return peak bytes and FLOPs of a run without gradients on the meta device.

    Excludes weights and buffers of `networks`, tensors created before the run, kernel workspaces and memory
    fragmentation.
    """
    known = {_storage(t) for network in networks for t in (*network.parameters(), *network.buffers())}
    alive = _Alive(without=known)
    with torch.no_grad(), _AttentionMode(_flash_operator), FlopCounterMode(display=False) as counter, alive:
        run()
    return alive.peak, float(counter.get_total_flops())


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a module."""
    held = {_storage(t): _bytes(t) for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())


def count(
    run: Callable[[], Tensor], network: nn.Module, *, blocks: Sequence[nn.Module], backward: bool
) -> Count:
    """Count a run of a network, with its backward pass if `backward`; equal `blocks` are run once.

    `run` returns the output tensor of any shape.
    """
    found, held = Count(), list[Any]()
    weights = {_storage(p) for p in network.parameters()}
    known: dict[Any, _Block] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            found.saved[_storage(tensor)] = found.outside[_storage(tensor)] = _bytes(tensor)
            held.append(tensor)  # keeps storage ids unique
        return tensor

    def around(block: nn.Module, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        leaves, layout = tree_flatten((args, options))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (_signature(block), backward, tuple((i.shape, i.dtype, i.requires_grad) for i in inputs))
        if key not in known:
            known[key] = _alone(original, leaves, layout, weights, backward=backward)
        own = known[key]
        found.flops += own.flops
        found.inside += own.inside
        found.largest = max(found.largest, own.inside)
        held.extend(inputs)
        found.inputs |= {_storage(i): _bytes(i) for i in inputs}
        found.saved |= {_storage(inputs[p]): _bytes(inputs[p]) for p in own.saved_inputs}
        anchor = torch.empty(0, device="meta", requires_grad=any(needs for _, _, needs in own.outputs))
        made = iter(_StandIn.apply(own.outputs, anchor, *inputs))
        return tree_unflatten([next(made) if p is _TENSOR else p for p in own.plain], own.layout)

    with _patched(blocks, around), _AttentionMode(_Flash.apply), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = run()
        if backward:
            output.sum().backward()
    held.append(output)
    found.flops += float(counter.get_total_flops())
    return found


_TENSOR = object()


def _alone(
    original: Callable[..., Any], leaves: list[Any], layout: Any, weights: set[int], *, backward: bool
) -> _Block:
    """Run a block separately, forward and backward, outside the enclosing count."""
    copies = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    inputs = [c for c in copies if isinstance(c, Tensor)]
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            saved[_storage(tensor)] = _bytes(tensor)
            held.append(tensor)
        return tensor

    with torch.utils._python_dispatch._disable_current_modes(), FlopCounterMode(display=False) as counter:
        args, options = tree_unflatten(copies, layout)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = original(*args, **options)
        outputs, out_layout = tree_flatten(result)
        tensors = [o for o in outputs if isinstance(o, Tensor)]
        if backward:
            torch.autograd.backward([o.sum() for o in tensors if o.requires_grad])
    places = {_storage(i): position for position, i in enumerate(inputs)}
    return _Block(
        float(counter.get_total_flops()),
        sum(size for storage, size in saved.items() if storage not in places),
        tuple(places[storage] for storage in saved if storage in places),
        tuple((o.shape, o.dtype, o.requires_grad) for o in tensors),
        out_layout,
        tuple(_TENSOR if isinstance(o, Tensor) else o for o in outputs),
    )


@contextmanager
def _patched(blocks: Sequence[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward method of blocks, so that their hooks still run."""
    for block in blocks:
        block.forward = partial(around, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _signature(block: nn.Module) -> Any:
    return type(block), tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()

"""Faster passes of a frozen denoiser on a CPU; results are equal to those without, up to rounding.

`FastPaths` says which of them are on, `choose_fast_paths` alone decides it. Each was measured
on a CPU with native bfloat16 (docs/log.md):

- `lora`: base and LoRA of a layer share one cast of the input, and the sum is part of the last product.
- `attention`: the backward pass of attention runs in float32, 2 to 4 times faster than the bfloat16 kernel
  and more accurate. The forward pass is the same kernel, bit by bit.
- `weights`: frozen linear layers run on bfloat16 copies of their weights, made once. Autocast only keeps
  casts of weights that require a gradient, and casts a frozen base again in every pass. Products are equal
  bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

MAX_COPY_BYTES = 2**30
"""Above this size of the copies none are made: large models compute for much longer than they cast."""


@dataclass(frozen=True)
class FastPaths:
    """Which faster paths are on; all off = the plain paths of torch and peft."""

    lora: bool = False
    attention: bool = False
    weights: bool = False


def choose_fast_paths(device: torch.device | str, precision: str, *, native: bool) -> FastPaths:
    """Choose the paths that are faster on a device; `native`: it has bfloat16 matrix products."""
    cpu = torch.device(device).type == "cpu"
    bf16 = cpu and native and precision == "bf16" and _has_operators()
    return FastPaths(lora=cpu, attention=bf16, weights=bf16)


def _has_operators() -> bool:
    """Return whether this version of torch has the operators that the bfloat16 paths call."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    attention = "_scaled_dot_product_flash_attention_for_cpu_backward"
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
        and hasattr(torch.ops.aten, attention)
    )


class RoleLinear(LoraLinear):
    """peft's LoRA layer on a plain linear layer, with fewer casts and passes over the activations."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return W x + b + alpha / rank B A x, [N, D_out] for x [N, D_in]; x may have more leading axes."""
        if self.disable_adapters and not self.merged:
            found: Tensor = self.base_layer(x)
            return found
        names, dtype = self.active_adapters, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif not dtype == self.base_layer.weight.dtype == self.lora_A[names[0]].weight.dtype:
            names = []  # peft casts between the dtypes of base and LoRA
        if len(names) != 1 or self.merged or args or options:
            return super().forward(x, *args, **options)
        rows = x.to(dtype).reshape(-1, x.shape[-1])  # one cast and one layout for both products
        a, b = (part[names[0]].weight.to(dtype) for part in (self.lora_A, self.lora_B))
        y: Tensor = self.base_layer(rows)
        y.addmm_(F.linear(rows, a), b.t(), alpha=self.scaling[names[0]])
        return y.view(*x.shape[:-1], -1)


def role_linear(target: nn.Module, adapter: str, **options: Any) -> RoleLinear | None:
    """Build the LoRA layer for a linear layer; None (peft chooses) for its subclasses, such as quantized."""
    return RoleLinear(target, adapter, **options) if type(target) is nn.Linear else None


class BFloat16Linears:
    """Runs the frozen float32 linear layers of a module on bfloat16 copies of their weights.

    Within `active()` the layers run on the copies; their parameters are never touched. A weight that was
    replaced or changed in place is copied again.
    """

    def __init__(self, module: nn.Module, *, pack: bool) -> None:
        """Copy the weights of `module`, unless the copies would take more than MAX_COPY_BYTES.

        `pack` stores them in the layout of oneDNN's products, which cannot be used in a backward pass.
        """
        layers = [m for m in module.modules() if type(m) is nn.Linear and _can_copy(m)]
        size = sum(2 * layer.weight.numel() for layer in layers)
        self.layers = [_Copy(m, pack=pack) for m in layers] if size <= MAX_COPY_BYTES else []
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers on their copies within a `with` block. Re-entrant."""
        self._depth += 1
        try:
            if self._depth == 1:
                for copy in self.layers:
                    copy.enter()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for copy in self.layers:
                    copy.leave()


class _Copy:
    """The copy of one layer; `forward` equals that of the layer under autocast, bit by bit."""

    def __init__(self, layer: nn.Linear, *, pack: bool) -> None:
        self.layer, self.pack = layer, pack
        self._make()

    @torch.no_grad()
    def _make(self) -> None:
        # The aliases keep the storage, so that its address cannot be that of another weight later.
        self.sources = [(p.detach(), p._version) for p in self._parameters()]
        self.weight, *biases = (p.to(torch.bfloat16) for p, _ in self.sources)
        self.bias = biases[0] if biases else None
        if self.pack:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.layer._parameters.values() if p is not None]

    def enter(self) -> None:
        if not _can_copy(self.layer):
            return
        now = [(p.data_ptr(), p._version) for p in self._parameters()]
        if now != [(source.data_ptr(), version) for source, version in self.sources]:
            self._make()
        self.layer.__dict__["forward"] = self.forward

    def leave(self) -> None:
        self.layer.__dict__.pop("forward", None)

    def forward(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled() and x.requires_grad
        if grad and self.pack:
            return F.linear(x, self.layer.weight, self.layer.bias)
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        y = (
            _FrozenLinear.apply(rows, self.weight, self.bias)
            if grad
            else _linear(rows, self.weight, self.bias)
        )
        return y.view(*x.shape[:-1], -1)


def _can_copy(layer: nn.Linear) -> bool:
    return all(
        not p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" and not p.is_inference()
        for p in layer.parameters(recurse=False)
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows [N, D_in] times weight [D_out, D_in] plus bias, added inside oneDNN's product."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


class _FrozenLinear(torch.autograd.Function):
    """A linear layer without gradients of its weights; the operator of oneDNN has no backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad @ ctx.saved_tensors[0], None, None


class Float32AttentionBackward(TorchFunctionMode):
    """Runs the backward pass of bfloat16 attention in float32, for attention without mask or dropout.

    The backward kernel of torch 2.13 for CPUs takes 42 ms in bfloat16 and 13 ms in float32 (8 x 6 heads x 288
    tokens x 32, one core).
    """

    def __torch_function__(self, function: Callable[..., Any], types: Sequence[type], *call: Any) -> Any:
        inputs, named = call if len(call) == 2 else (*call, *((), None)[len(call) :])
        options: Mapping[str, Any] = named or {}
        if function is F.scaled_dot_product_attention and _is_plain(*inputs, **options):
            return _Attention.apply(*(x.to(torch.bfloat16) for x in inputs), options.get("scale"))
        return function(*inputs, **options)


def _is_plain(*args: Any, **options: Any) -> bool:
    """Return whether a call has three tensors that the CPU kernel takes, and no option with an effect."""
    if len(args) != 3 or any(
        isinstance(value, Tensor) or value for key, value in options.items() if key != "scale"
    ):
        return False
    return all(x.ndim == 4 and x.stride(-1) == 1 and x.shape[-1] == args[0].shape[-1] for x in args)


class _Attention(torch.autograd.Function):
    """Attention of q, k, v [N, heads, L, D] in bfloat16, with a backward pass in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.scale = scale
        found: Tensor = out
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, logsumexp = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(x.float() for x in tensors), logsumexp, 0.0, False, scale=ctx.scale
        )
        return (*(x.to(torch.bfloat16) for x in found), None)

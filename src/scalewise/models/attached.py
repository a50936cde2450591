"""A student on a quantized base: its update is added to the outputs of layers instead of to their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scalewise.models import lora_keys
from scalewise.models.lora import Student, StudentError, check_pairs, fused


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module has weights that are not floating-point numbers."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def apply_student(
    module: nn.Module, student: Student, *, weight: float = 1.0
) -> AbstractContextManager[None]:
    """Apply a student within a `with` block: fused into the weights, or attached if they are quantized."""
    apply = attached if is_quantized(module) else fused
    return apply(module, student, weight=weight)


def check_student(module: nn.Module, student: Student) -> None:
    """Raise StudentError if a student does not fit a denoiser."""
    if is_quantized(module):
        _updates(module, student)
    else:
        student.match_to(module)


@contextmanager
def attached(module: nn.Module, student: Student, *, weight: float = 1.0) -> Iterator[None]:
    """Add weight alpha / rank (B A x + bias) to the outputs of layers within a `with` block."""
    scale, hooks = weight * student.alpha / student.rank, []
    for layer, a, b, bias in _updates(module, student):
        device = next(layer.parameters()).device
        a, b, bias = (None if tensor is None else tensor.to(device) for tensor in (a, b, bias))
        add = partial(_add, a=a, b=b, bias=bias, scale=scale)
        hooks.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Update = tuple[nn.Linear, Tensor | None, Tensor | None, Tensor | None]
"""A layer with A [R, in], B [out, R] and bias [out]; None for both matrices or for the bias if missing."""


def _add(
    _layer: nn.Module, args: tuple[Any, ...], output: Tensor, *, a: Tensor | None, b: Tensor | None,
    bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    x = args[0]
    if a is not None and b is not None:
        a, b = (matrix.to(device=x.device, dtype=x.dtype) for matrix in (a, b))
        output = output + scale * F.linear(F.linear(x, a), b).to(output.dtype)
    return output if bias is None else output + scale * bias.to(device=output.device, dtype=output.dtype)


def _updates(module: nn.Module, student: Student) -> list[Update]:
    """Return the linear layers that a student changes, with its updates; StudentError if one does not fit."""
    layers = dict(module.named_modules())
    tensors, found = lora_keys.match_layers(student.tensors, layers), list[Update]()
    check_pairs(tensors)
    for path in dict.fromkeys(lora_keys.layer_of(name) for name in tensors):
        a, b, bias = (
            tensors.get(f"{path}.{part}") for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        )
        layer = layers.get(path)
        if isinstance(layer, nn.Conv2d) or (a is not None and a.ndim > 2):
            raise StudentError(
                f"The student changes the convolution {path}, which is not supported on a quantized base; "
                "sample with model.quantize=none."
            )
        own = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
        rows = len(bias) if bias is not None else len(b) if b is not None else 0
        wanted = (rows, a.shape[1]) if a is not None else (rows, own[1] if own else 0)
        if not isinstance(layer, nn.Linear) or own != wanted:
            raise StudentError(
                f"The student does not fit this base: {path} is not a linear layer of {wanted[0]} x "
                f"{wanted[1]}. Use the base that the student was trained with."
            )
        found.append((layer, _float(a), _float(b), _float(bias)))
    return found


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()

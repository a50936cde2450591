"""A student beside the weights of its base, for a base in fewer bits: nothing can be added to those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scalewise.models import lora_keys
from scalewise.models.lora import Student, StudentError, check_pairs, fused


def in_fewer_bits(module: nn.Module) -> bool:
    """Whether some of a module's weights are no floating-point numbers."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def with_student(module: nn.Module, student: Student, *, weight: float = 1.0) -> AbstractContextManager[None]:
    """Give a denoiser a student for a while: fused into whole weights, attached to those of fewer bits."""
    hold = attached if in_fewer_bits(module) else fused
    return hold(module, student, weight=weight)


def check_student(module: nn.Module, student: Student) -> None:
    """Refuse a student that does not fit a denoiser."""
    if in_fewer_bits(module):
        _updates(module, student)
    else:
        student.matched(module)


@contextmanager
def attached(module: nn.Module, student: Student, *, weight: float = 1.0) -> Iterator[None]:
    """Add weight alpha / rank (B A x + bias) to every layer's output; leaving takes it off again."""
    scale, hooks = weight * student.alpha / student.rank, []
    for layer, a, b, bias in _updates(module, student):
        place = next(layer.parameters()).device
        a, b, bias = (None if given is None else given.to(place) for given in (a, b, bias))
        add = partial(_add, a=a, b=b, bias=bias, scale=scale)
        hooks.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Update = tuple[nn.Linear, Tensor | None, Tensor | None, Tensor | None]
"""A layer with its A [R, in] and B [out, R], and its bias [out]; both matrices or the bias may be missing."""


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
    """Every linear layer that a student changes, and by what."""
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
                f"The student changes the convolution {path}, which a base in fewer bits cannot take; sample "
                "with model.quantize=none."
            )
        own = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
        rows = len(bias) if bias is not None else len(b) if b is not None else 0
        wanted = (rows, a.shape[1]) if a is not None else (rows, own[1] if own else 0)
        if not isinstance(layer, nn.Linear) or own != wanted:
            raise StudentError(
                f"The student does not fit this base: {path} is no linear layer of {wanted[0]} x {wanted[1]} "
                "here. Sample with the base it was made for."
            )
        found.append((layer, _float(a), _float(b), _float(bias)))
    return found


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()

"""A student beside the weights of its base, for a base in fewer bits: nothing can be added to those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scalewise import keys
from scalewise.lora import Student, StudentError, check_pairs, fused


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
        _pairs(module, student)
    else:
        student.matched(module)


@contextmanager
def attached(module: nn.Module, student: Student, *, weight: float = 1.0) -> Iterator[None]:
    """Add weight alpha / rank (B A x + bias) to every layer's output; leaving takes it off again."""
    scale, hooks = weight * student.alpha / student.rank, []
    for layer, a, b, bias in _pairs(module, student):
        place = next(layer.parameters()).device
        given = None if bias is None else bias.to(place) * scale
        add = partial(_add, a=a.to(place), b=b.to(place) * scale, bias=given)
        hooks.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    _layer: nn.Module, args: tuple[Any, ...], output: Tensor, *, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    x = args[0]
    a, b = (matrix.to(device=x.device, dtype=x.dtype) for matrix in (a, b))
    bias = None if bias is None else bias.to(device=x.device, dtype=x.dtype)
    return output + F.linear(F.linear(x, a), b, bias).to(output.dtype)


def _pairs(module: nn.Module, student: Student) -> list[tuple[nn.Linear, Tensor, Tensor, Tensor | None]]:
    """Every linear layer that a student changes, with its A [R, in], B [out, R] and bias [out], if any."""
    layers = dict(module.named_modules())
    tensors, found = keys.match_layers(student.tensors, layers), []
    check_pairs(tensors)
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = keys.layer_of(name)
        layer, b, bias = (
            layers.get(path),
            tensors[f"{path}.lora_B.weight"],
            tensors.get(f"{path}.lora_B.bias"),
        )
        if a.ndim > 2 or isinstance(layer, nn.Conv2d):
            raise StudentError(
                f"The student changes the convolution {path}, which a base in fewer bits cannot take; sample "
                "with model.quantize=none."
            )
        size = (b.shape[0], a.shape[1])
        if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != size:
            raise StudentError(
                f"The student does not fit this base: {path} is no linear layer of {size[0]} x {size[1]} "
                "here. Sample with the base it was made for."
            )
        found.append((layer, a.float(), b.float(), None if bias is None else bias.float()))
    return found

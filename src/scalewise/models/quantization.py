"""Quantization of a frozen base to 8 or 4 bits with bitsandbytes (arXiv 2208.07339, 2305.14314)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from scalewise.common.errors import ModelError
from scalewise.common.optional import import_bitsandbytes
from scalewise.models.pipeline_adapter import PipelineAdapter

Bits = Literal["none", "int8", "nf4"]
# Including the scales: one float32 per row, or one byte per 64 weights.
BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 1 / 64}


def linear_layers(model: PipelineAdapter) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield every linear layer in the repeated blocks, with its parent module and its name in the parent."""
    for block in model.repeated_blocks():
        for holder in block.modules():
            for name, child in holder.named_children():
                if type(child) is nn.Linear:
                    yield holder, name, child


def quantize(model: PipelineAdapter, bits: Bits, device: torch.device | str) -> None:
    """Replace the linear layers in the blocks of the denoiser by quantized ones on `device`, one by one.

    Embeddings, norms and the last layer are not quantized: they are small, and quantizing them reduces
    quality most. Raises ModelError if bitsandbytes is not installed.
    """
    if bits == "none":
        return
    try:
        bitsandbytes: Any = import_bitsandbytes()
    except ImportError as error:
        raise ModelError(
            f"model.quantize={bits} needs a package that is not installed: pip install -e "
            "'.[quantize]' in the folder of scalewise"
        ) from error
    for holder, name, linear in list(linear_layers(model)):
        make = _int8 if bits == "int8" else _nf4
        setattr(holder, name, make(bitsandbytes.nn, linear).to(device))


def _int8(library: Any, linear: nn.Linear) -> nn.Module:
    new = library.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False,
        threshold=0.0, device="meta",
    )  # fmt: skip
    new.weight = library.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return _with_bias(new, linear)


def _nf4(library: Any, linear: nn.Linear) -> nn.Module:
    new = library.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype, quant_type="nf4", compress_statistics=True, device="meta",
    )  # fmt: skip
    # On CPUs with AVX512-BF16 the first forward pass without gradients would repack the weight for a kernel
    # without a backward pass, which rounds to bfloat16 and requires sizes that are multiples of 32.
    new.support_avx512bf16_for_cpu = False
    new.weight = library.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
    )
    return _with_bias(new, linear)


def _with_bias(new: nn.Module, linear: nn.Linear) -> nn.Module:
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return new

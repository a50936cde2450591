"""Checks of the arguments of `load` and of the pipelines, before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalewise.config.overrides import nearest

_EXAMPLES = {"num_images_per_prompt": 2, "num_frames": 81}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_integers(**given: Any) -> None:
    """Raise ValueError for sizes and counts that are not positive integers, such as "128", 128.0 or 0."""
    for name, value in given.items():
        if value is not None and not _is_integer(value):
            example = _EXAMPLES.get(name, 1024)
            raise ValueError(f"{name} must be an integer, as in {name}={example}; got {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")


def check_callback(callback: Any) -> None:
    """Raise ValueError for a callback that is not callable."""
    if callback is not None and not callable(callback):
        raise ValueError(
            "callback_on_step_end must be a function of pipe, i, t and {'latents': x0}, or None; got "
            f"{callback!r}."
        )


def check_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype for models, also from its name; raise ValueError if it is not supported."""
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ValueError(f"dtype must be one of torch.{', torch.'.join(_DTYPES)}; got {dtype!r}.")
    assert isinstance(found, torch.dtype)
    return found


def check_load_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise TypeError for options that `load` does not take, with a hint for `torch_dtype` and for typos."""
    for name in options.keys() - set(known):
        if name == "torch_dtype":
            raise TypeError("load takes dtype, not torch_dtype; use load(..., dtype=torch.float16).")
        raise TypeError(f"load has no argument {name!r}; {nearest(name, list(known))}")


def check_options(others: Mapping[str, Any], steps: int, stock: Any, own: Any) -> None:
    """Raise an error for arguments that `__call__` does not take, with hints for those of diffusers and
    typos.

    `num_inference_steps` is accepted if it is the number of steps of the schedule.
    """
    requested = others.get("num_inference_steps", steps)
    if requested != steps:
        raise ValueError(
            f"num_inference_steps is {requested!r}, but the student was trained with a schedule of {steps} "
            "steps. Omit it, or pass another schedule=..."
        )
    known = [name for name in inspect.signature(own).parameters if name not in ("self", "others")]
    for name in others.keys() - {"num_inference_steps"}:
        if name in inspect.signature(stock).parameters:
            raise TypeError(
                f"{name} is an argument of {stock.__qualname__.partition('.')[0]} without effect on "
                "scale-wise sampling; omit it."
            )
        raise TypeError(f"The pipeline has no argument {name!r}; {nearest(name, known)}")


def check_prompts(prompt: Any) -> list[str]:
    """Return the prompts as a list; raise ValueError for anything but a string or a list of strings."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt must be a string or a list of strings; got {prompt!r}.")
    return list(prompts)


def check_negative_prompt(prompt: Any) -> None:
    """Raise ValueError for a negative prompt that is not empty."""
    if prompt:
        raise ValueError(
            f"negative_prompt {prompt!r} has no effect, because the student samples without classifier-free "
            "guidance; omit it."
        )


def check_strength(strength: Any, image: Any) -> float:
    """Return the strength, 0.8 if None; raise ValueError if it is invalid or given without an image."""
    if strength is None:
        return 0.8
    if image is None:
        raise ValueError(
            f"strength {strength!r} has no effect without an image; pass image=... or omit strength."
        )
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:  # NaN is not
        raise ValueError(f"strength must be a number in (0, 1]; got {strength!r}.")
    return float(strength)


def check_seeds(seed: Any, count: int) -> list[int]:
    """Return one seed per sample; a single seed gives seed, seed + 1, ..."""
    seeds = [seed + i for i in range(count)] if _is_integer(seed) else seed
    listed = isinstance(seeds, Sequence) and not isinstance(seeds, str | bytes)
    if not listed or not all(_is_integer(s) for s in seeds):
        raise ValueError(f"seed must be an integer or a list of integers, one per sample; got {seed!r}.")
    if len(seeds) != count:
        raise ValueError(
            f"There are {len(seeds)} seeds for {count} samples; pass one seed, or one per sample."
        )
    return [int(s) for s in seeds]


def check_generators(generator: Any, count: int) -> None:
    """Raise ValueError if `generator` is not a torch.Generator or a list with one per sample."""
    several = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in several):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them; got {generator!r}. Pass a number as "
            "seed=..."
        )
    if isinstance(generator, list | tuple) and len(generator) != count:
        raise ValueError(
            f"There are {len(generator)} generators for {count} samples; pass one, or one per sample."
        )


def latents_from_callback(result: Any, x0: Tensor, step: int) -> Tensor | None:
    """Return the latents [N, C, H, W] from a callback; raise ValueError if they differ from x0 in shape."""
    if result is None:
        return None
    name = "callback_on_step_end"
    if not isinstance(result, Mapping):
        raise ValueError(
            f"{name} returned a {type(result).__name__} after step {step + 1}; return "
            '{"latents": x0} or None.'
        )
    if "latents" not in result:
        return None
    latents = result["latents"]
    if not isinstance(latents, Tensor) or latents.shape != x0.shape:
        found = f"shape {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"{name} returned latents of {found} after step {step + 1}; return the shape of x0, "
            f"{list(x0.shape)}."
        )
    return latents.to(x0)


def _is_integer(value: Any) -> bool:
    """Return whether a value is an integer, including numpy integers and excluding booleans."""
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)

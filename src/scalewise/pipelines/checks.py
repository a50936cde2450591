"""What a user may give a pipeline wrongly, told in one sentence before anything is computed."""

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
    """Refuse sizes and counts that are given and are no positive whole numbers, such as "128", 128.0, 0."""
    for name, value in given.items():
        if value is not None and not _is_integer(value):
            example = _EXAMPLES.get(name, 1024)
            raise ValueError(f"{name} is {value!r}; give a whole number, as in {name}={example}.")
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")


def check_callback(callback: Any) -> None:
    """Refuse a callback that cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end is {callback!r}; give a function of pipe, i, t and {{'latents': x0}}, or "
            "leave it out."
        )


def check_dtype(dtype: Any) -> torch.dtype:
    """The type to load a model in, also by name; ValueError for one in which no model samples."""
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; give one of torch.{', torch.'.join(_DTYPES)}.")
    assert isinstance(found, torch.dtype)
    return found


def check_load_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse options that `load` does not take; diffusers' name of the type is told apart from mere typos."""
    for name in options.keys() - set(known):
        if name == "torch_dtype":
            raise TypeError("load takes the type as dtype, not torch_dtype: load(..., dtype=torch.float16).")
        raise TypeError(f"load takes no argument {name!r}; {nearest(name, list(known))}")


def check_options(others: Mapping[str, Any], steps: int, stock: Any, own: Any) -> None:
    """Refuse arguments that `__call__` does not take; the stock pipeline's are told apart from mere typos.

    `num_inference_steps` may be given when it is the number of the schedule's steps.
    """
    asked = others.get("num_inference_steps", steps)
    if asked != steps:
        raise ValueError(
            f"num_inference_steps is {asked!r}, but the schedule has {steps} steps, which the student was "
            "trained for. Leave it out, or give another schedule=..."
        )
    known = [name for name in inspect.signature(own).parameters if name not in ("self", "others")]
    for name in others.keys() - {"num_inference_steps"}:
        if name in inspect.signature(stock).parameters:
            raise TypeError(
                f"{name} is taken by {stock.__qualname__.partition('.')[0]} and has no effect on scale-wise "
                "sampling; leave it out."
            )
        raise TypeError(f"The pipeline takes no argument {name!r}; {nearest(name, known)}")


def check_prompts(prompt: Any) -> list[str]:
    """The prompts as a list; anything but text or texts is refused."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt is {prompt!r}; give a text, or a list of texts.")
    return list(prompts)


def check_negative_prompt(prompt: Any) -> None:
    """Refuse a negative prompt that says something."""
    if prompt:
        raise ValueError(
            "A negative prompt has no effect here: the student samples without classifier-free guidance, "
            "which is where it would act. Leave it out."
        )


def check_strength(strength: Any, image: Any) -> float:
    """Strength of an image to start from, 0.8 unless given; without an image it is refused."""
    if strength is None:
        return 0.8
    if image is None:
        raise ValueError(
            f"strength {strength!r} has no effect without an image to start from; give image=... or leave it "
            "out."
        )
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:  # NaN is not
        raise ValueError(f"strength is {strength!r}; give a number in (0, 1].")
    return float(strength)


def check_seeds(seed: Any, count: int) -> list[int]:
    """One seed a sample: seed, seed + 1, ... from a single one."""
    seeds = [seed + i for i in range(count)] if _is_integer(seed) else seed
    listed = isinstance(seeds, Sequence) and not isinstance(seeds, str | bytes)
    if not listed or not all(_is_integer(s) for s in seeds):
        raise ValueError(f"seed is {seed!r}; give a whole number, or a list of them, one for each sample.")
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples; give one, or one for each sample.")
    return [int(s) for s in seeds]


def check_generators(generator: Any, count: int) -> None:
    """Refuse what is neither a torch.Generator nor a list of them, one for each sample."""
    several = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in several):
        raise ValueError(
            f"generator is {generator!r}; give a torch.Generator or a list of them, or a number as seed=..."
        )
    if isinstance(generator, list | tuple) and len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators for {count} samples; give one, or one for each sample."
        )


def changed_latents(told: Any, x0: Tensor, step: int) -> Tensor | None:
    """The latents that a callback returned after a step, which have to be shaped as x0 [N, C, H, W]."""
    if told is None:
        return None
    name = "callback_on_step_end"
    if not isinstance(told, Mapping):
        raise ValueError(
            f"{name} returned a {type(told).__name__} after step {step + 1}; let it return "
            '{"latents": x0} or None.'
        )
    if "latents" not in told:
        return None
    latents = told["latents"]
    if not isinstance(latents, Tensor) or latents.shape != x0.shape:
        found = f"shape {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"{name} returned latents of {found} after step {step + 1}, where x0 has the shape "
            f"{list(x0.shape)}; return that shape."
        )
    return latents.to(x0)


def _is_integer(value: Any) -> bool:
    """Also numpy's; True is none."""
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)

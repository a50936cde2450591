"""Index, configurations and weight variants of a base in diffusers' layout, for loading and for `plan`.

A base is a folder or a hub id. Bases that cannot be used are rejected before weights are read.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scalewise.common.contents import WEIGHTS, local_folder, variant_of_file
from scalewise.common.errors import ModelError, first_line

INDEX = "model_index.json"
Part = Literal["denoiser", "vae", "text"]
ALL_PARTS: tuple[Part, ...] = ("denoiser", "vae", "text")
LOADABLE = re.compile(r"(.*/)?(diffusion_pytorch_model|model)[.-].*")
"""File names of weights that are loaded; other files in the folders of a base belong to other programs."""
UNLIMITED_LENGTH = 10**6
"""transformers gives 1e30 for tokenizers without `model_max_length`; lengths from here on mean no limit."""


def model_index(base: str | Path) -> dict[str, Any]:
    """Read model_index.json of a base; raise ModelError if it is missing or invalid."""
    path = Path(base) / INDEX
    if not path.exists():
        if Path(base).exists() or str(base).startswith((".", "/")):
            raise ModelError(
                f"{base} is not a model folder: {INDEX} is missing. Use a folder in diffusers' layout."
            )
        path = _from_hub(str(base))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a valid model index ({error}); download the model again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path} is not a valid model index (not a mapping); download the model again.")
    return index


def check_index(
    index: Mapping[str, Any], base: str | Path, *, required: Sequence[str], optional: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Return the library and class of every component in a model index.

    An entry that is absent, null or [null, null] means a missing component. Raises ModelError if a component
    is `required` and missing, unless it is `optional`.
    """
    found = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            found[name] = (entry[0], entry[1])
    missing = [name for name in required if name not in found and name not in optional]
    if missing:
        raise ModelError(
            f"{base} is incomplete: {INDEX} has no entry for {', '.join(missing)}. Download the model again, "
            "or use one with all components."
        )
    return found


def diffusers_class(components: Mapping[str, tuple[str, str]], name: str, base: str | Path) -> Any:
    """Return the diffusers class of a component; raise ModelError if diffusers does not have it."""
    import diffusers

    library, kind = components[name]
    if library != "diffusers" or not hasattr(diffusers, kind):
        raise ModelError(
            f"The {name} of {base} is a {kind} of {library!r}, which diffusers {diffusers.__version__} does "
            "not have; use a base with classes of diffusers."
        )
    return getattr(diffusers, kind)


def with_defaults(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Add the defaults of a class to a configuration, because old files do not contain new settings."""
    options = inspect.signature(kind.__init__).parameters
    defaults = {name: o.default for name, o in options.items() if o.default is not o.empty}
    return {"_class_name": kind.__name__, **defaults, **config}


def refuse_quantized(config: Mapping[str, Any], name: str, base: str | Path) -> None:
    """Raise ModelError for a quantized component: adapters, fusing and `plan` need unquantized weights."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    by = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise ModelError(
        f"The {name} of {base} is already quantized (by {by or 'an unknown method'}), which is not "
        "supported. Use the unquantized model and set model.quantize=nf4 or int8 to quantize it."
    )


# --- Variants ---


def choose_variant(files: Sequence[str], component: str, wanted: str | None) -> str | None:
    """Choose the variant of the weights of a component: `wanted` if available, else the default one (None),
    else the only one available.

    `files` are `find_weight_files`; `component` is "" for the folder of a VAE. Raises
    ModelError if there are several variants and none was chosen.
    """
    available = {variant_of_file(Path(name).name) for name in files if Path(name).parent == Path(component)}
    if wanted in available or None in available or not available:
        return wanted if wanted in available else None
    if len(available) > 1:
        names = ", ".join(sorted(map(str, available)))
        raise ModelError(
            f"The weights of the {component or 'model'} only exist in the variants {names}; choose one with "
            "model.variant."
        )
    return available.pop()


def choose_variants(
    base: str | Path, components: Collection[str], wanted: str | None
) -> dict[str, str | None]:
    """Choose the variant of every component; raise ModelError if no component has the `wanted` variant."""
    files = find_weight_files(base)
    available = {variant_of_file(Path(name).name) for name in files if str(Path(name).parent) in components}
    if wanted is None or not available or wanted in available:
        return {name: choose_variant(files, name, wanted) for name in components}
    names = ", ".join(sorted(filter(None, available)))
    raise ModelError(
        f"model.variant is {wanted}, but {base} has no file like model.{wanted}{WEIGHTS}; available "
        f"variants: {names or 'only the default'}. Set model.variant to one of them, or to null for the "
        "default."
    )


def find_weight_files(base: str | Path) -> list[str]:
    """Return the relative paths of the safetensors files that can be loaded from a folder or hub id.

    Without access to the hub, only downloaded files are listed.
    """
    names = list[str]()
    if Path(base).is_dir() or (listed := _list_hub_files(str(base))) is None:
        if folder := local_folder(base):
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*" + WEIGHTS)]
    else:
        names = listed
    return [name for name in names if LOADABLE.fullmatch(name)]


# --- Maximum number of tokens of a text encoder ---


def max_tokens(length: Any, encoder: Any) -> int:
    """Return the maximum number of tokens: `length`, the `model_max_length` of the tokenizer, if it is set.

    Otherwise the number of positions in `encoder`, the configuration of the text encoder, or 512 for relative
    positions (T5), as in the pipelines.
    """
    if isinstance(length, int | float) and 0 < length < UNLIMITED_LENGTH:
        return int(length)
    return int(getattr(encoder, "max_position_embeddings", None) or 512)


def _list_hub_files(base: str) -> list[str] | None:
    """Return the safetensors files of a hub id; None if the hub does not answer."""
    from huggingface_hub import list_repo_files

    try:
        return [name for name in list_repo_files(base) if name.endswith(WEIGHTS)]
    except Exception:  # offline, or no such model, which loading reports
        return None


def _from_hub(base: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, INDEX))
    except Exception as error:
        raise ModelError(
            f"Cannot find the model {base!r}: there is no such folder, and the hub answered: "
            f"{first_line(error)} Use a folder in diffusers' layout, or log in if the model is gated."
        ) from error

"""A base in diffusers' layout as loading and `plan` both read it: its index, configurations and variants.

What cannot be used is refused here, before any weight is read. A base is a folder or a hub id.
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
READ = re.compile(r"(.*/)?(diffusion_pytorch_model|model)[.-].*")
"""Weights that loading looks for; others in a base's folders are of other programs."""
NO_LENGTH = 10**6
"""transformers gives a tokenizer without `model_max_length` 1e30; nothing real is as long as this."""


def model_index(base: str | Path) -> dict[str, Any]:
    """The content of model_index.json; ModelError where there is none, or one of no pipeline."""
    path = Path(base) / INDEX
    if not path.exists():
        if Path(base).exists() or str(base).startswith((".", "/")):
            raise ModelError(
                f"{base} is no model folder: it has no {INDEX}. Give a folder in diffusers' layout."
            )
        path = _from_hub(str(base))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} does not describe a model ({error}); fetch the model again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path} does not describe a model (it holds no mapping); fetch the model again.")
    return index


def check_index(
    index: Mapping[str, Any], base: str | Path, *, required: Sequence[str], optional: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Library and class of every component that an index names; ModelError if a required one is missing.

    A component is left out by null, by [null, null] or by no entry; `optional` ones may be.
    """
    found = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            found[name] = (entry[0], entry[1])
    missing = [name for name in required if name not in found and name not in optional]
    if missing:
        raise ModelError(
            f"{base} is incomplete: its {INDEX} names no {', no '.join(missing)}. Fetch the model again, "
            "or give one that has all its parts."
        )
    return found


def diffusers_class(components: Mapping[str, tuple[str, str]], name: str, base: str | Path) -> Any:
    """The class of a component that has to be one of diffusers'."""
    import diffusers

    library, kind = components[name]
    if library != "diffusers" or not hasattr(diffusers, kind):
        raise ModelError(
            f"The {name} of {base} is a {kind} of {library!r}, which diffusers {diffusers.__version__} has "
            "not; give a base with diffusers' own classes."
        )
    return getattr(diffusers, kind)


def with_defaults(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """A configuration with its class's own defaults: files written before a setting came lack it."""
    options = inspect.signature(kind.__init__).parameters
    defaults = {name: o.default for name, o in options.items() if o.default is not o.empty}
    return {"_class_name": kind.__name__, **defaults, **config}


def refuse_quantized(config: Mapping[str, Any], name: str, base: str | Path) -> None:
    """Refuse a component that was saved in fewer bits: adapters, fusing and `plan` need whole weights."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    by = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise ModelError(
        f"The {name} of {base} was saved quantized (by {by or 'an unknown method'}); such bases are not "
        "supported. Name the unquantized one, and set model.quantize=nf4 or int8 to hold it in fewer bits."
    )


# --- Variants ---


def variant_of(files: Sequence[str], component: str, wanted: str | None) -> str | None:
    """Which variant of a component's weights to load: `wanted` if there are such files, else the plain ones,
    else the only one there is; None = plain.

    `files` are `weight_names`; `component` "" is the base itself (an autoencoder's folder). ModelError if
    there are several and none is wanted.
    """
    there = {variant_of_file(Path(name).name) for name in files if Path(name).parent == Path(component)}
    if wanted in there or None in there or not there:
        return wanted if wanted in there else None
    if len(there) > 1:
        named = ", ".join(sorted(map(str, there)))
        raise ModelError(
            f"The weights of the {component or 'model'} are there as {named}, and not plain; choose with "
            "model.variant."
        )
    return there.pop()


def variants_of(base: str | Path, components: Collection[str], wanted: str | None) -> dict[str, str | None]:
    """`variant_of` every component; ModelError for a `wanted` variant of which none of them has a file."""
    files = weight_names(base)
    there = {variant_of_file(Path(name).name) for name in files if str(Path(name).parent) in components}
    if wanted is None or not there or wanted in there:
        return {name: variant_of(files, name, wanted) for name in components}
    named = ", ".join(sorted(filter(None, there)))
    raise ModelError(
        f"model.variant={wanted}: {base} has no file such as model.{wanted}{WEIGHTS}, only "
        f"{named or 'plain ones'}. Set model.variant=null, or to what is there."
    )


def weight_names(base: str | Path) -> list[str]:
    """Relative names of the safetensors files that loading may read: a folder's or a hub id's, without the
    hub those that were downloaded.
    """
    names = list[str]()
    if Path(base).is_dir() or (listed := _listed_by_hub(str(base))) is None:
        if folder := local_folder(base):
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*" + WEIGHTS)]
    else:
        names = listed
    return [name for name in names if READ.fullmatch(name)]


# --- How many tokens a text encoder reads ---


def tokens_read(length: Any, encoder: Any) -> int:
    """Tokens that a tokenizer of `model_max_length` cuts to; without one as many as its text encoder (its
    configuration) has positions for, or 512 where those are relative (T5), as the pipelines read.
    """
    if isinstance(length, int | float) and 0 < length < NO_LENGTH:
        return int(length)
    return int(getattr(encoder, "max_position_embeddings", None) or 512)


def _listed_by_hub(base: str) -> list[str] | None:
    """The safetensors files of a hub id; None without the hub."""
    from huggingface_hub import list_repo_files

    try:
        return [name for name in list_repo_files(base) if name.endswith(WEIGHTS)]
    except Exception:  # offline, or no such model, which loading tells in its own words
        return None


def _from_hub(base: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, INDEX))
    except Exception as error:
        raise ModelError(
            f"Cannot find the model {base!r}: it is no folder here, and the hub answered: "
            f"{first_line(error)} Give a folder in diffusers' layout, or log in if the model is gated."
        ) from error

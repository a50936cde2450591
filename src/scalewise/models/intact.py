"""Checks for missing and damaged files in the folder of a base, before weights are read.

Used by loading and by `plan`. For a hub id nothing is checked; loading reports the errors of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scalewise.common.contents import WEIGHTS, variant_of_file
from scalewise.common.errors import ModelError
from scalewise.models.folder import LOADABLE

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS = b"version https://git-lfs"
_REMEDY = "Download the model again."


def check_folder(
    base: str | Path, components: Mapping[str, tuple[str, str]], *, names: Collection[str],
    weights: Collection[str], variants: Mapping[str, str | None],
) -> None:  # fmt: skip
    """Check the components `names` of a local base; those in `weights` must have weights.

    Raises ModelError with the component and the file. Does nothing for a hub id.
    """
    for name in names if Path(base).is_dir() else ():
        if name in components:
            check_component(
                Path(base) / name, f"The {name} of {base}", kind=components[name],
                variant=variants.get(name), weights=name in weights,
            )  # fmt: skip


def check_component(
    folder: Path, what: str, *, kind: tuple[str, str], variant: str | None = None, weights: bool = True
) -> None:
    """Check the configurations and weights in the folder of one component.

    `kind`: its library and class. `weights`: whether weights are required. Raises ModelError.
    """
    if not folder.is_dir():
        raise ModelError(f"{what} is missing: the folder {folder} does not exist. {_REMEDY}")
    if kind[1].endswith("Scheduler"):
        _check_config(folder / "scheduler_config.json", what, may_be_empty=True)
        return
    if "Tokenizer" in kind[1]:
        for path in sorted(folder.glob("*config.json")):
            _check_config(path, what, may_be_empty=True)
        return
    config = _check_config(folder / "config.json", what)
    files = sorted(
        path for path in folder.iterdir() if path.suffix == WEIGHTS and LOADABLE.fullmatch(path.name)
    )
    own = [path for path in files if variant_of_file(path.name) == variant]
    for path in own:
        _check_weights(path, what)
    _check_shards(folder, own, what, variant=variant)
    if not files:
        _refuse_pickles(folder, what, kind[0], str(config.get("_class_name", kind[1])))
        if weights:
            raise ModelError(f"{what} has no weights: no {WEIGHTS} file in {folder}. {_REMEDY}")


def _check_config(path: Path, what: str, *, may_be_empty: bool = False) -> Any:
    if not path.exists():
        raise ModelError(f"{what} is incomplete: {path} is missing. {_REMEDY}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} is damaged: {path} is not valid JSON ({error}). {_REMEDY}") from error
    if not isinstance(config, dict) or not (config or may_be_empty):
        fault = "is empty" if config == {} else "is not a mapping"
        raise ModelError(f"{what} is damaged: {path} {fault}. {_REMEDY}")
    return config


def _check_weights(path: Path, what: str) -> None:
    """Check a file by its header, which contains the length of the file."""
    try:
        with safe_open(path, "pt"):
            return
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ModelError(
                    f"{what} has no weights: {path} is a Git LFS pointer. Run `git lfs pull` in the folder."
                ) from error
        raise ModelError(
            f"{what} is damaged: {path} is not a complete safetensors file ({error}). {_REMEDY}"
        ) from error


def _check_shards(folder: Path, files: Collection[Path], what: str, *, variant: str | None) -> None:
    present = {path.name for path in files}
    if not any("-of-" in name for name in present) or any("-of-" not in name for name in present):
        return  # a single file is loaded without an index
    for index in sorted(folder.glob(f"*{WEIGHTS}.index*.json")):
        named = set(_check_config(index, what).get("weight_map", {}).values())
        named = {name for name in named if variant_of_file(name) == variant}
        if missing := sorted(named - present):
            raise ModelError(
                f"{what} is incomplete: {folder / missing[0]} is missing, one of {len(named)} weight files. "
                f"{_REMEDY}"
            )


def _refuse_pickles(folder: Path, what: str, library: str, name: str) -> None:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{what} only has weights as a pickle ({pickles[0]}), and pickles are not loaded; if you trust "
            "their source, convert them to safetensors: "
            f'python -c "from {library} import {name} as C; '
            f"C.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\"."
        )

"""Whether the files of a base's folder are there and whole: checked before any weight is read.

Loading and `plan` both check here. The files of a hub id are not checked; loading reports what the hub says.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scalewise.common.contents import WEIGHTS, variant_of_file
from scalewise.common.errors import ModelError
from scalewise.models.folder import READ

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS = b"version https://git-lfs"
_REMEDY = "Fetch the model again."


def check_folder(
    base: str | Path, components: Mapping[str, tuple[str, str]], *, names: Collection[str],
    weights: Collection[str], variants: Mapping[str, str | None],
) -> None:  # fmt: skip
    """Check the components `names` of a local base; `weights`: those whose weights have to be there.

    ModelError names the component, the file and the remedy. Does nothing for a hub id.
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
    """Check one component's folder: its configurations, and the weights that are there.

    `kind` is its library and class, `weights` whether there have to be any.
    """
    if not folder.is_dir():
        raise ModelError(f"{what} is missing: there is no folder {folder}. {_REMEDY}")
    if kind[1].endswith("Scheduler"):
        _check_config(folder / "scheduler_config.json", what, may_be_empty=True)
        return
    if "Tokenizer" in kind[1]:
        for path in sorted(folder.glob("*config.json")):
            _check_config(path, what, may_be_empty=True)
        return
    config = _check_config(folder / "config.json", what)
    files = sorted(path for path in folder.iterdir() if path.suffix == WEIGHTS and READ.fullmatch(path.name))
    own = [path for path in files if variant_of_file(path.name) == variant]
    for path in own:
        _check_weights(path, what)
    _check_shards(folder, own, what, variant=variant)
    if not files:
        _refuse_pickles(folder, what, kind[0], str(config.get("_class_name", kind[1])))
        if weights:
            raise ModelError(f"{what} has no weights: there is no {WEIGHTS} file in {folder}. {_REMEDY}")


def _check_config(path: Path, what: str, *, may_be_empty: bool = False) -> Any:
    if not path.exists():
        raise ModelError(f"{what} is incomplete: {path} is missing. {_REMEDY}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} is damaged: {path} is not JSON ({error}). {_REMEDY}") from error
    if not isinstance(config, dict) or not (config or may_be_empty):
        held = "is empty" if config == {} else "holds no mapping"
        raise ModelError(f"{what} is damaged: {path} {held}. {_REMEDY}")
    return config


def _check_weights(path: Path, what: str) -> None:
    """Read a file's header, which tells how long the file has to be."""
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
            f"{what} is damaged: {path} is not a whole safetensors file ({error}). {_REMEDY}"
        ) from error


def _check_shards(folder: Path, files: Collection[Path], what: str, *, variant: str | None) -> None:
    there = {path.name for path in files}
    if not any("-of-" in name for name in there) or any("-of-" not in name for name in there):
        return  # a single file is loaded without an index
    for index in sorted(folder.glob(f"*{WEIGHTS}.index*.json")):
        named = set(_check_config(index, what).get("weight_map", {}).values())
        named = {name for name in named if variant_of_file(name) == variant}
        if missing := sorted(named - there):
            raise ModelError(
                f"{what} is incomplete: {folder / missing[0]} is missing, one of {len(named)} files of "
                f"weights. {_REMEDY}"
            )


def _refuse_pickles(folder: Path, what: str, library: str, name: str) -> None:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{what} has its weights as a pickle alone ({pickles[0]}), and pickles are not read; if you "
            "trust their source, convert them to safetensors: "
            f'python -c "from {library} import {name} as C; '
            f"C.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\"."
        )

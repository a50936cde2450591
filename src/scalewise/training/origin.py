"""What a run was begun with: a resumed one must have the same recipe, data and base, wherever they lie."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalewise.common import distributed
from scalewise.common.checkpoint import CheckpointError
from scalewise.common.contents import component_fingerprints
from scalewise.config.recipe import Recipe
from scalewise.data import LatentSet, sets_fingerprint

FREE = {
    "name",
    "about",
    "model.family",
    "model.offload",
    "model.offload_text",
    "train.iterations",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.sample_prompts",
}
"""What may differ between a checkpoint's recipe and the run that resumes it without changing a single bit."""
TUNABLE = ("optimizer.clip", "optimizer.fake_lr", "optimizer.lr")
"""What may be changed on the way, to get past a loss that broke."""
SHARED = ("train.batch", "train.accumulate")
"""With the number of processes, the samples of an update: their product has to stay."""
ELSEWHERE = "start a new run in another folder"


@dataclass(frozen=True)
class Origin:
    """The contents behind a recipe's paths, and the processes of a run."""

    processes: int
    data: str
    """Fingerprint of the sets."""
    kind: str
    """"synthetic" or "images"."""
    base: dict[str, str]
    """Fingerprint of every component of the teacher."""

    @classmethod
    def of(cls, recipe: Recipe, sets: Sequence[LatentSet]) -> Origin:
        """Take the fingerprints of what this run, of `parallel.world()` processes, reads."""
        folder = recipe.model.folder
        base = component_fingerprints(folder, variant=recipe.model.variant)
        return cls(distributed.world(), sets_fingerprint(sets), sets[0].header.kind, base)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored in a checkpoint."""
        return asdict(self)


def check_resume(path: Path, meta: dict[str, Any], recipe: Recipe, origin: Origin | None) -> None:
    """Refuse to resume the checkpoint `path` with another recipe, dataset or base; warn of what may change.

    Contents decide: a dataset or base that was moved may be named anew. `meta` is the checkpoint's; without
    an `origin`, nothing will be trained and only recipes are compared.

    Raises CheckpointError.
    """
    there, here = recipe_of(path, meta).model_dump(mode="json"), recipe.model_dump(mode="json")
    free = FREE | set(TUNABLE) | set(SHARED)
    stored = meta.get("origin")
    if origin is None:
        free |= {"model.base", "model.variant", "model.vae", "data.path"}
    elif stored is not None:
        free |= _same_contents(path, Origin(**stored), origin, recipe=recipe)
    if difference := difference_of(there, here, free=free):
        raise CheckpointError(
            f"The checkpoint {path} belongs to another recipe: {difference}. "
            f"Resume with the recipe.yaml in the run's folder, or {ELSEWHERE}."
        )
    if origin is None:
        return
    if stored is None:
        warnings.warn(
            f"{path} was written by an earlier version and does not say which dataset and base it was "
            "trained on; whether they are still the same is not checked.",
            stacklevel=2,
        )
    _check_samples(path, there["train"], here["train"], before=stored and stored["processes"], now=origin)
    for name in TUNABLE:
        before, now = (values["optimizer"][name.partition(".")[2]] for values in (there, here))
        if before != now:
            warnings.warn(f"{name} was {before} up to {path.name} and is {now} from now on", stacklevel=2)


def recipe_of(path: Path, meta: dict[str, Any]) -> Recipe:
    """The recipe in a checkpoint's meta; a key that has come since then has its default."""
    return Recipe.from_mapping(meta["recipe"], origin=f"the recipe of {path}")


def difference_of(
    one: dict[str, Any], other: dict[str, Any], *, free: Collection[str] = (), prefix: str = ""
) -> str:
    """Describe the first field that is not `free` in which two recipes differ, or return ""."""
    for key in one.keys() | other.keys():
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := difference_of(a, b, free=free, prefix=f"{name}."):
                return found
        elif a != b and name not in free:
            return f"{name} is {json.dumps(a)} there and {json.dumps(b)} here"
    return ""


def _same_contents(path: Path, was: Origin, now: Origin, *, recipe: Recipe) -> set[str]:
    """The keys whose files are what they were, so that their names do not count."""
    same, common = set[str](), was.base.keys() & now.base.keys()
    if changed := sorted(name for name in common if was.base[name] != now.base[name]):
        raise CheckpointError(
            f"The base {recipe.model.base} is not the one that {path} was trained on: the files of "
            f"{', '.join(changed)} differ. Name that one with model.base=..., or {ELSEWHERE}."
        )
    if common:
        same |= {"model.base", "model.variant"}
    if was.data == now.data:
        return same | {"data.path", "model.vae"}
    if was.kind != "images" or now.kind != "images":
        raise CheckpointError(
            f"The dataset {recipe.data.path} is not the one that {path} was trained on: its contents differ. "
            f"Name that one with data.path=..., or {ELSEWHERE}."
        )
    warnings.warn(
        f"The latents of {recipe.data.path} differ from those that {path.name} was trained on (images or "
        "captions were changed, or encoded again on another device); the run goes on with these.",
        stacklevel=3,
    )
    return same


def _check_samples(
    path: Path, there: dict[str, Any], here: dict[str, Any], *, before: int | None, now: Origin
) -> None:
    """Refuse another number of samples an update; warn where it is made up otherwise."""
    shares = [(before or now.processes, there), (now.processes, here)]
    (was, is_now) = ((count, values["batch"], values["accumulate"]) for count, values in shares)
    if was == is_now:
        return
    told = [f"{p} process{'es' if p > 1 else ''} x train.batch={b} x train.accumulate={a}" for p, b, a in
            (was, is_now)]  # fmt: skip
    totals = [p * b * a for p, b, a in (was, is_now)]
    several = "es" if was[0] > 1 else ""
    if totals[0] != totals[1]:
        raise CheckpointError(
            f"{path} was trained on {totals[0]} samples an update ({told[0]}), and here they are "
            f"{totals[1]} ({told[1]}). Start {was[0]} process{several} (torchrun --nproc-per-node), or "
            f"choose train.batch and train.accumulate so that all three multiply to {totals[0]}."
        )
    warnings.warn(
        f"{path.name} was trained by {told[0]}, and now by {told[1]}: the samples of an update are the same, "
        "but sums are rounded otherwise, so the run does not end in the same bits as an uninterrupted one.",
        stacklevel=3,
    )

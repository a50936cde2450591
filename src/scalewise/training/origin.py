"""Checks that a resumed run has the recipe, dataset and base that it was started with, even if moved."""

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

FREE_KEYS = {
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
"""Keys that may change when a run is resumed because they do not affect the trained weights."""
TUNABLE_KEYS = ("optimizer.clip", "optimizer.fake_lr", "optimizer.lr")
"""Keys that may change when a run is resumed, to get past a loss that became NaN or infinite."""
BATCH_KEYS = ("train.batch", "train.accumulate")
"""Keys whose product with the number of processes, the samples per update, must not change."""
NEW_RUN = "start a new run in another folder"


@dataclass(frozen=True)
class Origin:
    """Fingerprints of the dataset and base that a run reads, and its number of processes."""

    processes: int
    data: str
    """Fingerprint of the dataset."""
    kind: str
    """"synthetic" or "images"."""
    base: dict[str, str]
    """Fingerprints of the teacher's components."""

    @classmethod
    def of(cls, recipe: Recipe, sets: Sequence[LatentSet]) -> Origin:
        """Compute the origin of this run, with `distributed.world()` processes."""
        folder = recipe.model.folder
        base = component_fingerprints(folder, variant=recipe.model.variant)
        return cls(distributed.world(), sets_fingerprint(sets), sets[0].header.kind, base)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as stored in a checkpoint."""
        return asdict(self)


def check_resume(path: Path, meta: dict[str, Any], recipe: Recipe, origin: Origin | None) -> None:
    """Raise CheckpointError if the checkpoint `path`, with this `meta`, has another recipe, dataset or base.

    Datasets and bases are compared by contents, so their paths may change. If `origin` is None (no training
    follows), only recipes are compared. Warns about allowed changes that affect the result.
    """
    old, new = recipe_in(path, meta).model_dump(mode="json"), recipe.model_dump(mode="json")
    free = FREE_KEYS | set(TUNABLE_KEYS) | set(BATCH_KEYS)
    stored = meta.get("origin")
    if origin is None:
        free |= {"model.base", "model.variant", "model.vae", "data.path"}
    elif stored is not None:
        free |= _same_contents(path, Origin(**stored), origin, recipe=recipe)
    if difference := describe_difference(old, new, free=free):
        raise CheckpointError(
            f"The checkpoint {path} has another recipe: {difference}. "
            f"Resume with the recipe.yaml in the run's folder, or {NEW_RUN}."
        )
    if origin is None:
        return
    if stored is None:
        warnings.warn(
            f"{path} was written by an earlier version and does not record which dataset and base it was "
            "trained on; they are not checked.",
            stacklevel=2,
        )
    _check_samples(path, old["train"], new["train"], before=stored and stored["processes"], now=origin)
    for name in TUNABLE_KEYS:
        before, now = (values["optimizer"][name.partition(".")[2]] for values in (old, new))
        if before != now:
            warnings.warn(f"{name} was {before} up to {path.name} and is now {now}.", stacklevel=2)


def recipe_in(path: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe in a checkpoint's meta, with defaults for keys that were added since."""
    return Recipe.from_mapping(meta["recipe"], origin=f"the recipe of {path}")


def describe_difference(
    one: dict[str, Any], other: dict[str, Any], *, free: Collection[str] = (), prefix: str = ""
) -> str:
    """Describe the first field, except the `free` ones, in which two recipes differ; "" if there is none."""
    for key in dict.fromkeys([*one, *other]):  # in the order of the recipe
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := describe_difference(a, b, free=free, prefix=f"{name}."):
                return found
        elif a != b and name not in free:
            return f"{name} is {json.dumps(a)} in the checkpoint and {json.dumps(b)} now"
    return ""


def _same_contents(path: Path, was: Origin, now: Origin, *, recipe: Recipe) -> set[str]:
    """Return the keys that name unchanged files, so their values are not compared.

    Raises CheckpointError if a synthetic dataset or the base has changed; warns if an image folder has.
    """
    same, common = set[str](), was.base.keys() & now.base.keys()
    if changed := sorted(name for name in common if was.base[name] != now.base[name]):
        raise CheckpointError(
            f"The base {recipe.model.base} is not the one that {path} was trained on: the files of "
            f"{', '.join(changed)} differ. Set model.base to that one, or {NEW_RUN}."
        )
    if common:
        same |= {"model.base", "model.variant"}
    if was.data == now.data:
        return same | {"data.path", "model.vae"}
    if was.kind != "images" or now.kind != "images":
        raise CheckpointError(
            f"The dataset {recipe.data.path} is not the one that {path} was trained on: its contents differ. "
            f"Set data.path to that one, or {NEW_RUN}."
        )
    warnings.warn(
        f"The latents of {recipe.data.path} differ from those that {path.name} was trained on (images or "
        "captions were changed, or encoded again on another device); training resumes with the new ones.",
        stacklevel=3,
    )
    return same


def _check_samples(
    path: Path, old: dict[str, Any], new: dict[str, Any], *, before: int | None, now: Origin
) -> None:
    """Raise CheckpointError if the number of samples per update changed; warn if its factors did."""
    shares = [(before or now.processes, old), (now.processes, new)]
    (was, is_now) = ((count, values["batch"], values["accumulate"]) for count, values in shares)
    if was == is_now:
        return
    factors = [f"{p} process{'es' if p > 1 else ''} x train.batch={b} x train.accumulate={a}" for p, b, a in
               (was, is_now)]  # fmt: skip
    totals = [p * b * a for p, b, a in (was, is_now)]
    several = "es" if was[0] > 1 else ""
    if totals[0] != totals[1]:
        raise CheckpointError(
            f"{path} was trained with {totals[0]} samples per update ({factors[0]}), but this run has "
            f"{totals[1]} ({factors[1]}). Start {was[0]} process{several} (torchrun --nproc-per-node), or "
            f"choose train.batch and train.accumulate so that the product of all three is {totals[0]}."
        )
    warnings.warn(
        f"{path.name} was trained with {factors[0]}, this run has {factors[1]}: the samples of an update are "
        "the same, but sums are rounded differently, so the result is not bit-identical to an uninterrupted "
        "run.",
        stacklevel=3,
    )

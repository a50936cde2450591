"""A comparison's images on disk, written batch by batch: a stopped comparison goes on behind the last one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalewise.common import checkpoint, distributed
from scalewise.common.contents import component_fingerprints, file_fingerprint
from scalewise.common.images import read_image, save_image
from scalewise.common.results import write_json
from scalewise.config.recipe import Recipe
from scalewise.evaluation.samplers import Contender, Prompts
from scalewise.evaluation.stored_images import DRAWN_FOR, number_of
from scalewise.models.lora import find_file, versions


@dataclass(frozen=True)
class Drawings:
    """The images 0.png, 1.png, ... of one sampler, and beside them what they were drawn for and by what."""

    folder: Path
    prompts: Prompts
    drawn_by: str
    """Changes with whatever decides an image beside its caption and seed (see `drawn_by`)."""

    def begin(self) -> None:
        """Delete images of others, of other prompts and of later numbers; all processes, before any draws."""
        if distributed.is_main():
            usable = self._usable()
            for path in self.folder.glob("*.png"):
                if number_of(path) >= usable:
                    path.unlink()
            told = {
                "captions": self.prompts.captions, "seeds": self.prompts.seeds, "drawn_by": self.drawn_by,
            }  # fmt: skip
            write_json(self.folder / DRAWN_FOR, told)
        distributed.barrier_without_timeout()

    def read(self, numbers: Sequence[int]) -> np.ndarray | None:
        """Some of the images, bytes [N, H, W, 3] or [N, F, H, W, 3]; None unless all of them are there."""
        try:
            return np.stack([read_image(self._path(number)) for number in numbers])
        except (OSError, SyntaxError, ValueError):  # missing or damaged: drawn again
            return None

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Save some images, each wholly or not at all."""
        for number, image in zip(numbers, images, strict=True):
            path = self._path(number)
            os.replace(save_image(image, path.with_name(f".{path.name}")), path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.png"

    def _usable(self) -> int:
        """The first so many images there may be were drawn by the same for the same captions and seeds."""
        try:
            told = json.loads((self.folder / DRAWN_FOR).read_text(encoding="utf-8"))
            there = list(zip(told["captions"], told["seeds"], strict=True))
            if told.get("drawn_by") != self.drawn_by:
                return 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0
        wanted = list(zip(self.prompts.captions, self.prompts.seeds, strict=True))
        same = min(len(there), len(wanted))
        return same if there[:same] == wanted[:same] else 0


def drawn_by(recipe: Recipe, contender: Contender) -> str:
    """A short name of what decides the images of a sampler beside captions and seeds.

    That is its steps, the files of base and student wherever they lie, number types, device and versions; not
    the batch, in which an image differs by rounding at most.
    """
    model = recipe.model.model_dump(mode="json", exclude={"family", "base", "variant"})
    base = component_fingerprints(recipe.model.folder, variant=recipe.model.variant)
    parts: list[Any] = [
        contender.kind, contender.steps, contender.guidance, str(contender.schedule),
        contender.negative_prompt, _student_fingerprint(contender.path), base or recipe.model.base, model,
        recipe.teacher.model_dump(mode="json"), recipe.train.precision, distributed.device().type, versions(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _student_fingerprint(path: Path | None) -> str:
    if path is None:
        return ""
    return file_fingerprint(path / checkpoint.TENSORS if checkpoint.is_checkpoint(path) else find_file(path))

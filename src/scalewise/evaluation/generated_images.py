"""Generated images on disk, saved after every batch so that an interrupted comparison can be resumed."""

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
from scalewise.evaluation.samplers import Prompts, SamplerSpec
from scalewise.evaluation.stored_images import PROMPTS_FILE, image_number
from scalewise.models.lora import find_file, versions


@dataclass(frozen=True)
class GeneratedImages:
    """The images 0.png, 1.png, ... of one sampler, with a JSON file of their prompts and fingerprint."""

    folder: Path
    prompts: Prompts
    fingerprint: str
    """Identifies everything but captions and seeds that determines the images (`sampler_fingerprint`)."""

    def prepare(self) -> None:
        """Delete images of another sampler or of other prompts; call in all processes before generating."""
        if distributed.is_main():
            usable = self._count_usable()
            for path in self.folder.glob("*.png"):
                if image_number(path) >= usable:
                    path.unlink()
            header = {
                "captions": self.prompts.captions, "seeds": self.prompts.seeds, "drawn_by": self.fingerprint,
            }  # fmt: skip
            write_json(self.folder / PROMPTS_FILE, header)
        distributed.barrier_without_timeout()

    def read(self, numbers: Sequence[int]) -> np.ndarray | None:
        """Read images, uint8 [N, H, W, 3] or [N, T, H, W, 3]; None if any is missing or damaged."""
        try:
            return np.stack([read_image(self._path(number)) for number in numbers])
        except (OSError, SyntaxError, ValueError):  # missing or damaged: the batch is generated again
            return None

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Save images, each atomically."""
        for number, image in zip(numbers, images, strict=True):
            path = self._path(number)
            os.replace(save_image(image, path.with_name(f".{path.name}")), path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.png"

    def _count_usable(self) -> int:
        """Return how many leading images in the folder have the same sampler, captions and seeds."""
        try:
            stored = json.loads((self.folder / PROMPTS_FILE).read_text(encoding="utf-8"))
            pairs = list(zip(stored["captions"], stored["seeds"], strict=True))
            if stored.get("drawn_by") != self.fingerprint:
                return 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0
        wanted = list(zip(self.prompts.captions, self.prompts.seeds, strict=True))
        same = min(len(pairs), len(wanted))
        return same if pairs[:same] == wanted[:same] else 0


def sampler_fingerprint(recipe: Recipe, spec: SamplerSpec) -> str:
    """Return a hash of everything but captions and seeds that determines the images of a sampler.

    Includes the settings of the sampler, the contents of the base and student files (not their paths),
    precision, device and library versions. The batch size only changes rounding and is not included.
    """
    model = recipe.model.model_dump(mode="json", exclude={"family", "base", "variant"})
    base = component_fingerprints(recipe.model.folder, variant=recipe.model.variant)
    parts: list[Any] = [
        spec.kind, spec.steps, spec.guidance, str(spec.schedule),
        spec.negative_prompt, _student_fingerprint(spec.path), base or recipe.model.base, model,
        recipe.teacher.model_dump(mode="json"), recipe.train.precision, distributed.device().type, versions(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _student_fingerprint(path: Path | None) -> str:
    if path is None:
        return ""
    return file_fingerprint(path / checkpoint.TENSORS if checkpoint.is_checkpoint(path) else find_file(path))

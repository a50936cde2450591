"""Objects in pictures: a detector of transformers, and a CLIP model that names an object's colour."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scalewise.metrics.clip import ClipScorer
from scalewise.metrics.extras import Device, image_processor, loading, needing, pretrained, refuse_missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GREY = 0x99
"""What covers the surroundings of an object before its colour is judged."""

# The hub's conversions of Mask2Former squeeze pictures to 384 x 384; its authors (arXiv 2112.01527) and
# GenEval show it the shorter side at 800 pixels, on which counting small objects depends.
CONVERTED = (384, 384)
PUBLISHED = {"shortest_edge": 800, "longest_edge": 1333}

ADVICE = "install it, or name another detector."
_OTHER_NAMES = {
    # COCO's names where GenEval's differ ...
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    # ... and Pascal VOC's, which RT-DETR's labels keep.
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Found:
    """One object that a detector found in a picture."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; right and bottom lie just outside."""
    score: float
    mask: np.ndarray | None = None
    """Which pixels belong to it, bool [H, W]; None from detectors that give boxes alone."""


class Detector:
    """Mask2Former, or any object detection model of transformers, with the names that GenEval uses."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        # As GenEval writes them, by the model's own numbers.
        self.names = {int(i): common_name(label) for i, label in model.config.id2label.items()}
        self._inputs = inspect.signature(model.forward).parameters
        size = getattr(processor, "size", None)
        self._settings: dict[str, Any] = {}
        if self.segments and size is not None and (size.get("height"), size.get("width")) == CONVERTED:
            self._settings["size"] = PUBLISHED

    @classmethod
    def load(cls, source: str, device: Device) -> Detector:
        """Read a model with its image processor, from a folder or the hub; computes in float32."""
        from transformers import (
            AutoConfig,
            AutoModelForObjectDetection,
            Mask2FormerForUniversalSegmentation,
        )

        with needing(f"The detector {source!r}", ADVICE), loading("a detector", source), _untrained():
            segments = AutoConfig.from_pretrained(source).model_type == "mask2former"
            kind = Mask2FormerForUniversalSegmentation if segments else AutoModelForObjectDetection
            processor = image_processor(source)
            model, missing = pretrained(kind, source)
        # Buffers aside: Mask2Former has one of its training loss.
        refuse_missing(source, model, missing & {name for name, _ in model.named_parameters()})
        return cls(model.to(device), processor)

    @property
    def segments(self) -> bool:
        """Whether the model gives masks."""
        return self.model.config.model_type == "mask2former"

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError if the model's labels lack one of the names."""
        known = set(self.names.values())
        lacking = sorted(set(names) - known)
        if lacking:
            few = ", ".join(lacking[:5]) + (" ..." if lacking[5:] else "")
            raise ValueError(
                f"The detector has no label for {few} among its {len(known)}; name a detector of COCO's 80 "
                "objects, or leave out prompts of what it lacks."
            )

    @torch.no_grad()
    def find(self, picture: np.ndarray, *, above: float = 0.3) -> list[Found]:
        """Objects in one picture, bytes [H, W, 3], whose score is above a threshold, the surest first."""
        height, width = picture.shape[:2]
        device = next(self.model.parameters()).device
        prepared = self.processor(Image.fromarray(picture), return_tensors="pt", **self._settings)
        inputs = {name: value.to(device) for name, value in prepared.items() if name in self._inputs}
        seen = self.model(**inputs)
        if self.segments:
            shown = inputs["pixel_values"].shape[-2:]
            found = list(self._masks(seen, shown, (height, width), above))
        else:
            [boxes] = self.processor.post_process_object_detection(
                seen, threshold=above, target_sizes=[(height, width)]
            )
            found = [
                Found(self.names[label], _inside(box, height, width), score)
                for label, box, score in zip(
                    boxes["labels"].tolist(), boxes["boxes"].tolist(), boxes["scores"].tolist(), strict=True
                )
            ]
        return sorted(found, key=lambda one: -one.score)

    def _masks(self, seen: Any, shown: Sequence[int], size: tuple[int, int], above: float) -> Iterator[Found]:
        """Mask2Former's own reading of its output: the score is the class's times the mask's mean.

        Masks are brought to the size that was shown and then to the picture's, and cut at one half there;
        the processor's own function fixes the first size at 384 x 384 and rounds masks to its pixels.
        """
        classes = seen.class_queries_logits[0].softmax(-1)[:, :-1]
        scores, places = classes.flatten().topk(len(classes))
        # A mask's mean is at most 1, so that others cannot come out above.
        scores, places = scores[scores > above], places[scores > above]
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, classes.shape[1])
            logits = seen.masks_queries_logits[:, query : query + 1]
            for target in (tuple(shown), size):
                logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)
            mask = logits[0, 0] > 0
            sure = float((logits[0, 0].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if score * sure > above:
                yield Found(self.names[label], _bounds(mask), score * sure, mask.cpu().numpy())


class ColourJudge:
    """Names the colour of an object by a CLIP model, as GenEval does (arXiv 2310.11513)."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self._kept: dict[str, Tensor] = {}

    def __call__(self, picture: np.ndarray, found: Found) -> str:
        """One of the ten colours, for an object that was found in bytes [H, W, 3]."""
        features = self.scorer.pictures(crop(picture, found)[None])[0]
        return COLOURS[int((self._colours(found.name) @ features).argmax())]

    def _colours(self, name: str) -> Tensor:
        """An embedding for each colour of an object [10, D], rows of length 1: the mean of three wordings."""
        if name not in self._kept:
            texts = [
                text
                for colour in COLOURS
                for text in (
                    f"a photo of a {colour} {name}",
                    f"a photo of a {colour}-colored {name}",
                    f"a photo of a {colour} object",
                )
            ]
            wordings = self.scorer.texts(texts).unflatten(0, (len(COLOURS), 3))
            self._kept[name] = F.normalize(wordings.mean(1), dim=-1)
        return self._kept[name]


def common_name(label: str) -> str:
    """GenEval's name for what a detector's label means."""
    return _OTHER_NAMES.get(label.lower(), label.lower())


def crop(picture: np.ndarray, found: Found) -> np.ndarray:
    """The box of an object, bytes [h, w, 3] of at least one pixel, all grey but its mask if it has one."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    if found.mask is not None:
        picture = np.where(found.mask[..., None], picture, np.uint8(GREY))
    return np.ascontiguousarray(picture[top : max(bottom, top + 1), left : max(right, left + 1)])


def _bounds(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _inside(box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    """Cut a box to the picture."""
    left, top, right, bottom = (
        min(max(edge, 0.0), float(end)) for edge, end in zip(box, (width, height, width, height), strict=True)
    )
    return left, top, right, bottom


@contextmanager
def _untrained() -> Iterator[None]:
    """Let Mask2Former be built without scipy: its training loss alone needs it, and nothing is trained."""
    from transformers.models.mask2former import modeling_mask2former as library

    with patch.object(library, "requires_backends", lambda *_: None, create=True):
        yield

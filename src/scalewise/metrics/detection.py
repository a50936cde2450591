"""Object detection with a transformers model, and color classification of objects with CLIP."""

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
from scalewise.metrics.extras import (
    Device,
    check_no_weights_missing,
    explain_load_errors,
    load_image_processor,
    load_pretrained,
    require_package,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GRAY = 0x99
"""Gray value of pixels outside an object's mask when its color is classified."""

# The hub's conversions of Mask2Former resize images to 384 x 384. Its authors (arXiv 2112.01527) and GenEval
# resize the shorter side to 800 pixels, which is needed to count small objects.
HUB_SIZE = (384, 384)
AUTHORS_SIZE = {"shortest_edge": 800, "longest_edge": 1333}

ADVICE = "install it, or name another detector."
_OTHER_NAMES = {
    # COCO's names that differ from GenEval's ...
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    # ... and Pascal VOC's names, which RT-DETR uses.
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Detection:
    """An object detected in an image."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    score: float
    mask: np.ndarray | None = None
    """Pixels of the object, bool [H, W]; None if the detector predicts only boxes."""


class Detector:
    """Mask2Former or another object detection model of transformers; labels are converted to GenEval's
    names.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.names = {int(i): common_name(label) for i, label in model.config.id2label.items()}
        self._inputs = inspect.signature(model.forward).parameters
        size = getattr(processor, "size", None)
        self._settings: dict[str, Any] = {}
        if self.segments and size is not None and (size.get("height"), size.get("width")) == HUB_SIZE:
            self._settings["size"] = AUTHORS_SIZE

    @classmethod
    def load(cls, source: str, device: Device) -> Detector:
        """Load a model and its image processor from a folder or hub id; it computes in float32."""
        from transformers import (
            AutoConfig,
            AutoModelForObjectDetection,
            Mask2FormerForUniversalSegmentation,
        )

        with (
            require_package(f"The detector {source!r}", ADVICE),
            explain_load_errors("a detector", source),
            _without_scipy(),
        ):
            segments = AutoConfig.from_pretrained(source).model_type == "mask2former"
            kind = Mask2FormerForUniversalSegmentation if segments else AutoModelForObjectDetection
            processor = load_image_processor(source)
            model, missing = load_pretrained(kind, source)
        # Buffers may be missing: Mask2Former has one that only its training loss uses.
        check_no_weights_missing(source, model, missing & {name for name, _ in model.named_parameters()})
        return cls(model.to(device), processor)

    @property
    def segments(self) -> bool:
        """Whether the model predicts masks."""
        return self.model.config.model_type == "mask2former"

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError if one of the names is not among the model's labels."""
        known = set(self.names.values())
        missing = sorted(set(names) - known)
        if missing:
            few = ", ".join(missing[:5]) + (" ..." if missing[5:] else "")
            raise ValueError(
                f"The detector has {len(known)} labels, none for {few}; use a detector of COCO's 80 objects, "
                "or leave out prompts with those objects."
            )

    @torch.no_grad()
    def find(self, image: np.ndarray, *, threshold: float = 0.3) -> list[Detection]:
        """Detect objects in a uint8 image [H, W, 3] with a score above a threshold, highest score first."""
        height, width = image.shape[:2]
        device = next(self.model.parameters()).device
        prepared = self.processor(Image.fromarray(image), return_tensors="pt", **self._settings)
        inputs = {name: value.to(device) for name, value in prepared.items() if name in self._inputs}
        output = self.model(**inputs)
        if self.segments:
            input_size = inputs["pixel_values"].shape[-2:]
            detections = list(self._masks(output, input_size, (height, width), threshold))
        else:
            [boxes] = self.processor.post_process_object_detection(
                output, threshold=threshold, target_sizes=[(height, width)]
            )
            detections = [
                Detection(self.names[label], _clip_box(box, height, width), score)
                for label, box, score in zip(
                    boxes["labels"].tolist(), boxes["boxes"].tolist(), boxes["scores"].tolist(), strict=True
                )
            ]
        return sorted(detections, key=lambda one: -one.score)

    def _masks(
        self, output: Any, input_size: Sequence[int], size: tuple[int, int], threshold: float
    ) -> Iterator[Detection]:
        """Convert Mask2Former's output as its authors do: score = class probability x mean mask probability.

        Masks are resized to the model's input size, then to the image size, and thresholded there. The
        processor's function always resizes to 384 x 384 and thresholds at that size.
        """
        classes = output.class_queries_logits[0].softmax(-1)[:, :-1]
        scores, indices = classes.flatten().topk(len(classes))
        # The mean mask probability is at most 1, so lower class probabilities cannot exceed the threshold.
        scores, indices = scores[scores > threshold], indices[scores > threshold]
        for score, index in zip(scores.tolist(), indices.tolist(), strict=True):
            query, label = divmod(index, classes.shape[1])
            logits = output.masks_queries_logits[:, query : query + 1]
            for target in (tuple(input_size), size):
                logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)
            mask = logits[0, 0] > 0
            mask_score = float((logits[0, 0].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if score * mask_score > threshold:
                yield Detection(self.names[label], _mask_box(mask), score * mask_score, mask.cpu().numpy())


class ColorClassifier:
    """Classifies the color of an object with CLIP, as GenEval does (arXiv 2310.11513)."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self._embeddings: dict[str, Tensor] = {}

    def __call__(self, image: np.ndarray, detection: Detection) -> str:
        """Return one of the ten colors for an object detected in a uint8 image [H, W, 3]."""
        features = self.scorer.embed_images(crop(image, detection)[None])[0]
        return COLORS[int((self._colors(detection.name) @ features).argmax())]

    def _colors(self, name: str) -> Tensor:
        """Embed the ten colors of an object, averaged over three prompt templates: normalized [10, D]."""
        if name not in self._embeddings:
            texts = [
                text
                for color in COLORS
                for text in (
                    f"a photo of a {color} {name}",
                    f"a photo of a {color}-colored {name}",
                    f"a photo of a {color} object",
                )
            ]
            embeddings = self.scorer.embed_texts(texts).unflatten(0, (len(COLORS), 3))
            self._embeddings[name] = F.normalize(embeddings.mean(1), dim=-1)
        return self._embeddings[name]


def common_name(label: str) -> str:
    """Convert a detector's label to GenEval's name."""
    return _OTHER_NAMES.get(label.lower(), label.lower())


def crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """Crop an object's box from a uint8 image [H, W, 3]: uint8 [h, w, 3], gray outside its mask if it has
    one.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    if detection.mask is not None:
        image = np.where(detection.mask[..., None], image, np.uint8(GRAY))
    return np.ascontiguousarray(image[top : max(bottom, top + 1), left : max(right, left + 1)])


def _mask_box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _clip_box(box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    """Clip a box to the image."""
    left, top, right, bottom = (
        min(max(edge, 0.0), float(end)) for edge, end in zip(box, (width, height, width, height), strict=True)
    )
    return left, top, right, bottom


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Allow building Mask2Former without scipy, which only its training loss needs."""
    from transformers.models.mask2former import modeling_mask2former as library

    with patch.object(library, "requires_backends", lambda *_: None, create=True):
        yield

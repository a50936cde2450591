"""Three dimensions of VBench (arXiv 2311.17982), those that need only common image models.

Subject consistency uses DINO features of frames, background consistency CLIP features, temporal flickering
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalewise.metrics.base import Metric
from scalewise.metrics.clip import ClipScorer, from_bytes, resize_and_crop
from scalewise.metrics.extras import Device, Extra
from scalewise.metrics.features import CHUNK, VisionFeatures


def consistency(features: Tensor) -> Tensor:
    """Compute the consistency [] of a video from features of its frames [T, D]; 1 for identical frames.

    Mean over frames 2 .. T of the cosine similarities to the previous and to the first frame, clamped to 0.
    """
    rows = F.normalize(features.double(), dim=-1)
    before, first = (rows[1:] * rows[:-1]).sum(-1), (rows[1:] * rows[:1]).sum(-1)
    return ((before.clamp(min=0) + first.clamp(min=0)) / 2).mean()


def steadiness(video: np.ndarray) -> float:
    """Compute 1 - mean absolute difference of consecutive frames / 255 of a uint8 video [T, H, W, 3]."""
    frames = video.astype(np.int16)
    return 1 - float(np.abs(frames[1:] - frames[:-1]).mean()) / 255


class VideoScorer:
    """Scores videos of at least two frames with DINO and CLIP."""

    def __init__(self, subject: VisionFeatures, background: ClipScorer) -> None:
        self.subject, self.background = subject, background

    @classmethod
    def load(cls, source: str, device: Device) -> VideoScorer:
        """Load the models of `source`: "DINO,CLIP", two hub ids or folders."""
        parts = source.split(",")
        if len(parts) != 2:
            raise ValueError(
                f"Cannot parse the models {source!r} of the metric vbench; write vbench=DINO,CLIP with a "
                "hub id "
                "or folder for each."
            )
        resize = partial(resize_and_crop, antialias=False)  # as in VBench
        return cls(
            VisionFeatures.load(parts[0], device), ClipScorer.load(parts[1], device=device, resize=resize)
        )

    @torch.no_grad()
    def _subject(self, video: np.ndarray) -> Tensor:
        chunks = (video[start : start + CHUNK] for start in range(0, len(video), CHUNK))
        return torch.cat([self.subject.extract_uncropped(from_bytes(chunk)) for chunk in chunks])

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return one value per video [N] for uint8 videos [N, T, H, W, 3]; see `FeatureExtractor`."""
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(
                f"The metric vbench needs videos of at least 2 frames, [N, T, H, W, 3]; got shape "
                f"{images.shape}."
            )
        subject, background, steady = [], [], []
        for video in images:
            subject.append(consistency(self._subject(video)))
            background.append(consistency(self.background.embed_images(video)))
            steady.append(steadiness(video))
        return {
            "vbench_subject": torch.stack(subject).float(),
            "vbench_background": torch.stack(background).float(),
            "vbench_steadiness": torch.tensor(steady),
        }


def _metric(name: str, title: str, about: str) -> Metric:
    return Metric(
        name=name, title=title, better="higher", bounds=(0, 1), percent=True, about=about,
        statistic=lambda features: features.mean_output(name),
    )  # fmt: skip


EXTRA = Extra(
    name="vbench",
    load=VideoScorer.load,
    source="facebook/dino-vitb16,openai/clip-vit-base-patch32",
    videos=True,
    metrics=(
        _metric(
            "vbench_subject",
            "Subject consistency",
            "VBench: similarity of the frames of a video in DINO features",
        ),
        _metric(
            "vbench_background",
            "Background consistency",
            "VBench: similarity of the frames of a video in CLIP features",
        ),
        _metric(
            "vbench_steadiness",
            "Temporal flickering",
            "VBench: 100% minus the mean pixel difference of consecutive frames; 100% means no change",
        ),
    ),
)

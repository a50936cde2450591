"""Three dimensions of VBench (arXiv 2311.17982) that need common image models only; its others are not here.

Subject consistency: DINO features of frames; background consistency: CLIP's; temporal flickering: pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalewise.metrics.base import Metric
from scalewise.metrics.clip import ClipScorer, fit, from_bytes
from scalewise.metrics.extras import Device, Extra
from scalewise.metrics.features import CHUNK, VisionFeatures


def consistency(features: Tensor) -> Tensor:
    """How alike the frames of one video are, from their features [F, D]; 1 is a still.

    Mean over frames 2 .. F of the mean cosine to the frame before and to the first one, negative ones as 0.
    """
    rows = F.normalize(features.double(), dim=-1)
    before, first = (rows[1:] * rows[:-1]).sum(-1), (rows[1:] * rows[:1]).sum(-1)
    return ((before.clamp(min=0) + first.clamp(min=0)) / 2).mean()


def steadiness(video: np.ndarray) -> float:
    """1 less the mean absolute change from frame to frame of bytes [F, H, W, 3], over 255; 1 is a still."""
    frames = video.astype(np.int16)
    return 1 - float(np.abs(frames[1:] - frames[:-1]).mean()) / 255


class VideoExaminer:
    """Judges videos of two frames or more, each by itself."""

    def __init__(self, subject: VisionFeatures, background: ClipScorer) -> None:
        self.subject, self.background = subject, background

    @classmethod
    def load(cls, source: str, device: Device) -> VideoExaminer:
        """`source`: "DINO,CLIP", two hub ids or folders."""
        parts = source.split(",")
        if len(parts) != 2:
            raise ValueError(
                f"The metric vbench takes two models, not {source!r}: write vbench=DINO,CLIP with a hub id "
                "or folder for each."
            )
        bring = partial(fit, antialias=False)  # as VBench resizes
        return cls(
            VisionFeatures.load(parts[0], device), ClipScorer.load(parts[1], device=device, bring=bring)
        )

    @torch.no_grad()
    def _subject(self, video: np.ndarray) -> Tensor:
        chunks = (video[start : start + CHUNK] for start in range(0, len(video), CHUNK))
        return torch.cat([self.subject.whole(from_bytes(chunk)) for chunk in chunks])

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """One value per video of bytes [N, F, H, W, 3]; see `Examiner`."""
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(
                f"The metric vbench judges videos of two frames or more, not an array of {images.shape}."
            )
        subject, background, steady = [], [], []
        for video in images:
            subject.append(consistency(self._subject(video)))
            background.append(consistency(self.background.pictures(video)))
            steady.append(steadiness(video))
        return {
            "vbench_subject": torch.stack(subject).float(),
            "vbench_background": torch.stack(background).float(),
            "vbench_steadiness": torch.tensor(steady),
        }


def _metric(name: str, title: str, about: str) -> Metric:
    return Metric(
        name=name, title=title, better="higher", bounds=(0, 1), percent=True, about=about,
        statistic=lambda seen: seen.mean_look(name),
    )  # fmt: skip


EXTRA = Extra(
    name="vbench",
    load=VideoExaminer.load,
    source="facebook/dino-vitb16,openai/clip-vit-base-patch32",
    videos=True,
    metrics=(
        _metric(
            "vbench_subject",
            "Subject consistency",
            "VBench: how alike the frames of a video are, by DINO",
        ),
        _metric(
            "vbench_background",
            "Background consistency",
            "VBench: how alike the frames of a video are, by CLIP",
        ),
        _metric(
            "vbench_steadiness",
            "Temporal flickering",
            "VBench: 100% less the mean change of a pixel from frame to frame; a still has 100%",
        ),
    ),
)

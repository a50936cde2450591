"""Judges of CLIP's kind that were tuned on people's choices between pictures: PickScore and HPSv2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from scalewise.metrics.base import Metric
from scalewise.metrics.clip import ClipScorer, letterbox
from scalewise.metrics.extras import Device, Extra

# PickScore's authors publish the model alone and name this one's tokenizer and image processor.
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CosineExaminer:
    """100 times the cosine between a picture and its caption in a CLIP model's features."""

    def __init__(self, name: str, scorer: ClipScorer) -> None:
        self.name, self.scorer = name, scorer

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """One value per image [N]; see `Examiner`."""
        different = list(dict.fromkeys(captions))
        place = {caption: i for i, caption in enumerate(different)}
        texts = self.scorer.texts(different)[[place[caption] for caption in captions]]
        return {self.name: 100 * (self.scorer.pictures(images) * texts).sum(-1)}


def _pickscore(source: str, device: Device) -> CosineExaminer:
    beside = Path(source).exists() and (Path(source) / "preprocessor_config.json").exists()
    processor = source if beside else PICK_PROCESSOR
    return CosineExaminer("pickscore", ClipScorer.load(source, device=device, processor=processor))


def _hpsv2(source: str, device: Device) -> CosineExaminer:
    # Unlike CLIP's own, its authors' preprocessing keeps all of a picture that is not square.
    return CosineExaminer("hpsv2", ClipScorer.load(source, device=device, bring=letterbox))


# Its logit scale is 100 exactly (arXiv 2305.01569), so that the score is 100 times the cosine.
PICKSCORE = Extra(
    name="pickscore", load=_pickscore, source="yuvalkirstain/PickScore_v1",
    metrics=(Metric(
        name="pickscore", title="PickScore", better="higher", bounds=(-100, 100), digits=2,
        statistic=lambda seen: seen.mean_look("pickscore"),
        about="100 times the cosine between picture and caption in a CLIP tuned on people's choices",
    ),),
)  # fmt: skip

# The authors' weights (arXiv 2306.09341) are a pickle of open_clip's: a copy in transformers' layout is
# needed.
HPSV2 = Extra(
    name="hpsv2", load=_hpsv2,
    metrics=(Metric(
        name="hpsv2", title="HPSv2", better="higher", bounds=(-100, 100), digits=2,
        statistic=lambda seen: seen.mean_look("hpsv2"),
        about="100 times the cosine between picture and caption in a CLIP tuned on people's rankings",
    ),),
)  # fmt: skip

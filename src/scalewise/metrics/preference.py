"""PickScore and HPSv2: CLIP models fine-tuned on human preferences between images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from scalewise.metrics.base import Metric
from scalewise.metrics.clip import ClipScorer, letterbox
from scalewise.metrics.extras import Device, Extra

# PickScore is published without tokenizer and image processor; its authors use those of this model.
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CosineScorer:
    """Scores an image by 100 times the cosine similarity of its and its caption's CLIP embeddings."""

    def __init__(self, name: str, scorer: ClipScorer) -> None:
        self.name, self.scorer = name, scorer

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return one value per image [N] for uint8 images [N, H, W, 3]; see `FeatureExtractor`."""
        distinct = list(dict.fromkeys(captions))
        index = {caption: i for i, caption in enumerate(distinct)}
        texts = self.scorer.embed_texts(distinct)[[index[caption] for caption in captions]]
        return {self.name: 100 * (self.scorer.embed_images(images) * texts).sum(-1)}


def _pickscore(source: str, device: Device) -> CosineScorer:
    complete = Path(source).exists() and (Path(source) / "preprocessor_config.json").exists()
    processor = source if complete else PICK_PROCESSOR
    return CosineScorer("pickscore", ClipScorer.load(source, device=device, processor=processor))


def _hpsv2(source: str, device: Device) -> CosineScorer:
    # HPSv2's preprocessing pads images that are not square, while CLIP's crops them.
    return CosineScorer("hpsv2", ClipScorer.load(source, device=device, resize=letterbox))


# PickScore's logit scale is exactly 100 (arXiv 2305.01569), so its score is 100 times the cosine similarity.
PICKSCORE = Extra(
    name="pickscore", load=_pickscore, source="yuvalkirstain/PickScore_v1",
    metrics=(Metric(
        name="pickscore", title="PickScore", better="higher", bounds=(-100, 100), digits=2,
        statistic=lambda features: features.mean_output("pickscore"),
        about="100 times the cosine similarity of image and caption in a CLIP tuned on human choices",
    ),),
)  # fmt: skip

# The authors' weights (arXiv 2306.09341) are an open_clip pickle, so the user must name a copy in
# transformers'
# layout.
HPSV2 = Extra(
    name="hpsv2", load=_hpsv2,
    metrics=(Metric(
        name="hpsv2", title="HPSv2", better="higher", bounds=(-100, 100), digits=2,
        statistic=lambda features: features.mean_output("hpsv2"),
        about="100 times the cosine similarity of image and caption in a CLIP tuned on human rankings",
    ),),
)  # fmt: skip

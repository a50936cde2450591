"""Scorer based on CLIP: embeddings of images and captions, CLIP score and prompt match."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scalewise.method.rng import generator
from scalewise.metrics.base import ImageFeatures, Metric, Statistic
from scalewise.metrics.extras import (
    check_no_weights_missing,
    explain_load_errors,
    find_file,
    load_image_processor,
    load_pretrained,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

CHUNK = 64
Resize = Callable[[Tensor, int], Tensor]
"""Resizes pixels [N, 3, H, W] in [-1, 1] to a square of the given side S: [N, 3, S, S]."""
_PREPROCESSING = "preprocessor_config.json"


class ClipScorer:
    """Embeds images and captions with a `transformers.CLIPModel`; embeddings are normalized to length 1."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, *, mean: Sequence[float] = (0.5,) * 3,
                 std: Sequence[float] = (0.5,) * 3, resize: Resize | None = None,
                 processor: Any = None) -> None:  # fmt: skip
        """Wrap a model; `mean` and `std` normalize pixels in [0, 1] (the default results in [-1, 1]).

        `resize` resizes pixels to a square (default: `resize_and_crop`). `processor` preprocesses uint8
        images; without it, or if `resize` is given, uint8 images are converted to pixels and resized.
        """
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.resize = resize or resize_and_crop
        self.processor: Any = processor if resize is None else None
        self.mean, self.std = tuple(mean), tuple(std)
        self.size = int(model.config.vision_config.image_size)
        positions = int(model.config.text_config.max_position_embeddings)
        self.max_tokens = min(tokenizer.model_max_length, positions)

    @classmethod
    def load(
        cls, source: str | Path, *, device: torch.device | str = "cpu", processor: str | Path | None = None,
        resize: Resize | None = None,
    ) -> ClipScorer:  # fmt: skip
        """Load a CLIPModel with tokenizer and preprocessor_config.json, from a folder or hub id, in float32.

        `processor` is the folder or hub id of the tokenizer and preprocessor_config.json; None uses `source`.
        """
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        for needed in ("config.json", _PREPROCESSING):
            if Path(source).exists() and processor is None and not (Path(source) / needed).exists():
                raise ValueError(
                    f"{source} cannot be used as the scorer because {needed} is missing; use a folder with a "
                    "CLIPModel, its tokenizer and its image processor."
                )
        with explain_load_errors("a CLIP model", str(source)):
            settings = json.loads(
                find_file(str(processor or source), _PREPROCESSING).read_text(encoding="utf-8")
            )
            mean, std = settings["image_mean"], settings["image_std"]
            if (kind := AutoConfig.from_pretrained(source).model_type) != "clip":
                raise ValueError(f"its model type is {kind!r}, not 'clip'")
            model, missing = load_pretrained(CLIPModel, source)
            tokenizer = CLIPTokenizer.from_pretrained(processor or source)
            prepare = load_image_processor(processor or source)
        check_no_weights_missing(source, model, missing)
        _check_vocabulary(source, tokenizer, model)
        return cls(model.to(device), tokenizer, mean=mean, std=std, resize=resize, processor=prepare)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Save to a folder that `load` and transformers' own classes can read."""
        weights = {name: value.to(dtype) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        settings = {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": self.size}, "resample": 3,  # bicubic
            "do_center_crop": True, "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
        (folder / _PREPROCESSING).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @torch.no_grad()
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed pixels [N, 3, H, W] in [-1, 1]: normalized float32 [N, D] on the CPU.

        Pixels are resized to the model's input size (by default antialiased bicubic, then a center crop).
        """
        parts = [self._embed(chunk.to(self.device).float()) for chunk in pixels.split(CHUNK)]
        return torch.cat(parts).cpu()

    def embed_images(self, images: np.ndarray) -> Tensor:
        """Embed uint8 images [N, H, W, 3], preprocessed by the model's processor if there is one: float32 [N,
        D].
        """
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        if self.processor is None:
            return torch.cat([self.embed_pixels(from_bytes(chunk)) for chunk in chunks])
        return torch.cat([self._processed(chunk) for chunk in chunks])

    @torch.no_grad()
    def _processed(self, images: np.ndarray) -> Tensor:
        # Without input_data_format, an image with 3 rows is taken for channels-first.
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        prepared = self.processor([Image.fromarray(image) for image in images], **options)
        return self._project(prepared.pixel_values.to(self.device)).cpu()

    def _embed(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        fitted = (self.resize(pixels, self.size) + 1) / 2
        return self._project((fitted - mean) / std)

    def _project(self, prepared: Tensor) -> Tensor:
        pooled = self.model.vision_model(prepared).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed K captions: normalized float32 [K, D] on the CPU; captions that are too long are
        truncated.
        """
        parts = []
        for start in range(0, len(prompts), CHUNK):
            tokens = self.tokenizer(
                list(prompts[start : start + CHUNK]), padding="max_length", max_length=self.max_tokens,
                truncation=True, return_tensors="pt",
            ).input_ids  # fmt: skip
            pooled = self.model.text_model(tokens.to(self.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(parts)


def _check_vocabulary(source: str | Path, tokenizer: CLIPTokenizer, model: CLIPModel) -> None:
    """Raise ValueError if the tokenizer's vocabulary is much smaller than the model's."""
    words, known = len(tokenizer), model.config.text_config.vocab_size
    # If tokenizer files are missing, transformers silently builds a tokenizer with a few tokens.
    if words < known / 2:
        raise ValueError(
            f"The tokenizer of {source} has {words} tokens, the model {known}; add the missing files "
            "(tokenizer.json, or vocab.json and merges.txt)."
        )


def from_bytes(images: np.ndarray) -> Tensor:
    """Convert uint8 images [N, H, W, 3] to pixels [N, 3, H, W] in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def resize_shorter_side(
    pixels: Tensor, size: int, *, mode: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Resize pixels [N, 3, H, W] to [N, 3, h, w] with shorter side `size`; the longer side is rounded
    down.
    """
    height, width = pixels.shape[-2:]
    if min(height, width) == size:
        return pixels
    scaled = [side * size // min(height, width) for side in (height, width)]
    return F.interpolate(pixels, size=scaled, mode=mode, antialias=antialias, align_corners=False)


def letterbox(pixels: Tensor, size: int) -> Tensor:
    """Resize pixels [N, 3, H, W] in [-1, 1] to longer side `size` S, centered on black: [N, 3, S, S].

    Same as HPSv2's preprocessing: overshoot of the bicubic filter is not clamped, and resizing is antialiased
    as in torchvision 0.17 and later.
    """
    height, width = pixels.shape[-2:]
    scaled = [max(1, round(side * size / max(height, width))) for side in (height, width)]
    if scaled != [height, width]:
        pixels = F.interpolate(pixels, size=scaled, mode="bicubic", antialias=True, align_corners=False)
    high, wide = (size - side for side in scaled)
    return F.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=-1.0)


def resize_and_crop(pixels: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Resize pixels [N, 3, H, W] in [-1, 1] to shorter side `size` S and crop the center: [N, 3, S, S]."""
    pixels = resize_shorter_side(pixels, size, antialias=antialias)
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size].clamp(-1, 1)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Compute 100 times the mean cosine of image embeddings [N, D] and their captions' embeddings [N, D]."""
    return 100 * float(F.cosine_similarity(images.double(), texts.double(), dim=-1).mean())


def prompt_match(images: Tensor, captions: Tensor, own: Tensor, *, of: int = 50, seed: int = 0) -> Tensor:
    """Return for each image [N, D] whether its caption ranks first among `of` distinct ones: bool [N].

    `captions` [K, D] are embeddings of distinct captions; `own` [N] is the index of each image's caption. The
    other `of` - 1 captions are chosen at random by the image's index and the seed. Chance level is 1 / `of`;
    a tie counts as a miss. Raises ValueError if K < `of`.
    """
    if len(captions) < of:
        raise ValueError(
            f"Prompt match among {of} captions needs at least {of} distinct captions; got {len(captions)}. "
            "Use more captions."
        )
    hits = []
    for i, index in enumerate(own.tolist()):
        others = torch.randperm(len(captions) - 1, generator=generator("prompt match", seed, i))[: of - 1]
        others += others >= index
        similarity = captions[others] @ images[i]
        hits.append(bool(captions[index] @ images[i] > similarity.max()))
    return torch.tensor(hits)


def _score(features: ImageFeatures) -> Statistic | None:
    if features.images is None or features.captions is None:
        return None
    return features.mean_of(100 * (features.images * features.captions[features.prompt]).sum(-1))


def _match(features: ImageFeatures) -> Statistic | None:
    if features.images is None or features.captions is None or len(features.captions) < 50:
        return None
    return features.mean_of(prompt_match(features.images, features.captions, features.prompt))


METRICS = (
    Metric(
        name="clip_score", title="CLIP score", better="higher", statistic=_score, bounds=(-100, 100),
        digits=1,
        about="100 times the cosine similarity of image and caption embeddings of the scorer",
    ),
    Metric(
        name="prompt_match", title="Prompt match", better="higher", statistic=_match, bounds=(0, 1),
        percent=True, share=True,
        about="share of images whose caption ranks first among 49 random other captions; chance is 2%",
    ),
)  # fmt: skip

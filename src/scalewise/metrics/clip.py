"""A CLIP model as judge: features of images and captions, CLIP score, match of images with prompts."""

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
from scalewise.metrics.base import Metric, Seen, Statistic
from scalewise.metrics.extras import find_file, image_processor, loading, pretrained, refuse_missing

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

CHUNK = 64
Bring = Callable[[Tensor, int], Tensor]
"""(pixels [N, 3, H, W] in [-1, 1], side) -> pixels of a square with that side."""
_PREPROCESSING = "preprocessor_config.json"


class ClipScorer:
    """A `transformers.CLIPModel` that embeds images and captions as rows of length 1."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, *, mean: Sequence[float] = (0.5,) * 3,
                 std: Sequence[float] = (0.5,) * 3, bring: Bring | None = None,
                 processor: Any = None) -> None:  # fmt: skip
        """`mean` and `std` normalise pixels in [0, 1]; 0.5 and 0.5 leave [-1, 1] as it is.

        `processor` prepares images of bytes. `bring` makes tensors square (default: `fit`); without a
        processor, or where its authors resize tensors, images of bytes as well.
        """
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.bring = bring or fit
        self.processor: Any = processor if bring is None else None
        self.mean, self.std = tuple(mean), tuple(std)
        self.size = int(model.config.vision_config.image_size)
        positions = int(model.config.text_config.max_position_embeddings)
        self.max_tokens = min(tokenizer.model_max_length, positions)

    @classmethod
    def load(
        cls, source: str | Path, *, device: torch.device | str = "cpu", processor: str | Path | None = None,
        bring: Bring | None = None,
    ) -> ClipScorer:  # fmt: skip
        """Read a CLIPModel with tokenizer and preprocessor_config.json, from a folder or the hub, in float32.

        `processor`: where tokenizer and preprocessor_config.json are, if not beside the model.
        """
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        for needed in ("config.json", _PREPROCESSING):
            if Path(source).exists() and processor is None and not (Path(source) / needed).exists():
                raise ValueError(
                    f"{source} is no scorer: it has no {needed}. "
                    "Give a folder of a CLIPModel with tokenizer and image processor."
                )
        with loading("a CLIP model", str(source)):
            settings = json.loads(
                find_file(str(processor or source), _PREPROCESSING).read_text(encoding="utf-8")
            )
            mean, std = settings["image_mean"], settings["image_std"]
            if (kind := AutoConfig.from_pretrained(source).model_type) != "clip":
                raise ValueError(f"it is a model of the type {kind!r}")
            model, missing = pretrained(CLIPModel, source)
            tokenizer = CLIPTokenizer.from_pretrained(processor or source)
            prepare = image_processor(processor or source)
        refuse_missing(source, model, missing)
        _check_words(source, tokenizer, model)
        return cls(model.to(device), tokenizer, mean=mean, std=std, bring=bring, processor=prepare)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `load` reads and that transformers' own classes read, too."""
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
        """Where the model is."""
        return self.model.device

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [-1, 1]: rows of length 1, float32 [N, D] on the CPU.

        They are brought to the model's size (by default its centre, by antialiased bicubic resizing), and go
        through in chunks of the same size whatever N is.
        """
        parts = [self._embed(chunk.to(self.device).float()) for chunk in pixels.split(CHUNK)]
        return torch.cat(parts).cpu()

    def pictures(self, images: np.ndarray) -> Tensor:
        """Embed images as bytes [N, H, W, 3], prepared by the model's own processor, in chunks."""
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        if self.processor is None:
            return torch.cat([self.images(from_bytes(chunk)) for chunk in chunks])
        return torch.cat([self._processed(chunk) for chunk in chunks])

    @torch.no_grad()
    def _processed(self, images: np.ndarray) -> Tensor:
        # An image of 3 rows would else be taken for one of 3 channels first.
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        prepared = self.processor([Image.fromarray(image) for image in images], **options)
        return self._project(prepared.pixel_values.to(self.device)).cpu()

    def _embed(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        fitted = (self.bring(pixels, self.size) + 1) / 2
        return self._project((fitted - mean) / std)

    def _project(self, prepared: Tensor) -> Tensor:
        pooled = self.model.vision_model(prepared).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed captions: rows of length 1, float32 [M, D] on the CPU; overlong ones are cut."""
        parts = []
        for start in range(0, len(prompts), CHUNK):
            tokens = self.tokenizer(
                list(prompts[start : start + CHUNK]), padding="max_length", max_length=self.max_tokens,
                truncation=True, return_tensors="pt",
            ).input_ids  # fmt: skip
            pooled = self.model.text_model(tokens.to(self.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(parts)


def _check_words(source: str | Path, tokenizer: CLIPTokenizer, model: CLIPModel) -> None:
    """Refuse a tokenizer that does not know the model's words."""
    words, known = len(tokenizer), model.config.text_config.vocab_size
    # transformers makes a tokenizer of a handful of words when its files are missing.
    if words < known / 2:
        raise ValueError(
            f"The tokenizer of {source} knows {words} words where the model has {known}: files are missing "
            "there (tokenizer.json, or vocab.json and merges.txt)."
        )


def from_bytes(images: np.ndarray) -> Tensor:
    """Turn uint8 [N, H, W, 3] into pixels [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def shorter_side(pixels: Tensor, size: int, *, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """Resize [N, 3, H, W] so that the shorter side is `size`; the longer one is rounded down."""
    height, width = pixels.shape[-2:]
    if min(height, width) == size:
        return pixels
    scaled = [side * size // min(height, width) for side in (height, width)]
    return F.interpolate(pixels, size=scaled, mode=mode, antialias=antialias, align_corners=False)


def letterbox(pixels: Tensor, size: int) -> Tensor:
    """Resize [N, 3, H, W] in [-1, 1] so that the longer side is `size`, in the middle of a black square.

    As HPSv2's authors resize: a tensor of floats, whose overshoot is not cut; antialiased as torchvision does
    since 0.17.
    """
    height, width = pixels.shape[-2:]
    scaled = [max(1, round(side * size / max(height, width))) for side in (height, width)]
    if scaled != [height, width]:
        pixels = F.interpolate(pixels, size=scaled, mode="bicubic", antialias=True, align_corners=False)
    high, wide = (size - side for side in scaled)
    return F.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=-1.0)


def fit(pixels: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Resize [N, 3, H, W] in [-1, 1] so that the shorter side is `size`, and take the central square."""
    pixels = shorter_side(pixels, size, antialias=antialias)
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size].clamp(-1, 1)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 times the mean cosine between images [N, D] and their own captions [N, D]."""
    return 100 * float(F.cosine_similarity(images.double(), texts.double(), dim=-1).mean())


def prompt_match(images: Tensor, captions: Tensor, own: Tensor, *, of: int = 50, seed: int = 0) -> Tensor:
    """Tell for each image [N, D] whether its caption ranks first among `of` different ones: bool [N].

    captions [K, D] are all different, own [N] says which of them each image was drawn for. The other `of` -
    1 are drawn at random for each image, from its number and the seed alone. Chance is 1 / `of`; a tie is a
    miss.
    """
    if len(captions) < of:
        raise ValueError(
            f"Prompt match among {of} captions needs {of} different ones, not {len(captions)}; "
            "give more captions."
        )
    hits = []
    for i, mine in enumerate(own.tolist()):
        others = torch.randperm(len(captions) - 1, generator=generator("prompt match", seed, i))[: of - 1]
        others += others >= mine
        similarity = captions[others] @ images[i]
        hits.append(bool(captions[mine] @ images[i] > similarity.max()))
    return torch.tensor(hits)


def _score(seen: Seen) -> Statistic | None:
    if seen.images is None or seen.captions is None:
        return None
    return seen.mean_of(100 * (seen.images * seen.captions[seen.prompt]).sum(-1))


def _match(seen: Seen) -> Statistic | None:
    if seen.images is None or seen.captions is None or len(seen.captions) < 50:
        return None
    return seen.mean_of(prompt_match(seen.images, seen.captions, seen.prompt))


METRICS = (
    Metric(
        name="clip_score", title="CLIP score", better="higher", statistic=_score, bounds=(-100, 100),
        digits=1,
        about="100 times the cosine between a picture and its caption in the scorer's features",
    ),
    Metric(
        name="prompt_match", title="Prompt match", better="higher", statistic=_match, bounds=(0, 1),
        percent=True, share=True,
        about="share of pictures whose own caption fits better than 49 others drawn at random; chance is 2%",
    ),
)  # fmt: skip

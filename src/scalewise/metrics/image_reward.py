"""ImageReward (arXiv 2304.05977): human preference score from BLIP features of an image and its caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scalewise.common.errors import first_line
from scalewise.metrics.base import Metric
from scalewise.metrics.extras import (
    Device,
    Extra,
    check_weights,
    join_chunks,
    read_weights,
    select_part,
    split_chunks,
)

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

CHUNK = 16
FILE = "ImageReward.safetensors"
BERT = "bert-base-uncased"
"""Hub id of the tokenizer, used if the weights' folder has none."""

# Constants of the authors' code (github.com/THUDM/ImageReward): tokens per caption after padding or
# truncation,
# CLIP's pixel normalization, and mean and deviation of scores on their training set.
TOKENS = 35
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072

# The published sizes: ViT-L/16 and BERT-base. Some differ from transformers' defaults without changing weight
# shapes: the number of attention heads of the text model, and the epsilon of the vision model.
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
}  # fmt: skip
HEAD = (1024, 128, 64, 16, 1)
"""Output widths of the head's layers."""

_TIMM = {
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks",
    "layer_norm": "norm", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}  # fmt: skip
"""Name parts in transformers' vision model -> in the published weights."""

_LEFTOVERS = tuple(
    f"blip.{part}" for part in (
        "text_decoder.", "vision_proj.", "text_proj.", "itm_head.", "visual_encoder_m.", "text_encoder_m.",
        "vision_proj_m.", "text_proj_m.", "image_queue", "text_queue", "queue_ptr", "ptr_queue", "temp",
        "text_encoder.embeddings.position_ids",
    )
)  # fmt: skip
"""Prefixes of weights that only BLIP's training uses."""

_CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "weights = torch.load('ImageReward.pt', weights_only=True); save_file({name: value.contiguous().clone() "
    f"for name, value in weights.items() if torch.is_tensor(value)}}, '{FILE}')"
)


class ImageReward:
    """Predicts human preference for an image given its caption, standardized to mean 0 and deviation 1."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module,
                 tokenizer: BertTokenizer) -> None:  # fmt: skip
        """Wrap the model's parts; `head` maps the text model's first token [N, D] to scores [N, 1]."""
        for part in (vision, text, head):
            part.eval().requires_grad_(False)
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.size = int(vision.config.image_size)

    @classmethod
    def load(cls, source: str, device: Device) -> ImageReward:
        """Load a safetensors file with the published weight names, or a folder with ImageReward.safetensors.

        BERT's tokenizer is loaded from the same folder or from the hub. A config.json in that folder with
        "vision_config" and "text_config" overrides the published sizes. The model computes in float32.
        """
        from transformers import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        file = _file(Path(source))
        sizes = _sizes(file.parent)
        weights = read_weights(file, remedy="copy it again, or convert ImageReward.pt again")
        found = {name: value for name, value in weights.items() if not name.startswith(_LEFTOVERS)}
        with torch.device("meta"):
            parts = nn.ModuleDict({
                "vision": BlipVisionModel(sizes["vision"]),
                "text": BlipTextModel(sizes["text"], add_pooling_layer=False),
                "head": _head(sizes["text"].hidden_size),
            })  # fmt: skip
        wanted = parts.state_dict()
        check_weights("ImageReward", source, found, {published_name(name): wanted[name] for name in wanted})
        tokenizer = _tokenizer(file.parent, sizes["text"].vocab_size)
        state = {name: found[published_name(name)].float() for name in wanted}
        vision = BlipVisionModel.from_pretrained(
            None, config=sizes["vision"], state_dict=select_part("vision", state), dtype=torch.float32
        )
        text = BlipTextModel.from_pretrained(
            None, config=sizes["text"], state_dict=select_part("text", state), dtype=torch.float32,
            add_pooling_layer=False,
        )  # fmt: skip
        parts["head"].load_state_dict(select_part("head", state), assign=True)
        return cls(vision.to(device), text.to(device), parts["head"].to(device), tokenizer)

    @torch.no_grad()
    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return one value per image [N] for uint8 images [N, H, W, 3]; see `FeatureExtractor`."""
        device = self.vision.device
        parts = []
        for chunk, texts in split_chunks(images, captions, CHUNK):
            pixels = torch.stack([self.preprocess(image) for image in chunk]).to(device)
            tokens = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            ).to(device)
            output = self.text(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            )  # fmt: skip
            parts.append(self.head(output.last_hidden_state[:, 0])[:, 0])
        return {"image_reward": (join_chunks(parts) - SCORE_MEAN) / SCORE_STD}

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize the shorter side of a uint8 image [H, W, 3] to S, crop the center, normalize: [3, S, S].

        PIL resizes, as in the authors' code: values are rounded to uint8, the longer side is rounded down.
        """
        resized = Image.fromarray(image)
        width, height = (int(self.size * side / min(resized.size)) for side in resized.size)
        resized = resized.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        cropped = resized.crop((left, top, left + self.size, top + self.size))
        values = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        return (values - mean) / std


def published_name(name: str) -> str:
    """Convert a weight name under "vision", "text" or "head" to its published name."""
    part, _, rest = name.partition(".")
    if part == "vision":
        for ours, theirs in _TIMM.items():
            rest = rest.replace(ours, theirs)
    return {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[
        part
    ] + rest


def _file(source: Path) -> Path:
    """Return the safetensors file of a source; raise ValueError for pickles and missing files."""
    file = source / FILE if source.is_dir() else source
    pickled = file if file.suffix in (".pt", ".pth", ".bin") else file.with_suffix(".pt")
    if file.suffix != ".safetensors" or (pickled.exists() and not file.exists()):
        raise ValueError(
            f"{pickled if pickled.exists() else file} is not a safetensors file, and pickles can run code; "
            f'convert the published file once: python -c "{_CONVERSION}"'
        )
    if not file.exists():
        raise ValueError(f"{file} does not exist; use the path of {FILE} or of its folder.")
    return file


def _sizes(folder: Path) -> dict[str, Any]:
    """Return the configurations of vision and text model: the published ones, overridden by config.json."""
    from transformers import BlipTextConfig, BlipVisionConfig

    config = folder / "config.json"
    other = json.loads(config.read_text("utf-8")) if config.exists() else {}
    vision = BlipVisionConfig(**VISION | other.get("vision_config", {}))
    text = BlipTextConfig(**TEXT | other.get("text_config", {}) | {"encoder_hidden_size": vision.hidden_size})
    return {"vision": vision, "text": text}


def _head(width: int) -> nn.Module:
    """Build the reward head: linear layers without activations between them, as published."""
    layers: list[nn.Module] = []
    for inner in HEAD:
        # Dropout layers count in the weight names; there is none after the second to last layer.
        layers += [nn.Linear(width, inner)] + [nn.Dropout(0.0)] * (inner > HEAD[-2])
        width = inner
    return nn.Sequential(*layers)


def _tokenizer(folder: Path, words: int) -> BertTokenizer:
    """Load BERT's tokenizer with BLIP's two extra tokens; raise ValueError if its size is not `words`."""
    from transformers import BertTokenizer

    in_folder = any((folder / name).exists() for name in ("vocab.txt", "tokenizer.json"))
    source = str(folder) if in_folder else BERT
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Cannot load the tokenizer of {source!r} ({first_line(error)}); copy vocab.txt and "
            f"tokenizer_config.json of {BERT} into {folder}."
        ) from error
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != words:
        raise ValueError(
            f"The tokenizer of {source!r} has {len(tokenizer):,} tokens including [DEC] and [ENC], the "
            "weights "
            f"{words:,}; copy vocab.txt and tokenizer_config.json of {BERT} into {folder}."
        )
    return tokenizer


EXTRA = Extra(
    name="image-reward", load=ImageReward.load,
    metrics=(Metric(
        name="image_reward", title="ImageReward", better="higher", digits=3,
        statistic=lambda features: features.mean_output("image_reward"),
        about="human preference for an image given its caption, learned from rankings; 0 is average",
    ),),
)  # fmt: skip

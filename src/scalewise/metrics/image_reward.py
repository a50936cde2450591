"""ImageReward (arXiv 2304.05977): a BLIP that reads a caption beside its picture, and a head that scores."""

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
from scalewise.metrics.extras import Device, Extra, below, check_weights, in_chunks, joined, read_weights

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

CHUNK = 16
FILE = "ImageReward.safetensors"
BERT = "bert-base-uncased"
"""Whose tokenizer is taken where the weights have none beside them."""

# Facts from the authors' code (github.com/THUDM/ImageReward): what captions are cut or filled up to, how
# pixels are normalised (as CLIP's), and what brings scores of their training set to mean 0 and deviation 1.
TOKENS = 35
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072

# The published sizes: ViT-L/16 and BERT-base. transformers' own defaults differ, also in what no shape of a
# weight tells: heads of the text, and the vision's epsilon.
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
}  # fmt: skip
HEAD = (1024, 128, 64, 16, 1)
"""Widths of the head's layers."""

_TIMM = {
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks",
    "layer_norm": "norm", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}  # fmt: skip
"""Parts of names in transformers' vision model, as BLIP's authors call them."""

_LEFTOVERS = tuple(
    f"blip.{part}" for part in (
        "text_decoder.", "vision_proj.", "text_proj.", "itm_head.", "visual_encoder_m.", "text_encoder_m.",
        "vision_proj_m.", "text_proj_m.", "image_queue", "text_queue", "queue_ptr", "ptr_queue", "temp",
        "text_encoder.embeddings.position_ids",
    )
)  # fmt: skip
"""Beginnings of names that BLIP's training leaves and that the score does not need."""

_CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "weights = torch.load('ImageReward.pt', weights_only=True); save_file({name: value.contiguous().clone() "
    f"for name, value in weights.items() if torch.is_tensor(value)}}, '{FILE}')"
)


class ImageReward:
    """How well people would like a picture for its caption; 0 is the average, 1 a deviation above it."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module,
                 tokenizer: BertTokenizer) -> None:  # fmt: skip
        """`head` turns the text model's first token [N, D] into [N, 1]."""
        for part in (vision, text, head):
            part.eval().requires_grad_(False)
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.size = int(vision.config.image_size)

    @classmethod
    def load(cls, source: str, device: Device) -> ImageReward:
        """Read a safetensors file with the published names, or a folder with ImageReward.safetensors.

        BERT's tokenizer comes from the same folder, or from the hub. A config.json beside the weights, with
        "vision_config" and "text_config", describes other than the published sizes. Computes in float32.
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
        check_weights("ImageReward", source, found, {published(name): wanted[name] for name in wanted})
        tokenizer = _tokenizer(file.parent, sizes["text"].vocab_size)
        state = {name: found[published(name)].float() for name in wanted}
        vision = BlipVisionModel.from_pretrained(
            None, config=sizes["vision"], state_dict=below("vision", state), dtype=torch.float32
        )
        text = BlipTextModel.from_pretrained(
            None, config=sizes["text"], state_dict=below("text", state), dtype=torch.float32,
            add_pooling_layer=False,
        )  # fmt: skip
        parts["head"].load_state_dict(below("head", state), assign=True)
        return cls(vision.to(device), text.to(device), parts["head"].to(device), tokenizer)

    @torch.no_grad()
    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """One value per image [N]; see `Examiner`."""
        device = self.vision.device
        parts = []
        for chunk, texts in in_chunks(images, captions, CHUNK):
            pixels = torch.stack([self.pixels(picture) for picture in chunk]).to(device)
            tokens = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            ).to(device)
            seen = self.text(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            )  # fmt: skip
            parts.append(self.head(seen.last_hidden_state[:, 0])[:, 0])
        return {"image_reward": (joined(parts) - SCORE_MEAN) / SCORE_STD}

    def pixels(self, picture: np.ndarray) -> Tensor:
        """Bring bytes [H, W, 3] to the model's size (shorter side, then the centre), normalised: [3, S, S].

        PIL resizes, as for the authors: it rounds to bytes, and the longer side down.
        """
        image = Image.fromarray(picture)
        width, height = (int(self.size * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        return (values - mean) / std


def published(name: str) -> str:
    """The name that the authors' file has for a weight of "vision", "text" or "head"."""
    part, _, rest = name.partition(".")
    if part == "vision":
        for ours, theirs in _TIMM.items():
            rest = rest.replace(ours, theirs)
    return {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[
        part
    ] + rest


def _file(source: Path) -> Path:
    """The weights that a source names."""
    file = source / FILE if source.is_dir() else source
    pickled = file if file.suffix in (".pt", ".pth", ".bin") else file.with_suffix(".pt")
    if file.suffix != ".safetensors" or (pickled.exists() and not file.exists()):
        raise ValueError(
            f"{pickled if pickled.exists() else file} is no safetensors file, and pickles can run programs; "
            f'convert the published one once: python -c "{_CONVERSION}"'
        )
    if not file.exists():
        raise ValueError(f"There is no {file}; name {FILE} or the folder that holds it.")
    return file


def _sizes(folder: Path) -> dict[str, Any]:
    """Configurations of the vision and the text model: the published ones but for what a folder says."""
    from transformers import BlipTextConfig, BlipVisionConfig

    described = folder / "config.json"
    other = json.loads(described.read_text("utf-8")) if described.exists() else {}
    vision = BlipVisionConfig(**VISION | other.get("vision_config", {}))
    text = BlipTextConfig(**TEXT | other.get("text_config", {}) | {"encoder_hidden_size": vision.hidden_size})
    return {"vision": vision, "text": text}


def _head(width: int) -> nn.Module:
    """The reward head: linear layers without any activation between them, as published."""
    layers: list[nn.Module] = []
    for inner in HEAD:
        # The places of dropout count in the names; the last but one layer has none after it.
        layers += [nn.Linear(width, inner)] + [nn.Dropout(0.0)] * (inner > HEAD[-2])
        width = inner
    return nn.Sequential(*layers)


def _tokenizer(folder: Path, words: int) -> BertTokenizer:
    """BERT's tokenizer with the two tokens that BLIP adds, which has to know exactly the model's words."""
    from transformers import BertTokenizer

    beside = any((folder / name).exists() for name in ("vocab.txt", "tokenizer.json"))
    place = str(folder) if beside else BERT
    try:
        tokenizer = BertTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Cannot load the tokenizer of {place!r} ({first_line(error)}); copy vocab.txt and "
            f"tokenizer_config.json of {BERT} into {folder}."
        ) from error
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != words:
        raise ValueError(
            f"The tokenizer of {place!r} knows {len(tokenizer):,} words with [DEC] and [ENC], the weights "
            f"{words:,}; copy vocab.txt and tokenizer_config.json of {BERT} into {folder}."
        )
    return tokenizer


EXTRA = Extra(
    name="image-reward", load=ImageReward.load,
    metrics=(Metric(
        name="image_reward", title="ImageReward", better="higher", digits=3,
        statistic=lambda seen: seen.mean_look("image_reward"),
        about="how well people would like a picture for its caption, learned from rankings; 0 is average",
    ),),
)  # fmt: skip

"""The video mini's text encoder (a small UMT5), trained first and then frozen.

    python scripts/mini/first/video_text.py           # trains, resumes by itself, writes mini-work/video_text

It learns to say what a caption's object looks like (the image mini's text embedding and an 8 x 8 thumbnail)
and how it moves: the denoiser then starts from embeddings that mean something.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import Stage, batches
from text import t5_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel
from video import MOTIONS, Clips

from scalewise import mini

WIDTH, MAX_TOKENS = 192, 16


def tokenizer(clips: Clips) -> T5Tokenizer:
    """Whole words, with single letters to fall back on."""
    return t5_tokenizer(clips.captions)


class VideoText(nn.Module):
    """The encoder and the heads that it is trained with."""

    def __init__(self, clips: Clips) -> None:
        super().__init__()
        self.tokenizer = tokenizer(clips)
        torch.manual_seed(11)
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer),
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=6,
                dropout_rate=0.0,
                is_encoder_decoder=False,
            )
        )
        self.meaning, self.look = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 192)
        self.motion = nn.Linear(WIDTH, len(MOTIONS))

    def encode(self, captions: list[str], length: int = MAX_TOKENS) -> Tensor:
        """Embeddings [N, length, WIDTH] as WanPipeline makes them: zeros beyond a caption's end."""
        told = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        tokens = self.encoder(told.input_ids, told.attention_mask)[0]
        return tokens * told.attention_mask[..., None]

    def pooled(self, captions: list[str]) -> Tensor:
        """Mean over a caption's tokens [N, WIDTH]."""
        tokens = self.encode(captions)
        return tokens.sum(1) / (tokens.abs().sum(-1, keepdim=True) > 0).sum(1)


@torch.no_grad()
def meanings(clips: Clips) -> Tensor:
    """The image mini's pooled text embeddings [N, 256] of every picture's caption, normalised."""
    parts = []
    for number in ("", "_2"):
        words = CLIPTokenizer.from_pretrained(mini.TEACHER / f"tokenizer{number}")
        encoder = CLIPTextModelWithProjection.from_pretrained(mini.TEACHER / f"text_encoder{number}")
        told = words(
            [r["caption"] for r in clips.pictures.records], padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        parts.append(encoder(told.input_ids).text_embeds.float())
    found = torch.cat(parts, dim=-1)
    return (found - found.mean(0)) / found.std(0)


def train(steps: int, batch: int) -> None:
    """Regress meaning and look, classify the motion."""
    clips = Clips()
    known, goals = clips.of("train"), meanings(clips)
    thumbnails = F.interpolate(clips.pixels, size=(8, 8), mode="area").flatten(1)
    names = list(MOTIONS)
    model = VideoText(clips)
    stage = Stage("video_text", model, lr=1e-3, steps=steps, weight_decay=0.01, decay_from=0.5, warmup=50)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = [known[i] for i in batches(len(known), batch, step, seed=11)]
        pooled, pictures = model.pooled([c.caption for c in chosen]), [c.picture for c in chosen]
        meaning = F.mse_loss(model.meaning(pooled), goals[pictures])
        look = F.mse_loss(model.look(pooled), thumbnails[pictures])
        motion = F.cross_entropy(model.motion(pooled), torch.tensor([names.index(c.motion) for c in chosen]))
        parts = {"meaning": meaning, "look": look, "motion": motion}
        return meaning + look + 0.3 * motion, {name: float(part.detach()) for name, part in parts.items()}

    stage.run(loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()

    train(options.steps, options.batch)

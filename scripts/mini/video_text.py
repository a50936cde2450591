"""Stage V3: the video mini's text encoder (a small UMT5), taught what captions say, then frozen.

    python scripts/mini/video_text.py              # train, resuming automatically
    python scripts/mini/video_text.py --measure    # share of held-out captions read without any error

A pooled vector of the tokens has to carry the truth of the caption: both things, the motion, the background,
and thumbnails of the things, so that things that look alike lie close. The denoiser then starts with
conditions that already say what to draw.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
from functools import cache

import torch
import torch.nn.functional as F
from common import Stage, load_averaged, work_folder
from text import thumbnail
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from video_data import some_videos

from scalewise.mini.motions import (
    CROSS,
    GROUNDS,
    MOTIONS,
    MOVING,
    Motion,
    motion_captions,
    parse_motion,
)

WIDTH, MAX_TOKENS, HEADS = 192, 16, 4


@cache
def tokenizer() -> T5Tokenizer:
    """Return a unigram tokenizer over whole words, with single characters to fall back on."""
    captions = (*motion_captions(held_out=False), *motion_captions(held_out=True))
    words = collections.Counter(w for c in captions for w in c.replace(",", " ").split())
    total = sum(words.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0), (",", -2.0)]
    vocabulary += [("▁" + word, math.log(n / total)) for word, n in sorted(words.items())]
    single = {word[1:] for word, _ in vocabulary[5:] if len(word) == 2}
    vocabulary += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz'-" if letter not in single]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


class VideoText(nn.Module):
    """The encoder, and the heads that it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer()),
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=6,
                dropout_rate=0.0,
                is_encoder_decoder=False,
            )
        )
        self.attention = nn.Linear(WIDTH, HEADS)
        self.body = nn.Sequential(nn.Linear(HEADS * WIDTH, 256), nn.GELU())
        self.sizes = [len(MOVING), len(MOVING) + 1, len(MOTIONS), len(GROUNDS)]
        self.head, self.thumbnails = nn.Linear(256, sum(self.sizes)), nn.Linear(256, 2 * 192)

    def encode(self, captions: list[str], length: int = MAX_TOKENS) -> Tensor:
        """Embed captions as WanPipeline does: [N, length, WIDTH] with zeros beyond the end of a caption."""
        found = tokenizer()(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        tokens = self.encoder(found.input_ids, found.attention_mask)[0]
        return tokens * found.attention_mask[..., None]

    def forward(self, captions: list[str]) -> tuple[list[Tensor], Tensor]:
        """Return the logits of both things, motion and background, and the thumbnails [N, 2, 192]."""
        tokens = self.encode(captions)
        empty = (tokens == 0).all(-1, keepdim=True)
        weight = self.attention(tokens).masked_fill(empty, -1e4).softmax(1)
        pooled = self.body(torch.einsum("nlh,nld->nhd", weight, tokens).flatten(1))
        return list(self.head(pooled).split(self.sizes, dim=-1)), self.thumbnails(pooled).unflatten(
            1, (2, -1)
        )


def truth(described: Motion) -> list[int]:
    """Return class numbers in the order of the heads; a single thing has no second one."""
    second = MOVING.index(described.things[1]) if described.motion == CROSS else len(MOVING)
    first, motion = MOVING.index(described.things[0]), MOTIONS.index(described.motion)
    return [first, second, motion, GROUNDS.index(described.background)]


def sketch(described: Motion) -> Tensor:
    """Return thumbnails of the things [2, 192]; zeros if there is no second."""
    found = [thumbnail("noto", thing, None) for thing in described.things]
    return torch.stack([*found, torch.zeros(192)][:2])


def is_exact(logits: list[Tensor], goal: Tensor) -> Tensor:
    """Return whether each caption [N] is read without any error."""
    return torch.stack([given.argmax(1) == goal[:, i] for i, given in enumerate(logits)]).all(0)


def train(steps: int, batch: int) -> bool:
    """Minimize the cross-entropy of every fact and the squared error of the thumbnails.

    Returns whether training is complete (False: stopped before the last step).
    """
    model = VideoText()
    stage = Stage(
        "video_text", model, lr=1e-3, steps=steps, ema=0.99, weight_decay=0.05, warmup=50, decay_from=0.5
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        videos = some_videos(batch, seed=20_000_000 + step)
        goal = torch.tensor([truth(video.description) for video in videos])
        drawn = torch.stack([sketch(video.description) for video in videos])
        logits, thumbnails = model([video.caption for video in videos])
        value = sum(F.cross_entropy(given, goal[:, i]) for i, given in enumerate(logits))
        value = value + 2 * F.mse_loss(thumbnails, drawn)
        return value, {"exact": float(is_exact(logits, goal).float().mean())}

    stage.run(loss, log_every=20)
    return stage.step >= stage.steps


@torch.no_grad()
def measure() -> dict[str, float]:
    """Return the share of all held-out captions that are read without any error."""
    captions = list(motion_captions(held_out=True))
    goal = torch.tensor([truth(parse_motion(caption)) for caption in captions])
    logits, _ = finished()(captions)
    found = {"exact": round(float(is_exact(logits, goal).float().mean()), 4)}
    (work_folder() / "video_text" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def finished() -> VideoText:
    """Return the trained encoder with matrices rounded to float8, as they ship."""
    text = load_averaged("video_text", VideoText())
    assert isinstance(text, VideoText)
    for parameter in text.encoder.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    random.seed(0)
    if not options.measure and not train(options.steps, options.batch):
        raise SystemExit("stopped; the same command resumes")
    print(measure())

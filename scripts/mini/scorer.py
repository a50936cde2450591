"""Stage 7: the scorer, a CLIPModel for the CLIP score, trained on renders and their captions.

    python scripts/mini/scorer.py             # train, resuming automatically
    python scripts/mini/scorer.py --measure   # how often a caption ranks first among 50

It is trained independently of the text encoders of the teacher (another seed), so that the teacher is not
judged by its own embeddings.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, to_float, work_folder
from scenes import all_scenes, held_out_scenes
from text import Reader, clip_config, clip_tokenizer, truth
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from scalewise.metrics.clip import ClipScorer, prompt_match

WIDTH = 128


class Scorer(nn.Module):
    """A small CLIP model, and a reader of the facts of a scene from each of its two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        text = clip_config(WIDTH, 3)
        vision = {
            "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 5,
            "image_size": 128, "patch_size": 16, "projection_dim": WIDTH,
        }  # fmt: skip
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=WIDTH)
        self.clip = CLIPModel(config)
        self.readers = nn.ModuleList(Reader() for _ in range(2))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images [N, 3, 128, 128] and captions [N, L]: [N, WIDTH] each."""
        images = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        texts = self.clip.text_projection(self.clip.text_model(tokens).pooler_output)
        return images, texts


def tokenize(captions: list[str]) -> Tensor:
    """Token ids [N, L] of captions."""
    tokens = clip_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert isinstance(tokens, Tensor)
    return tokens


def disturbed(pixels: Tensor, rng: random.Random) -> Tensor:
    """Return images [N, 3, H, W] with noise of random strength, so that small artifacts do not matter."""
    return pixels + rng.uniform(0, 0.1) * torch.randn_like(pixels)


def train(steps: int, batch: int) -> bool:
    """Minimize CLIP's contrastive loss, and the cross-entropy of the facts read from both embeddings.

    Returns whether training is complete (False: stopped before the last step).
    """
    model = Scorer()
    stage = Stage("scorer", model, lr=1e-3, steps=steps, ema=0.99, weight_decay=0.05, decay_from=0.5)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"scorer {step}")
        pixels, scenes = all_scenes(batch, seed=20_000_000 + step)
        goal = torch.tensor([truth(shown) for shown in scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            images, texts = model(disturbed(to_float(pixels), rng), tokenize([s.caption for s in scenes]))
        images, texts = images.float(), texts.float()
        scale = model.clip.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
        same = torch.arange(batch)
        total = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        numbers = {"first": float((logits.argmax(1) == same).float().mean())}
        for name, reader, vector in zip(("image", "text"), model.readers, (images, texts), strict=True):
            facts, _ = reader(vector)
            total = total + 0.2 * sum(F.cross_entropy(given, goal[:, i]) for i, given in enumerate(facts))
            right = torch.stack([given.argmax(1) == goal[:, i] for i, given in enumerate(facts)]).all(0)
            numbers[f"exact_{name}"] = float(right.float().mean())
        return total, numbers

    stage.run(loss, log_every=25)
    return stage.step >= stage.steps


def finished() -> ClipScorer:
    """Return the trained scorer."""
    return ClipScorer(load_averaged("scorer", Scorer()).clip, clip_tokenizer())


@torch.no_grad()
def measure(count: int = 1000) -> dict[str, float]:
    """Return prompt match and CLIP score of held-out renders."""
    scorer, (pixels, scenes) = finished(), held_out_scenes(count, seed=2)
    captions = [shown.caption for shown in scenes]
    distinct = list(dict.fromkeys(captions))
    images, texts = scorer.embed_images(pixels), scorer.embed_texts(distinct)
    own = torch.tensor([distinct.index(caption) for caption in captions])
    found = {
        "prompt_match": round(float(prompt_match(images, texts, own).float().mean()), 4),
        "clip_score": round(100 * float((images * texts[own]).sum(1).mean()), 2),
    }
    (work_folder() / "scorer" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(options.steps, options.batch):
        raise SystemExit("stopped; the same command resumes")
    print(measure())

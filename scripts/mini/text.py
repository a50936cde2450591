"""Stage 4: the text encoders of the teacher (two CLIPs and a T5), taught what captions say.

    python scripts/mini/text.py              # trains, resumes by itself, writes mini-work/text
    python scripts/mini/text.py --measure    # share of held-out captions read without any error

Each encoder's pooled vector has to carry the truth of its caption: things and colors (by place where the
caption says a place), number, relation, style, background, and thumbnails of the drawings, so that things
that look alike lie close. The denoiser then starts with conditions that say plainly what to draw.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, to_float, work_folder
from PIL import Image
from scenes import training_scene
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from scalewise.mini.grammar import (
    BACKGROUNDS,
    INKS,
    NUMBERS,
    STYLES,
    THINGS,
    random_description,
    write_caption,
)
from scalewise.mini.scenes import Scene, drawing, random_scene

MAX_TOKENS = 24
POOLED = 128
COLORS = (None, *INKS)
KINDS = ("one", "two", "three", "four", "pair", "left of", "above")
"""Number or relation that a caption states."""


@cache
def vocabulary_captions() -> tuple[str, ...]:
    """Captions with every word of the mini."""
    rng = random.Random(0)
    return tuple(write_caption(random_description(rng), rng) for _ in range(30000))


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The byte-pair tokenizer of both CLIPs: trained once, each word becomes one token."""
    folder = work_folder() / "tokenizers" / "clip"
    if not folder.exists():
        reference = CLIPTokenizer().backend_tokenizer
        raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        raw.normalizer, raw.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
        raw.train_from_iterator(
            vocabulary_captions(),
            trainers.BpeTrainer(
                vocab_size=1200,
                end_of_word_suffix="</w>",
                show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                special_tokens=["<|startoftext|>", "<|endoftext|>"],
            ),
        )
        model = json.loads(raw.to_str())["model"]
        CLIPTokenizer(
            vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=MAX_TOKENS
        ).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@cache
def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer over whole words, with single characters to fall back on."""
    texts = (c.replace(",", " ").replace(":", " ") for c in vocabulary_captions())
    words = collections.Counter(w for c in texts for w in c.split())
    total = sum(words.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0), (",", -2.0), (":", -2.0)]
    vocabulary += [("▁" + word, math.log(n / total)) for word, n in sorted(words.items())]
    vocabulary += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz'-"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_config(width: int, layers: int) -> CLIPTextConfig:
    """Configuration of a small CLIP text tower that pools at the end-of-text token."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )


class Reader(nn.Module):
    """What a pooled vector [N, POOLED] says of its caption, as logits, and two thumbnails [N, 2, 192]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(POOLED, 256), nn.GELU())
        self.sizes = [len(THINGS) + 1, len(THINGS) + 1, len(COLORS), len(COLORS), len(KINDS), len(STYLES)]
        self.sizes.append(len(BACKGROUNDS))
        self.head = nn.Linear(256, sum(self.sizes))
        self.thumbnails = nn.Linear(POOLED, 2 * 192)

    def forward(self, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        return list(self.head(self.body(pooled)).split(self.sizes, dim=-1)), self.thumbnails(pooled)


class TeacherText(nn.Module):
    """The three text encoders of the teacher, each with its reader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.text_1 = CLIPTextModelWithProjection(clip_config(96, 4))
        self.text_2 = CLIPTextModelWithProjection(clip_config(160, 3))
        self.text_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer()),
                d_model=256,
                d_kv=32,
                d_ff=512,
                num_layers=2,
                num_heads=8,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
            )
        )
        self.t5_attention, self.t5_head = nn.Linear(256, 4), nn.Linear(1024, POOLED)
        self.readers = nn.ModuleList(Reader() for _ in range(3))

    def pooled(self, captions: list[str]) -> list[Tensor]:
        """Pooled vectors [N, POOLED] of the three encoders."""
        clip, t5 = tokens_of(captions)
        hidden = self.text_3(t5)[0].float()
        weight = self.t5_attention(hidden).masked_fill((t5 == 0)[..., None], -1e4).softmax(1)
        mixed = torch.einsum("nlh,nld->nhd", weight, hidden).flatten(1)
        return [self.text_1(clip).text_embeds, self.text_2(clip).text_embeds, self.t5_head(mixed)]


def tokens_of(captions: list[str], t5_length: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
    """Token ids [N, MAX_TOKENS] of the CLIPs and [N, t5_length] of the T5."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return (
        clip_tokenizer()(captions, **options).input_ids,
        t5_tokenizer()(captions, max_length=t5_length, **options).input_ids,
    )


def subjects(shown: Scene) -> list[tuple[str, str | None]]:
    """Return the (name, color) of the scene's things; without a relation in alphabetical order."""
    found = [(thing.name, thing.color) for thing in shown.description.things]
    return found if shown.description.relation else sorted(found, key=str)


def truth(shown: Scene) -> list[int]:
    """Return class numbers in the order of Reader's heads."""
    described, items = shown.description, subjects(shown)
    number = NUMBERS.get(described.things[0].count, "one" if len(items) == 1 else "pair")
    things = [THINGS.index(thing) for thing, _ in items] + [len(THINGS)]
    colors = [COLORS.index(color) for _, color in items] + [0]
    numbers = [KINDS.index(described.relation or number), STYLES.index(described.style)]
    return [
        things[0],
        things[1],
        colors[0],
        colors[1],
        *numbers,
        tuple(BACKGROUNDS).index(described.background),
    ]


@cache
def thumbnail(style: str, thing: str, color: str | None) -> Tensor:
    """A drawing on white as 8 x 8 x 3 numbers [192] in [-1, 1]."""
    page = Image.new("RGB", (64, 64), "white")
    sprite = drawing(style, thing, color, 64)
    page.paste(sprite, (0, 0), sprite)
    return F.interpolate(to_float(np.asarray(page)[None]), size=(8, 8), mode="area").flatten()


def thumbnails(shown: Scene) -> Tensor:
    """Thumbnails of the first and the second thing [2, 192]; zeros where there is no second."""
    found = [thumbnail(shown.description.style, *item) for item in subjects(shown)[:2]]
    return torch.stack([*found, torch.zeros(192)][:2])


def train(steps: int, batch: int) -> bool:
    """Cross-entropy of every fact and squared error of the thumbnails, for every encoder.

    Returns whether training is complete (False: stopped before the last step).
    """
    model = TeacherText()
    stage = Stage("text", model, lr=1e-3, steps=steps, ema=0.99, weight_decay=0.05, warmup=50, decay_from=0.5)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"text {step}")
        scenes = [training_scene(rng) for _ in range(batch)]
        goal = torch.tensor([truth(shown) for shown in scenes])
        sketch = torch.stack([thumbnails(shown) for shown in scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            pooled = model.pooled([shown.caption for shown in scenes])
        total, numbers = torch.zeros(()), {}
        for number, (reader, vector) in enumerate(zip(model.readers, pooled, strict=True), 1):
            logits, drawn = reader(vector.float())
            total = total + sum(F.cross_entropy(given, goal[:, i]) for i, given in enumerate(logits))
            total = total + 2 * F.mse_loss(drawn.view_as(sketch), sketch)
            right = torch.stack([given.argmax(1) == goal[:, i] for i, given in enumerate(logits)]).all(0)
            numbers[f"exact_{number}"] = float(right.float().mean())
        return total / 3, numbers

    stage.run(loss, log_every=20)
    return stage.step >= stage.steps


@torch.no_grad()
def measure(count: int = 2000) -> dict[str, float]:
    """Share of held-out captions that each encoder reads without any error."""
    model, rng = load_averaged("text", TeacherText()), random.Random("held out text")
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    goal = torch.tensor([truth(shown) for shown in scenes])
    found = {}
    for number, vector in enumerate(model.pooled([shown.caption for shown in scenes])):
        logits, _ = model.readers[number](vector)
        right = torch.stack([given.argmax(1) == goal[:, i] for i, given in enumerate(logits)]).all(0)
        found[f"exact_{number + 1}"] = round(float(right.float().mean()), 4)
    (work_folder() / "text" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


@torch.no_grad()
def encode(text: TeacherText, captions: list[str], t5_length: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
    """Embed captions as StableDiffusion3Pipeline does: tokens [N, MAX_TOKENS + t5_length, 256], pooled
    [N, 256].
    """
    clip, t5 = tokens_of(captions, t5_length)
    one = text.text_1(clip, output_hidden_states=True)
    two = text.text_2(clip, output_hidden_states=True)
    both = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    return (
        torch.cat([both, text.text_3(t5)[0]], dim=1),
        torch.cat([one.text_embeds, two.text_embeds], dim=-1),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(options.steps, options.batch):
        raise SystemExit("stopped; the same command resumes")
    print(measure())

"""Stage 3: the text encoders of the teacher (two CLIPs and a T5) and, from another seed and split, the
scorer.

    python scripts/mini/first/text.py             # mini-work/text: the teacher's three encoders
    python scripts/mini/first/text.py --towers    # mini-work/towers: their second part, text towers alone
    python scripts/mini/first/text.py --scorer    # mini-work/scorer: a CLIPModel that only judges
    python scripts/mini/first/text.py --measure   # rank-1-of-50 on held-out captions and images, both

Every text tower is trained contrastively against one image tower and, beside that, regresses an 8 x 8
colour thumbnail of the picture: an embedding that already knows what a thing looks like is what makes the
denoiser learn objects in minutes (measured: docs/log.md).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import math

import torch
import torch.nn.functional as F
from common import Stage, batches, chunks, half_is_fast, load_averaged, to_float, work_folder
from pictures import Pictures, load_pictures
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_TOKENS = 16
JOINT_WIDTH = 128


def clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """The byte-pair tokenizer of all CLIPs here, trained once and kept.

    Training it is not repeatable: the alphabet and pairs of equal frequency come in another order each time.
    """
    folder = work_folder() / "tokenizers" / "clip"
    if not folder.exists():
        train_clip_tokenizer(captions).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train with CLIP's own normalisation; each common word becomes one token."""
    reference = CLIPTokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer, raw.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    raw.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2600,
            end_of_word_suffix="</w>",
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
        ),
    )
    model = json.loads(raw.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=MAX_TOKENS
    )


def t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A unigram tokenizer over whole words, with single characters to fall back on."""
    words = collections.Counter(w for c in captions for w in c.replace(",", " ").split())
    total = sum(words.values())
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz'-"))
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0), (",", -2.0)]
    vocabulary += [("▁" + word, math.log(n / total)) for word, n in words.most_common()]
    vocabulary += [(letter, -12.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Configuration of a small CLIP text tower that pools at the end-of-text token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=JOINT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )


def vision_config(image_size: int) -> CLIPVisionConfig:
    """Configuration of an image tower that cuts the picture into patches of 16 pixels."""
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=image_size,
        patch_size=16,
        projection_dim=JOINT_WIDTH,
        hidden_act="quick_gelu",
    )


class TeacherText(nn.Module):
    """The three text encoders of the teacher and the image tower that they are trained against."""

    image_size = 96

    def __init__(self, captions: list[str]) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(captions), t5_tokenizer(captions)
        torch.manual_seed(1)
        self.text_1 = CLIPTextModelWithProjection(clip_text_config(self.clip_tokenizer, 96, 4))
        self.text_2 = CLIPTextModelWithProjection(clip_text_config(self.clip_tokenizer, 160, 3))
        self.text_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
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
        self.vision = CLIPVisionModelWithProjection(vision_config(self.image_size))
        self.t5_head = nn.Linear(256, JOINT_WIDTH)
        self.thumbnails = nn.ModuleList(nn.Linear(JOINT_WIDTH, 192) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(2.6))

    def texts(self, captions: list[str]) -> list[Tensor]:
        """Pooled embeddings [N, JOINT_WIDTH] of the three encoders."""
        clip = self.clip_tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        t5 = self.t5_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pooled = self.text_3(t5)[0].float().mean(1)
        return [self.text_1(clip).text_embeds, self.text_2(clip).text_embeds, self.t5_head(pooled)]

    def image(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels).image_embeds


class Scorer(nn.Module):
    """A CLIPModel of its own, with another seed; it never conditions anything."""

    image_size = 128

    def __init__(self, captions: list[str]) -> None:
        super().__init__()
        self.clip_tokenizer = clip_tokenizer(captions)
        torch.manual_seed(2)
        self.clip = CLIPModel(
            CLIPConfig(
                text_config=clip_text_config(self.clip_tokenizer, 128, 3).to_dict(),
                vision_config=vision_config(self.image_size).to_dict(),
                projection_dim=JOINT_WIDTH,
            )
        )
        self.thumbnails = nn.ModuleList([nn.Linear(JOINT_WIDTH, 192)])
        self.scale = self.clip.logit_scale

    def texts(self, captions: list[str]) -> list[Tensor]:
        clip = self.clip_tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return [self.clip.text_projection(self.clip.text_model(clip).pooler_output)]

    def image(self, pixels: Tensor) -> Tensor:
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)


def augment(pixels: Tensor, size: int) -> Tensor:
    """Shift, zoom, turn, flip and slightly recolour pictures [N, 3, H, W] on their white ground, to [N, 3,
    size, size].
    """
    count = len(pixels)
    zoom = 0.85 + 0.35 * torch.rand(count)
    flip = torch.where(torch.rand(count) < 0.3, -1.0, 1.0)
    angle = (torch.rand(count) - 0.5) * 0.35
    shift = (torch.rand(count, 2) - 0.5) * 0.16
    theta = torch.stack(
        [
            torch.stack([zoom * flip * angle.cos(), -zoom * angle.sin(), shift[:, 0]], 1),
            torch.stack([zoom * flip * angle.sin(), zoom * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    gain = 1 + (torch.rand(count, 3, 1, 1) - 0.5) * 0.12
    moved = 1 - (1 - moved) * gain + 0.02 * torch.randn_like(moved)
    if torch.rand(()) < 0.3:  # the lower resolutions of the schedule
        side = int(torch.randint(size // 4, size, ()))
        small = F.interpolate(moved, size=(side, side), mode="area")
        moved = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    return moved.clamp(-1, 1)


def scorer_split(record: dict) -> bool:
    """The scorer's own training split: the teacher's training captions less a twentieth, salted anew."""
    salted = hashlib.md5(f"scorer|{record['text']}|{record['style']}".encode()).hexdigest()
    return record["split"] == "train" and int(salted, 16) % 20 != 0


def contrastive(model: nn.Module, captions: list[str], pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Symmetric cross-entropy of every text tower with the image tower, plus the thumbnail regression."""
    thumbnail = F.interpolate(pixels, size=(8, 8), mode="area").flatten(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
        image = model.image(augment(pixels, model.image_size))
        texts = model.texts(captions)
        sketches = [head(text) for head, text in zip(model.thumbnails, texts, strict=True)]
    image = F.normalize(image.float(), dim=-1)
    # The same caption twice in a batch is one class, not a negative.
    same = torch.tensor([[a == b for b in captions] for a in captions]).float()
    goal = same / same.sum(1, keepdim=True)
    total, hits = pixels.new_zeros(()), 0.0
    for text, sketch in zip(texts, sketches, strict=True):
        logits = model.scale.exp().clamp(max=60.0) * F.normalize(text.float(), dim=-1) @ image.T
        total = total + 0.5 * (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal))
        total = total + 2.0 * F.mse_loss(sketch.float(), thumbnail)
        hits = float(goal.gather(1, logits.detach().argmax(1, keepdim=True)).gt(0).float().mean())
    return total / len(texts), {"rank1_of_batch": hits}


@torch.no_grad()
def views(model: nn.Module, raw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Image embeddings of `count` augmented views [count, N, JOINT_WIDTH], and thumbnails [N, 192]."""
    found, thumbnails = [], []
    for view in range(count):
        torch.manual_seed(view)
        parts = [
            model.image(augment(to_float(raw[part]), model.image_size)) for part in chunks(len(raw), 128)
        ]
        found.append(F.normalize(torch.cat(parts), dim=-1))
    for part in chunks(len(raw), 512):
        thumbnails.append(F.interpolate(to_float(raw[part]), size=(8, 8), mode="area").flatten(1))
    return torch.stack(found), torch.cat(thumbnails)


def train_towers(steps: int, batch: int) -> None:
    """Second part: the teacher's text towers alone, against the image tower's embeddings, which are kept.

    Without the image tower a step costs a fifth; the CLIPs, which learn slower than the T5, catch up.
    """
    pictures = load_pictures(split="train")
    model = load_averaged("text", TeacherText(load_pictures().captions))
    embeddings, thumbnails = views(model, torch.as_tensor(pictures.pixels), 4)
    model.train().requires_grad_(True)
    model.vision.requires_grad_(False)
    stage = Stage(
        "towers", model, lr=7e-4, steps=steps, ema=0.998, weight_decay=0.1, warmup=100, decay_from=0.4
    )
    captions = pictures.captions

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = batches(len(captions), batch, step, seed=11)
        image = embeddings[int(torch.randint(len(embeddings), ())), chosen]
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            texts = model.texts([captions[i] for i in chosen])
            sketches = [head(text).float() for head, text in zip(model.thumbnails, texts, strict=True)]
        goal = torch.arange(batch)
        total, numbers = torch.zeros(()), {}
        for number, (text, sketch) in enumerate(zip(texts, sketches, strict=True), 1):
            logits = model.scale.exp().clamp(max=60.0) * F.normalize(text.float(), dim=-1) @ image.T
            total = total + 0.5 * (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal))
            total = total + 4.0 * F.mse_loss(sketch, thumbnails[chosen])
            numbers[f"rank1_{number}"] = float((logits.detach().argmax(1) == goal).float().mean())
        return total / len(texts), numbers

    stage.run(loss, log_every=50)


def train(scorer: bool, steps: int, batch: int) -> None:
    """Train the teacher's encoders or the scorer."""
    pictures = load_pictures(split="train")
    if scorer:
        pictures = pictures.select(scorer_split)
    model = (Scorer if scorer else TeacherText)(load_pictures().captions)
    raw, captions = torch.as_tensor(pictures.pixels), pictures.captions
    stage = Stage(
        "scorer" if scorer else "text",
        model,
        lr=1e-3,
        steps=steps,
        ema=0.998,
        weight_decay=0.1,
        warmup=100,
        decay_from=0.5,
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = batches(len(raw), batch, step, seed=2 if scorer else 1)
        return contrastive(model, [captions[i] for i in chosen], to_float(raw[chosen]))

    stage.run(loss, log_every=20)


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    """Image embeddings [N, JOINT_WIDTH] of pictures at the model's own size."""
    if pixels.shape[-1] != model.image_size:
        pixels = F.interpolate(pixels, size=(model.image_size,) * 2, mode="area")
    return model.image(pixels)


@torch.no_grad()
def rank_one_of_fifty(model: nn.Module, pictures: Pictures, *, tower: int = 0) -> float:
    """Share of pictures whose own caption beats 49 others drawn at random from the same set."""
    image = F.normalize(torch.cat([embed(model, x) for x in to_float(pictures.pixels).split(128)]), dim=-1)
    text = F.normalize(model.texts(pictures.captions)[tower], dim=-1)
    generator = torch.Generator().manual_seed(0)
    similarity, hits = image @ text.T, 0
    for i in range(len(image)):
        others = torch.randperm(len(image) - 1, generator=generator)[:49]
        others = others + (others >= i)
        hits += int(similarity[i, i] > similarity[i, others].max())
    return hits / len(image)


def measure() -> dict[str, float]:
    """Held-out figures of whatever has been trained so far."""
    found: dict[str, float] = {}
    everything = load_pictures().captions
    for name, stage, build in (("text", "towers", TeacherText), ("scorer", "scorer", Scorer)):
        path = work_folder() / stage / "state.safetensors"
        if not path.exists():
            continue
        with safe_open(path, "pt") as file:
            if file.metadata()["step"] == "0":  # by restore.py, which has no image tower to rank against
                print(f"{stage}: restored without its image tower, not measured")
                continue
        model = load_averaged(stage, build(everything))
        for split in ("test", "train"):
            pictures = load_pictures(split=split, denoiser_only=True)
            for tower in range(len(model.thumbnails)):
                key = f"{name}_{tower + 1}_rank1_of_50_{split}"
                found[key] = round(rank_one_of_fifty(model, pictures.select(lambda _: True), tower=tower), 4)
    (work_folder() / "text_measured.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scorer", action="store_true")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--towers", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if options.towers:
        train_towers(options.steps, options.batch)
    elif not options.measure:
        train(options.scorer, options.steps, options.batch)
    print(measure())

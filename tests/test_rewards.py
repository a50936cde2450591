"""ImageReward and HPSv3: real classes with tiny random weights, held against forwards in plain torch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer, Qwen2Tokenizer

from scalewise.metrics import ImageFeatures, hpsv3, image_reward

Weights = dict[str, Tensor]
MEAN, STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Different smooth pictures with some noise, bytes [N, H, W, 3]."""
    draw = np.random.default_rng(7)
    coarse = draw.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    smooth = [
        np.array(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse
    ]
    return np.stack(smooth) // 2 + draw.integers(0, 100, (count, height, width, 3), dtype=np.uint8)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Values at which every layer has its say: matrices that keep lengths, scales near 1, small shifts."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            weights[name] = values / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 0.1 * values + ("norm" in name.lower() or "ln_q" in name) * name.endswith(
                "weight"
            )
    return weights


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    apart = x - x.mean(-1, keepdim=True)
    scaled = apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q [L, D], k and v [M, D], mask [L, M] of what may be seen."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# ImageReward. Sizes and layers are small; heads (16 and 12) and what norms add are the published ones.

V, T, SIDE, PATCH, DEEP = 32, 24, 32, 8, 2
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "a", "cat", "dog", "on", "the", "red", "mat", "in", "rain", "and", "sun",
]  # fmt: skip
SIZES = {
    "vision_config": {"hidden_size": V, "intermediate_size": 40, "num_hidden_layers": DEEP,
                      "image_size": SIDE, "patch_size": PATCH},
    "text_config": {"hidden_size": T, "intermediate_size": 36, "num_hidden_layers": DEEP,
                    "max_position_embeddings": 48, "vocab_size": len(WORDS) + 2},
}  # fmt: skip
CAPTIONS = ["A red cat", "a dog on the mat in rain", "zebra and the sun", "cat " * 60]


def blip_weights() -> Weights:
    """Random weights with the names and shapes of ImageReward.pt."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, inner: int, outer: int) -> None:
        shapes.update({f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)})

    def scale(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes |= {f"{see}.cls_token": (1, 1, V), f"{see}.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, V)}
    shapes |= {f"{see}.patch_embed.proj.weight": (V, 3, PATCH, PATCH), f"{see}.patch_embed.proj.bias": (V,)}
    for i in range(DEEP):
        scale(f"{see}.blocks.{i}.norm1", V)
        scale(f"{see}.blocks.{i}.norm2", V)
        layer(f"{see}.blocks.{i}.attn.qkv", V, 3 * V)
        layer(f"{see}.blocks.{i}.attn.proj", V, V)
        layer(f"{see}.blocks.{i}.mlp.fc1", V, 40)
        layer(f"{see}.blocks.{i}.mlp.fc2", 40, V)
    scale(f"{see}.norm", V)
    shapes[f"{read}.embeddings.word_embeddings.weight"] = (len(WORDS) + 2, T)
    shapes[f"{read}.embeddings.position_embeddings.weight"] = (48, T)
    scale(f"{read}.embeddings.LayerNorm", T)
    for i in range(DEEP):
        at = f"{read}.encoder.layer.{i}"
        for kind, width in (("attention", T), ("crossattention", V)):
            layer(f"{at}.{kind}.self.query", T, T)
            layer(f"{at}.{kind}.self.key", width, T)
            layer(f"{at}.{kind}.self.value", width, T)
            layer(f"{at}.{kind}.output.dense", T, T)
            scale(f"{at}.{kind}.output.LayerNorm", T)
        layer(f"{at}.intermediate.dense", T, 36)
        layer(f"{at}.output.dense", 36, T)
        scale(f"{at}.output.LayerNorm", T)
    for place, inner, outer in ((0, T, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        layer(f"mlp.layers.{place}", inner, outer)
    weights = random_weights(shapes, 1)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[f"{see}.{name}"] *= 3e-3  # small enough for the first norm's epsilon to matter
    weights[f"{read}.embeddings.word_embeddings.weight"] *= 5
    return weights


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user would make it: converted weights, BERT's tokenizer files, and sizes."""
    folder = tmp_path_factory.mktemp("blip")
    save_file(blip_weights(), folder / "ImageReward.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def reward(blip_folder: Path) -> image_reward.ImageReward:
    return image_reward.EXTRA.load(str(blip_folder), "cpu")


def blip_forward(weights: Weights, pixels: Tensor, caption: str) -> float:
    """ImageReward in plain torch, by the names of its authors: normalised pixels [3, 32, 32], one caption."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(2)
    kernel = weights[f"{see}.patch_embed.proj.weight"].flatten(1)
    x = patches.flatten(0, 1) @ kernel.T + weights[f"{see}.patch_embed.proj.bias"]
    x = torch.cat([weights[f"{see}.cls_token"][0], x]) + weights[f"{see}.pos_embed"][0]
    for i in range(DEEP):
        at = f"{see}.blocks.{i}"
        parts = linear(weights, f"{at}.attn.qkv", norm(weights, f"{at}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(weights, f"{at}.attn.proj", attend(*parts, heads=16))
        inner = F.gelu(linear(weights, f"{at}.mlp.fc1", norm(weights, f"{at}.norm2", x, 1e-6)))
        x = x + linear(weights, f"{at}.mlp.fc2", inner)
    seen = norm(weights, f"{see}.norm", x, 1e-6)

    ids = [WORDS.index(word) if word in WORDS else 1 for word in caption.lower().split()][:33]
    ids = [2, *ids, 3]  # without padding: what fills up to 35 tokens must not count
    y = weights[f"{read}.embeddings.word_embeddings.weight"][ids]
    y = y + weights[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(weights, f"{read}.embeddings.LayerNorm", y, 1e-12)
    for i in range(DEEP):
        at = f"{read}.encoder.layer.{i}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            beside = y if source is None else source
            q = linear(weights, f"{at}.{kind}.self.query", y)
            k, v = (linear(weights, f"{at}.{kind}.self.{part}", beside) for part in ("key", "value"))
            new = linear(weights, f"{at}.{kind}.output.dense", attend(q, k, v, heads=12))
            y = norm(weights, f"{at}.{kind}.output.LayerNorm", y + new, 1e-12)
        new = linear(weights, f"{at}.output.dense", F.gelu(linear(weights, f"{at}.intermediate.dense", y)))
        y = norm(weights, f"{at}.output.LayerNorm", y + new, 1e-12)
    score = y[0]
    for place in (0, 2, 4, 6, 7):
        score = linear(weights, f"mlp.layers.{place}", score)
    return (float(score) - 0.16717362830052426) / 1.0333394966054072


def blip_pixels(picture: np.ndarray, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Resized to (width, height), cut from (left, top) and normalised."""
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    image = image.crop((*corner, corner[0] + SIDE, corner[1] + SIDE))
    return ((torch.tensor(np.array(image)).float() / 255 - MEAN) / STD).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("shape", "size", "corner"),
    [((48, 80), (53, 32), (10, 0)), ((82, 48), (32, 54), (0, 11)), ((32, 32), (32, 32), (0, 0))],
)
def test_image_rewards_scores_are_those_of_the_published_network_in_plain_torch(
    reward: image_reward.ImageReward, shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int]
) -> None:
    images, weights = pictures(4, *shape), blip_weights()
    found = reward.extract(images, CAPTIONS)["image_reward"]
    expected = [
        blip_forward(weights, blip_pixels(picture, size, corner), caption)
        for picture, caption in zip(images, CAPTIONS, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.dtype == torch.float32 and found.std() > 0.1


def test_image_reward_reads_the_caption_and_sees_the_picture(reward: image_reward.ImageReward) -> None:
    images = pictures(2, 40, 40)
    one, other = (reward.extract(images, [caption] * 2)["image_reward"] for caption in CAPTIONS[:2])
    assert (one - other).abs().min() > 0.01
    assert (one[0] - one[1]).abs() > 0.01


def test_image_reward_of_a_picture_does_not_depend_on_its_neighbours(
    reward: image_reward.ImageReward,
) -> None:
    images, captions = pictures(37, 40, 40), (CAPTIONS * 10)[:37]
    together = reward.extract(images, captions)["image_reward"]
    alone = [reward.extract(images[i : i + 1], captions[i : i + 1])["image_reward"] for i in range(37)]
    assert together.shape == (37,)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_image_reward_loads_a_file_of_half_precision_with_what_training_left(
    reward: image_reward.ImageReward, blip_folder: Path, tmp_path: Path
) -> None:
    leftovers = {
        "blip.text_decoder.bert.embeddings.position_ids": torch.arange(48)[None],
        "blip.text_encoder.embeddings.position_ids": torch.arange(48)[None],
        "blip.vision_proj.weight": torch.ones(4, V), "blip.text_proj.bias": torch.ones(4),
        "blip.itm_head.weight": torch.ones(2, T),
    }  # fmt: skip
    halves = {name: value.half() for name, value in blip_weights().items()}
    save_file(halves | leftovers, copied(blip_folder, tmp_path) / "ImageReward.safetensors")
    found = image_reward.EXTRA.load(str(tmp_path / "ImageReward.safetensors"), "cpu")
    for part in (found.vision, found.text, found.head):
        assert {value.dtype for value in part.parameters()} == {torch.float32}
    images = pictures(4, 40, 40)
    scores, exact = (one.extract(images, CAPTIONS)["image_reward"] for one in (found, reward))
    assert torch.allclose(scores, exact, atol=0.02) and not torch.equal(scores, exact)


def test_image_rewards_missing_unknown_and_odd_weights_are_counted(blip_folder: Path, tmp_path: Path) -> None:
    weights = blip_weights()
    del weights["mlp.layers.7.bias"], weights["blip.visual_encoder.norm.bias"]
    weights["blip.text_encoder.pooler.dense.bias"] = torch.ones(T)
    weights["mlp.layers.0.bias"] = torch.ones(3)
    save_file(weights, copied(blip_folder, tmp_path) / "ImageReward.safetensors")
    count = len(blip_weights())
    with pytest.raises(
        ValueError,
        match=rf"not match the {count} weights of ImageReward: 2 missing \(blip\.visual_encoder\.norm\.bias, "
        r"\.\.\.\), 1 unknown \(blip\.text_encoder\.pooler\.dense\.bias\), 1 with a wrong shape \(mlp\.",
    ):
        image_reward.EXTRA.load(str(tmp_path), "cpu")


def test_without_a_config_image_reward_expects_the_published_sizes(blip_folder: Path, tmp_path: Path) -> None:
    (copied(blip_folder, tmp_path) / "config.json").unlink()
    # ViT-L's other 22 blocks have 12 weights each, and BERT's other 10 layers 26 each.
    with pytest.raises(
        ValueError, match=rf"{22 * 12 + 10 * 26} missing .*blip\.text_encoder\.encoder\.layer\.10"
    ):
        image_reward.EXTRA.load(str(tmp_path), "cpu")


def test_image_rewards_pickle_is_refused_and_the_conversion_that_is_named_works(
    reward: image_reward.ImageReward, blip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied(blip_folder, tmp_path) / "ImageReward.safetensors").unlink()
    # Tensors that share memory or lie transposed, which safetensors alone would refuse.
    weights = {
        name: value.T.contiguous().T if value.ndim == 2 else value for name, value in blip_weights().items()
    }
    shared = weights["blip.visual_encoder.cls_token"]
    torch.save(weights | {"blip.temp": shared.view(-1)}, tmp_path / "ImageReward.pt")
    for source in (tmp_path, tmp_path / "ImageReward.pt", tmp_path / "ImageReward.safetensors"):
        with pytest.raises(ValueError, match="is not a safetensors file, and pickles can run") as caught:
            image_reward.EXTRA.load(str(source), "cpu")
    [command] = str(caught.value).split("convert the published file once: ")[1:]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    converted = load_file(tmp_path / "ImageReward.safetensors")
    assert all(torch.equal(converted[name], value) for name, value in blip_weights().items())
    images = pictures(2, 40, 40)
    found = image_reward.EXTRA.load(str(tmp_path), "cpu").extract(images, CAPTIONS[:2])["image_reward"]
    # Where weights lie in memory changes the last bits on some processors.
    assert torch.allclose(found, reward.extract(images, CAPTIONS[:2])["image_reward"], rtol=1e-5, atol=1e-6)


def test_image_rewards_weights_that_are_not_there_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ImageReward\.safetensors does not exist; use the path"):
        image_reward.EXTRA.load(str(tmp_path), "cpu")
    (tmp_path / "ImageReward.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"Cannot read .*ImageReward\.safetensors \(.*\); copy it again"):
        image_reward.EXTRA.load(str(tmp_path), "cpu")


def test_without_tokenizer_files_image_reward_asks_the_hub_for_berts(
    blip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied(blip_folder, tmp_path) / "vocab.txt").unlink()
    asked: list[str] = []
    beside = BertTokenizer.from_pretrained(blip_folder)
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda place: asked.append(place) or beside)
    image_reward.EXTRA.load(str(tmp_path), "cpu")
    assert asked == ["bert-base-uncased"]

    def offline(place: str) -> None:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(BertTokenizer, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'bert-base-uncased' \(no connection\); copy vocab\.txt and"):
        image_reward.EXTRA.load(str(tmp_path), "cpu")


def test_a_tokenizer_with_other_words_than_image_rewards_is_refused(
    blip_folder: Path, tmp_path: Path
) -> None:
    (copied(blip_folder, tmp_path) / "vocab.txt").write_text("\n".join(WORDS[:-3]) + "\n")
    with pytest.raises(
        ValueError, match=rf"has {len(WORDS) - 1} tokens including .* the weights {len(WORDS) + 2}; copy"
    ):
        image_reward.EXTRA.load(str(tmp_path), "cpu")


# HPSv3.

E, D, HEADS, GROUPS, WIDTH = 32, 32, 4, 2, 8
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
ROWS = 256 + len(MARKS) + 1
"""The tokens of the tiny tokenizer and the authors' own."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = {"instruction": "How good is this?\nFor: {text_prompt}\n", "suffix": "Rate: <|Reward|>\nEND"}
CONFIG = {
    # Flat, as on the hub, with more rows for words than HPSv3 keeps.
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "vocab_size": ROWS + 41,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "tie_word_embeddings": False,
    "use_sliding_window": False, "max_window_layers": 2,
    "bos_token_id": 256, "eos_token_id": 258, "vision_start_token_id": 259, "vision_end_token_id": 260,
    "image_token_id": 261, "video_token_id": 4000,
    "vision_config": {"depth": 2, "embed_dim": E, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3,
                      "hidden_size": D, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                      "temporal_patch_size": 2},
}  # fmt: skip
PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": MEAN.tolist(), "image_std": STD.tolist(), "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}  # fmt: skip


def qwen_weights() -> Weights:
    """Random weights with the names and shapes of HPSv3.safetensors."""
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (E, 3, 2, 14, 14)}

    def layer(name: str, inner: int, outer: int, *, bias: bool = True) -> None:
        shapes.update({f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {}))

    for i in range(2):
        for name in (f"visual.blocks.{i}.norm1", f"visual.blocks.{i}.norm2"):
            shapes |= {f"{name}.weight": (E,), f"{name}.bias": (E,)}
        layer(f"visual.blocks.{i}.attn.qkv", E, 3 * E)
        layer(f"visual.blocks.{i}.attn.proj", E, E)
        layer(f"visual.blocks.{i}.mlp.fc1", E, 2 * E)
        layer(f"visual.blocks.{i}.mlp.fc2", 2 * E, E)
        at = f"model.layers.{i}"
        for part, width in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            layer(f"{at}.self_attn.{part}_proj", D, width * WIDTH)
        layer(f"{at}.self_attn.o_proj", HEADS * WIDTH, D, bias=False)
        layer(f"{at}.mlp.gate_proj", D, 48, bias=False)
        layer(f"{at}.mlp.up_proj", D, 48, bias=False)
        layer(f"{at}.mlp.down_proj", 48, D, bias=False)
        shapes |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)}
    shapes |= {"visual.merger.ln_q.weight": (E,), "visual.merger.ln_q.bias": (E,)}
    layer("visual.merger.mlp.0", 4 * E, 4 * E)
    layer("visual.merger.mlp.2", 4 * E, D)
    shapes |= {"model.embed_tokens.weight": (ROWS, D), "model.norm.weight": (D,), "lm_head.weight": (ROWS, D)}
    for place, inner, outer in ((0, D, 1024), (3, 1024, 16), (5, 16, 2)):
        layer(f"rm_head.{place}", inner, outer)
    weights = random_weights(shapes, 2)
    weights["model.embed_tokens.weight"] *= 4
    return weights


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published weights, the base's files in the hub's layout, and prompt.json."""
    folder = tmp_path_factory.mktemp("qwen")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    for name, what in (
        ("config", CONFIG), ("preprocessor_config", PROCESSOR), ("prompt", PROMPT),
        ("chat_template", {"chat_template": TEMPLATE}),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(what))
    save_file(qwen_weights(), folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(qwen_folder: Path) -> hpsv3.HPSv3:
    return hpsv3.EXTRA.load(str(qwen_folder), "cpu")


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (i, i + half) of each head, x [L, heads, 2K], by angles [L, K]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def qwen_sees(weights: Weights, picture: np.ndarray, height: int, width: int) -> Tensor:
    """Tokens [L, D] of a picture that is shown at height x width, by the vision tower in plain torch."""
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    pixels = (torch.tensor(np.array(image)).float() / 255 - MEAN) / STD
    rows, columns = height // 28, width // 28
    # Squares of 2 x 2 patches one after another; a picture is a film of two equal frames.
    patches = pixels.reshape(rows, 2, 14, columns, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
    patches = patches.reshape(-1, 3, 1, 14, 14).expand(-1, -1, 2, -1, -1).flatten(1)
    place = torch.stack(torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"), -1)
    place = place.reshape(rows, 2, columns, 2, 2).transpose(1, 2).reshape(-1, 2)
    pace = 10000.0 ** -(torch.arange(4) / 4)  # heads of 16: 4 angles for the row, 4 for the column
    angles = (place[..., None] * pace).flatten(1)
    x = patches @ weights["visual.patch_embed.proj.weight"].flatten(1).T
    for i in range(2):
        at = f"visual.blocks.{i}"
        q, k, v = linear(weights, f"{at}.attn.qkv", norm(weights, f"{at}.norm1", x, 1e-6)).chunk(3, -1)
        q, k = (turned(part.unflatten(-1, (2, -1)), angles).flatten(1) for part in (q, k))
        x = x + linear(weights, f"{at}.attn.proj", attend(q, k, v, heads=2))
        inner = linear(weights, f"{at}.mlp.fc1", norm(weights, f"{at}.norm2", x, 1e-6))
        x = x + linear(weights, f"{at}.mlp.fc2", inner * (1.702 * inner).sigmoid())
    x = norm(weights, "visual.merger.ln_q", x, 1e-6).reshape(-1, 4 * E)
    return linear(weights, "visual.merger.mlp.2", F.gelu(linear(weights, "visual.merger.mlp.0", x)))


def qwen_forward(weights: Weights, picture: np.ndarray, caption: str, height: int, width: int) -> list[float]:
    """HPSv3 in plain torch: mean and deviation for one picture and caption."""

    def ids(text: str) -> list[int]:
        letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters += [i for i in range(256) if i not in letters]
        return [letters.index(byte) for byte in text.encode()]

    def rms(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    seen = qwen_sees(weights, picture, height, width)
    before = [257, *ids("user\n"), 259]
    question = [*ids(f"How good is this?\nFor: {caption}\nRate: "), ROWS - 1, *ids("\nEND")]
    after = [260, *question, 258, *ids("\n"), 257, *ids("assistant\n")]
    words = weights["model.embed_tokens.weight"]
    x = torch.cat([words[before], seen, words[after]])
    angles = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    past = torch.ones(len(x), len(x)).tril().bool()
    for i in range(2):
        at = f"model.layers.{i}"
        inner = rms(f"{at}.input_layernorm", x)
        q, k, v = (
            linear(weights, f"{at}.self_attn.{part}_proj", inner).unflatten(-1, (-1, WIDTH)) for part in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (k, v))
        parts = turned(q, angles).flatten(1), turned(k, angles).flatten(1), v.flatten(1)
        x = x + linear(weights, f"{at}.self_attn.o_proj", attend(*parts, heads=HEADS, mask=past))
        inner = rms(f"{at}.post_attention_layernorm", x)
        gate = F.silu(linear(weights, f"{at}.mlp.gate_proj", inner))
        x = x + linear(weights, f"{at}.mlp.down_proj", gate * linear(weights, f"{at}.mlp.up_proj", inner))
    hidden = rms("model.norm", x)[len(before) + len(seen) + after.index(ROWS - 1)]
    for place in (0, 3):
        hidden = linear(weights, f"rm_head.{place}", hidden).relu()
    return linear(weights, "rm_head.5", hidden).tolist()


@pytest.mark.parametrize(
    ("shape", "shown"),
    # 256 squares of 28 pixels, or what comes next above them (or below) with whole squares on both sides.
    [((64, 64), (448, 448)), ((60, 100), (364, 588)), ((700, 500), (504, 364)), ((896, 896), (448, 448))],
)
def test_hpsv3s_scores_are_those_of_the_published_network_in_plain_torch(
    judge: hpsv3.HPSv3, shape: tuple[int, int], shown: tuple[int, int]
) -> None:
    images, captions, weights = pictures(2, *shape), ["a red cat", "zwei Hüte — {und} Öl"], qwen_weights()
    expected = [
        qwen_forward(weights, picture, caption, *shown)
        for picture, caption in zip(images, captions, strict=True)
    ]
    found = judge.extract(images, captions)["hpsv3"]
    assert found.tolist() == pytest.approx([mean for mean, _ in expected], abs=1e-4)
    assert judge.score(images[0], captions[0]).tolist() == pytest.approx(expected[0], abs=1e-4)
    assert found.dtype == torch.float32 and (found[0] - found[1]).abs() > 0.01


def test_hpsv3_reads_the_caption_sees_the_picture_and_does_not_look_at_neighbours(judge: hpsv3.HPSv3) -> None:
    images, captions = pictures(3, 40, 40), ["a cat", "a longer caption of another thing", "a cat"]
    together = judge.extract(images, captions)["hpsv3"]
    alone = [judge.extract(images[i : i + 1], captions[i : i + 1])["hpsv3"] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert (together[0] - together[2]).abs() > 0.003
    [other] = judge.extract(images[:1], ["a dog"])["hpsv3"]
    assert (other - together[0]).abs() > 0.003


def todays_layout(weights: Weights) -> Weights:
    """As transformers saves a Qwen2VLForConditionalGeneration now."""
    found = {}
    for name, value in weights.items():
        if name.startswith("visual."):
            found[f"model.{name}"] = value
        elif name.startswith("model."):
            found[f"model.language_model.{name[len('model.') :]}"] = value
        else:
            found[name] = value
    return found


def test_hpsv3_in_todays_layout_in_parts_and_in_half_precision_is_read_too(
    judge: hpsv3.HPSv3, qwen_folder: Path, tmp_path: Path
) -> None:
    (copied(qwen_folder, tmp_path) / "HPSv3.safetensors").unlink()
    weights = todays_layout(load_file(qwen_folder / "HPSv3.safetensors"))
    del weights["lm_head.weight"]
    names = sorted(weights)
    for part, some in enumerate((names[::2], names[1::2]), 1):
        halves = {name: weights[name].bfloat16() for name in some}
        save_file(halves, tmp_path / f"model-0000{part}-of-00002.safetensors")
    found = hpsv3.EXTRA.load(str(tmp_path), "cpu")
    for part in (found.model, found.head):
        assert {value.dtype for value in part.parameters()} == {torch.float32}
    images = pictures(1, 40, 40)
    score, exact = (one.extract(images, ["a cat"])["hpsv3"] for one in (found, judge))
    assert torch.allclose(score, exact, atol=0.05)
    rounded = {name: value.bfloat16().float() for name, value in qwen_weights().items()}
    assert score.tolist() == pytest.approx(qwen_forward(rounded, images[0], "a cat", 448, 448)[:1], abs=1e-4)


def test_hpsv3s_missing_unknown_and_odd_weights_are_counted(qwen_folder: Path, tmp_path: Path) -> None:
    weights = qwen_weights()
    count = len(weights) - 1
    for name in [name for name in weights if name.startswith("rm_head.")]:
        del weights[name]
    weights |= {"rm_head.output_layer.weight": torch.ones(2, 1024), "model.norm.weight": torch.ones(D + 1)}
    save_file(weights, copied(qwen_folder, tmp_path) / "HPSv3.safetensors")
    with pytest.raises(
        ValueError,
        match=rf"not match the {count} weights of HPSv3: 6 missing \(rm_head\.0\.bias, \.\.\.\), 1 unknown "
        r"\(rm_head\.output_layer\.weight\), 1 with a wrong shape \(model\.language_model\.norm\.weight\);",
    ):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")


def broken_json(folder: Path) -> None:
    (folder / "prompt.json").write_text("{")


def without(key: str) -> Callable[[Path], None]:
    left = {name: text for name, text in PROMPT.items() if name != key}
    return lambda folder: (folder / "prompt.json").write_text(json.dumps(left)) and None


def worded(**changed: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "prompt.json").write_text(json.dumps(PROMPT | changed)) and None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (broken_json, r"JSONDecodeError"),
        (without("suffix"), r"KeyError: 'suffix'"),
        (worded(instruction="For: text_prompt"), r"must contain \{text_prompt\}"),
        (worded(instruction="{text_prompt} and {other}"), r"KeyError: 'other'"),
        (worded(suffix="Rate it"), r"and <\|Reward\|> once"),
        (worded(suffix="<|Reward|> <|Reward|>"), r"and <\|Reward\|> once"),
    ],
)
def test_a_wrong_prompt_is_refused_with_what_it_has_to_hold_and_where_it_is_published(
    spoil: Callable[[Path], None], why: str, qwen_folder: Path, tmp_path: Path
) -> None:
    spoil(copied(qwen_folder, tmp_path))
    with pytest.raises(
        ValueError,
        match=rf'prompt\.json is not a valid .*{why}.*"instruction": .*data_collator_qwen\.py',
    ):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")


def test_what_lacks_in_hpsv3s_folder_is_named(qwen_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"MizzenAI/HPSv3 has no config\.json; use a folder with HPSv3\.safetensors"
    ):
        hpsv3.EXTRA.load("MizzenAI/HPSv3", "cpu")
    copied(qwen_folder, tmp_path)
    for name, message in (
        ("HPSv3.safetensors", r"has neither HPSv3\.safetensors nor model\*"),
        ("prompt.json", r"has no prompt\.json"),
    ):
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=message):
            hpsv3.EXTRA.load(str(tmp_path), "cpu")


def test_a_tokenizer_of_a_handful_of_words_or_a_template_without_picture_is_refused(
    qwen_folder: Path, tmp_path: Path
) -> None:
    template = copied(qwen_folder, tmp_path) / "chat_template.json"
    template.write_text(json.dumps({"chat_template": TEMPLATE.replace("<|image_pad|>", "")}))
    with pytest.raises(
        ValueError, match=r"Cannot load HPSv3's chat .* template must contain <\|image_pad\|>"
    ):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")
    template.write_text(json.dumps({"chat_template": TEMPLATE}))
    config = CONFIG | {"image_token_id": 17}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"has {ROWS} tokens .* id 261 .* the model has {ROWS}, with id 17\. Copy"
    ):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"has 2 tokens .* the model has {ROWS}, with id 261\. Copy all"):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")
    copied(qwen_folder, tmp_path)
    weights = qwen_weights() | {"model.embed_tokens.weight": torch.ones(3 * ROWS, D)}
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=rf"has {ROWS} tokens .* the model has {3 * ROWS}, with id 261"):
        hpsv3.EXTRA.load(str(tmp_path), "cpu")


def test_a_caption_that_holds_a_mark_of_the_tokenizer_is_refused(judge: hpsv3.HPSv3) -> None:
    for mark in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(ValueError, match=r"contains <\|.*\|>, a special token of HPSv3; remove it"):
            judge.extract(pictures(1, 40, 40), [f"a cat {mark}"])


# Both.


def test_each_offers_one_metric_that_averages_over_prompts() -> None:
    for extra, name in ((image_reward.EXTRA, "image-reward"), (hpsv3.EXTRA, "hpsv3")):
        [metric] = extra.metrics
        assert extra.name == name and not extra.source and metric.better == "higher"
        seen = ImageFeatures(
            None, torch.tensor([0, 0, 1]), None, outputs={metric.name: torch.tensor([1.0, 2.0, 6.0])}
        )
        statistic = metric.statistic(seen)
        assert statistic is not None
        assert (statistic(torch.tensor([0])), statistic(torch.tensor([0, 1]))) == (1.5, 3.0)
        assert metric.statistic(ImageFeatures(None, torch.tensor([0]), None)) is None
    assert image_reward.EXTRA.metrics[0].show(1.23456) == "1.235"
    assert hpsv3.EXTRA.metrics[0].show(7.23456) == "7.23"

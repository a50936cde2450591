"""Text encoders, tokenizers and VAEs of the tiny random models (`tiny()`) for tests and dry runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TOKENS = 24
PIECES = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.-'"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator within a `with` block, and restore it after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def image_vae(*, scaling_factor: float, shift_factor: float | None) -> AutoencoderKL:
    """Create a VAE with a downscaling factor of 2 and 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_tokenizer() -> tuple[CLIPTokenizer, int]:
    """Create a tokenizer of single letters; return it with the size of its vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS), len(words)


def clip_config(vocabulary: int, width: int) -> CLIPTextConfig:
    """Create the configuration of a CLIP text encoder with two layers."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Create a tokenizer of single letters."""
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in PIECES], extra_ids=0, model_max_length=TOKENS)


def clip_and_t5(joint_width: int) -> dict[str, Any]:
    """Create tokenizers and text encoders of SD3: two CLIPs of `joint_width` and a T5 of twice that width."""
    tokenizer, words = clip_tokenizer()
    t5 = T5Config(vocab_size=len(PIECES), d_model=2 * joint_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": t5_tokenizer(),
        "text_encoder": CLIPTextModelWithProjection(clip_config(words, joint_width)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(words, joint_width)),
        "text_encoder_3": T5EncoderModel(t5),
    }


def clip_and_t5_for_flux(width: int) -> dict[str, Any]:
    """Create tokenizers and text encoders of FLUX: a CLIP of `width` and a T5 of twice that width."""
    tokenizer, words = clip_tokenizer()
    t5 = T5Config(vocab_size=len(PIECES), d_model=2 * width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": t5_tokenizer(),
        "text_encoder": CLIPTextModel(clip_config(words, width)),
        "text_encoder_2": T5EncoderModel(t5),
    }


def two_clips(width: int) -> dict[str, Any]:
    """Create tokenizers and text encoders of SDXL: two CLIPs of `width`, the second one with a projection."""
    tokenizer, words = clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": CLIPTextModel(clip_config(words, width)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(words, width)),
    }


def umt5(width: int) -> dict[str, Any]:
    """Create tokenizer and text encoder of Wan: a UMT5 of `width`."""
    config = UMT5Config(vocab_size=len(PIECES), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"tokenizer": t5_tokenizer(), "text_encoder": UMT5EncoderModel(config)}

"""Text encoders and tokenizers for the random miniatures (`tiny()`) that tests and dry runs use."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 24


def clip_and_t5(joint_width: int) -> dict[str, Any]:
    """Return tokenizers and text encoders 1, 2, 3: two CLIPs of `joint_width` and a T5 of twice that."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    clip_tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=joint_width,
        intermediate_size=2 * joint_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=joint_width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.-'"]
    t5_tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=TOKENS)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=2 * joint_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    return {
        "tokenizer": clip_tokenizer,
        "tokenizer_2": clip_tokenizer,
        "tokenizer_3": t5_tokenizer,
        "text_encoder": CLIPTextModelWithProjection(config),
        "text_encoder_2": CLIPTextModelWithProjection(config),
        "text_encoder_3": t5,
    }

"""Stable Diffusion 3 and 3.5 (Medium, Large), and the mini, which has the same architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from scalewise.method.adapter import Condition
from scalewise.method.noise import FlowMatching
from scalewise.method.scales import Scale
from scalewise.models.pipeline_adapter import PipelineAdapter

PIPELINE_T5_TOKENS = 256
"""Default number of T5 tokens of the diffusers pipeline."""


class SD3(PipelineAdapter):
    """Models of `StableDiffusion3Pipeline`."""

    family = "sd3"
    pipeline_class: ClassVar[Any] = StableDiffusion3Pipeline
    text_names = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    t5_tokenizer = "tokenizer_3"
    optional_text_names = ("text_encoder_3", "tokenizer_3")

    def configure(self, config: Mapping[str, Any]) -> None:
        self.noise = FlowMatching()
        self.patch, self.channels = int(config["patch_size"]), int(config["in_channels"])
        self.blocks = int(config["num_layers"])
        self.width = int(config["num_attention_heads"] * config["attention_head_dim"])
        self.full_scale = Scale(1, config["sample_size"], config["sample_size"])
        tokenizer = self.pipeline.tokenizer
        self.clip_length = 77 if tokenizer is None else int(tokenizer.model_max_length)
        positions = int(config["pos_embed_max_size"]) * self.patch
        self.largest_scale = Scale(1, positions, positions)

    def pipeline_sequence_length(self) -> int:
        return min(PIPELINE_T5_TOKENS, self.default_sequence_length())

    @classmethod
    def sequence_length_for(cls, components: Mapping[str, tuple[str, str]]) -> int | None:
        # Without T5 its tokens are zeros, in the number that diffusers uses; more would only cost time.
        return None if "text_encoder_3" in components else PIPELINE_T5_TOKENS

    def tokenizers(self) -> list[tuple[Any, int, str]]:
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_3
        found = [(clip, clip.model_max_length, "CLIP")]
        return found if t5 is None else [*found, (t5, self.max_sequence_length, "T5")]

    @contextmanager
    def _transformer_width(self) -> Iterator[None]:
        """Provide the width of zero embeddings to `encode_prompt` if the transformer is not loaded."""
        if self.pipeline.transformer is not None:
            yield
            return
        width = self.config["joint_attention_dim"]
        self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        try:
            yield
        finally:
            self.pipeline.transformer = None

    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        with self._transformer_width():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                None,
                None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"tokens": tokens, "pooled": pooled}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.clip_length + self.max_sequence_length  # CLIP tokens, then T5 tokens
        return {
            "tokens": (length, self.config["joint_attention_dim"]),
            "pooled": (self.config["pooled_projection_dim"],),
        }

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        dtype: Any = self.denoiser.dtype
        return self.denoiser(
            hidden_states=x_t.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=cond.tensors["tokens"].to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def block_list(self) -> Sequence[nn.Module]:
        return self.denoiser.transformer_blocks  # type: ignore[return-value]

    def image_tokens(self, output: Any) -> Tensor:
        return output[1]

    @classmethod
    def tiny(cls, seed: int = 0) -> SD3:
        from scalewise.models import tiny

        with tiny.seeded(seed):
            texts = tiny.clip_and_t5(joint_width=16)
            transformer = SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=4,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=32,
                pos_embed_max_size=12,
                qk_norm="rms_norm",
                dual_attention_layers=(0, 1),
            )
            vae = tiny.image_vae(scaling_factor=1.3, shift_factor=0.1)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **texts
        )
        return cls.from_tiny_pipeline(pipeline)

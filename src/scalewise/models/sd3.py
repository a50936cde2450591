"""Stable Diffusion 3 and 3.5 (Medium with its dual attention, Large), and the mini, which is built alike."""

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

STOCK = 256
"""T5 tokens that diffusers' own pipeline reads by default."""


class SD3(PipelineAdapter):
    """The family of `StableDiffusion3Pipeline`."""

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
    optional_texts = ("text_encoder_3", "tokenizer_3")

    def describe(self, config: Mapping[str, Any]) -> None:
        self.noise = FlowMatching()
        self.patch, self.channels = int(config["patch_size"]), int(config["in_channels"])
        self.blocks = int(config["num_layers"])
        self.width = int(config["num_attention_heads"] * config["attention_head_dim"])
        self.full_scale = Scale(1, config["sample_size"], config["sample_size"])
        tokenizer = self.pipeline.tokenizer
        self.clip_length = 77 if tokenizer is None else int(tokenizer.model_max_length)
        positions = int(config["pos_embed_max_size"]) * self.patch
        self.largest_scale = Scale(1, positions, positions)

    def stock_sequence(self) -> int:
        return min(STOCK, self.longest_sequence())

    @classmethod
    def usual_sequence(cls, components: Mapping[str, tuple[str, str]]) -> int | None:
        # Zeros stand for the tokens of a T5 that is not there: as many as the stock pipeline has, for more
        # would say nothing and cost time.
        return None if "text_encoder_3" in components else STOCK

    def tokenizers(self) -> list[tuple[Any, int, str]]:
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_3
        found = [(clip, clip.model_max_length, "CLIP")]
        return found if t5 is None else [*found, (t5, self.max_sequence_length, "T5")]

    @contextmanager
    def _telling_the_width(self) -> Iterator[None]:
        """The stock zeros are as wide as the pipeline's transformer says, which may not be loaded."""
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
        with self._telling_the_width():
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
        length = self.clip_length + self.max_sequence_length  # CLIP's tokens stand before T5's
        return {
            "tokens": (length, self.config["joint_attention_dim"]),
            "pooled": (self.config["pooled_projection_dim"],),
        }

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        kind: Any = self.denoiser.dtype
        return self.denoiser(
            hidden_states=x_t.to(kind),
            timestep=t.float(),
            encoder_hidden_states=cond.tensors["tokens"].to(kind),
            pooled_projections=cond.tensors["pooled"].to(kind),
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
        pipeline.set_progress_bar_config(disable=True)
        return cls.around(pipeline, base="tiny-sd3").freeze()

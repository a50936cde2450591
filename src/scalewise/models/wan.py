"""Wan2.1 text-to-video: latents with frames, normalized with mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from scalewise.common.errors import ModelError
from scalewise.method.adapter import Condition
from scalewise.method.noise import FlowMatching
from scalewise.method.scales import Scale
from scalewise.models.pipeline_adapter import PipelineAdapter


class Wan(PipelineAdapter):
    """Models of `WanPipeline` with one transformer: Wan2.1 T2V 1.3B and 14B.

    A latent of k + 1 frames represents 4 k + 1 frames of video.
    """

    family = "wan"
    pipeline_class: ClassVar[Any] = WanPipeline
    text_names = ("text_encoder", "tokenizer")
    t5_tokenizer = "tokenizer"
    video = True

    def configure(self, config: Mapping[str, Any]) -> None:
        if self.pipeline.config.boundary_ratio is not None or self.pipeline.config.expand_timesteps:
            raise ModelError(
                f"{self.base} is a Wan2.2 model (two transformers, or one timestep per token), which is not "
                "supported; use a Wan2.1 text-to-video model."
            )
        self.noise = FlowMatching()
        frames, height, width = config["patch_size"]
        assert frames == 1 and height == width, "Wan2.1 has patches of 1 x 2 x 2"
        self.patch, self.channels = int(height), int(config["in_channels"])
        self.blocks = int(config["num_layers"])
        self.width = int(config["num_attention_heads"] * config["attention_head_dim"])
        self.full_scale = Scale(21, 60, 104)  # 81 frames of 480 x 832 pixels
        self.frame_factor = int(self.vae_config["scale_factor_temporal"])

    @classmethod
    def vae_dtype(cls, vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # as in the published model; in half precision videos flicker

    def tokenizers(self) -> list[tuple[Any, int, str]]:
        return [(self.pipeline.tokenizer, self.max_sequence_length, "T5")]

    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        tokens, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
            device=device,
        )  # fmt: skip
        return {"tokens": tokens}

    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5:
            raise ModelError(
                f"Pixels have the shape {list(pixels.shape)}, but {self.base} is a model for videos; use "
                "[N, 3, T, H, W]."
            )
        if (pixels.shape[2] - 1) % self.frame_factor:
            frames, k = pixels.shape[2], (pixels.shape[2] - 1) // self.frame_factor
            raise ModelError(
                f"A video of {frames} frames cannot be encoded; use {self.frame_factor} k + 1 frames, for "
                f"example {self.frame_factor * k + 1}."
            )
        return super().encode(pixels)

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self._component("vae", "vae").config
        mean, std = (
            torch.tensor(v, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.max_sequence_length, self.config["text_dim"])}

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        dtype: Any = self.denoiser.dtype
        return self.denoiser(
            hidden_states=x_t.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=cond.tensors["tokens"].to(dtype),
            return_dict=False,
        )[0]

    def block_list(self) -> Sequence[nn.Module]:
        return self.denoiser.blocks  # type: ignore[return-value]

    def image_tokens(self, output: Any) -> Tensor:
        return output

    @classmethod
    def tiny(cls, seed: int = 0) -> Wan:
        from scalewise.models import tiny

        with tiny.seeded(seed):
            texts = tiny.umt5(width=32)
            transformer = WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=32,
                freq_dim=16,
                ffn_dim=32,
                num_layers=3,
                rope_max_seq_len=32,
            )
            vae = AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.7, 1.1, 2.0],
                scale_factor_temporal=4,
                scale_factor_spatial=4,
            )
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipeline = WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)
        return cls.from_tiny_pipeline(pipeline)

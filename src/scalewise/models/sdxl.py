"""Stable Diffusion XL: a variance-preserving UNet that predicts noise and takes the image size as an
input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from scalewise.common.errors import ModelError
from scalewise.method.adapter import Condition
from scalewise.method.noise import VariancePreserving
from scalewise.method.scales import Scale
from scalewise.models.pipeline_adapter import PipelineAdapter

ZERO = 1e-5
"""Minimum of the last value of alphas_cumprod; that of SDXL is 4.7e-3."""


class SDXL(PipelineAdapter):
    """Models of `StableDiffusionXLPipeline`; features are the output of the middle block of the UNet.

    A token is a cell of the middle block, so `patch` is the downscaling factor of the UNet.
    """

    family = "sdxl"
    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    denoiser_name = "unet"
    text_names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    t5_tokenizer = None

    def configure(self, config: Mapping[str, Any]) -> None:
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(
                f"{self.base} has the scheduler {type(scheduler).__name__}, which has no alphas_cumprod, so "
                "its noise process differs from that of SDXL; such models are not supported, use another "
                "base."
            )
        predicts = scheduler.config.get("prediction_type", "epsilon")
        if predicts != "epsilon":
            raise ModelError(
                f"{self.base} predicts {predicts!r}, which is not supported; use an SDXL model that predicts "
                "'epsilon'."
            )
        if scheduler.alphas_cumprod[-1] < ZERO:
            raise ModelError(
                f"The scheduler of {self.base} has zero terminal SNR (rescale_betas_zero_snr), so x0 cannot "
                "be computed from a prediction of 'epsilon' at t = 1000. If the base was not trained with "
                "it, set rescale_betas_zero_snr to false in its scheduler_config.json."
            )
        self.noise = VariancePreserving(scheduler.alphas_cumprod)
        levels = config["block_out_channels"]
        self.patch, self.channels, self.blocks = 2 ** (len(levels) - 1), int(config["in_channels"]), 1
        self.width = int(levels[-1])
        side = int(config["sample_size"] or 128)  # as in the diffusers pipeline
        self.full_scale = Scale(1, side, side)

    @classmethod
    def vae_dtype(cls, vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        # The original VAE of SDXL overflows in float16 and has force_upcast=true; fixed ones have false.
        half = dtype == torch.float16 and vae_config.get("force_upcast", False)
        return torch.float32 if half else dtype

    def default_sequence_length(self) -> int:
        tokenizer = self.pipeline.tokenizer
        return 77 if tokenizer is None else int(tokenizer.model_max_length)

    def tokenizers(self) -> list[tuple[Any, int, str]]:
        clip = self.pipeline.tokenizer
        return [(clip, clip.model_max_length, "CLIP")]

    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            # Embeddings of empty prompts are zeros, as in the training of the model.
            empty = torch.tensor([not prompt for prompt in prompts], device=tokens.device)
            tokens = torch.where(empty[:, None, None], 0.0, tokens)
            pooled = torch.where(empty[:, None], 0.0, pooled)
        return {"tokens": tokens, "pooled": pooled}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        # The input of the added embedding is the pooled one and six sinusoids (two sizes and a corner).
        sizes = 6 * self.config["addition_time_embed_dim"]
        pooled = self.config["projection_class_embeddings_input_dim"] - sizes
        return {"tokens": (self.max_sequence_length, self.config["cross_attention_dim"]), "pooled": (pooled,)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        dtype: Any = self.denoiser.dtype
        size = self.size_condition(Scale(1, *x_t.shape[-2:]))
        ids = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=dtype)
        return self.denoiser(
            x_t.to(dtype),
            t.float().clamp(max=999),
            encoder_hidden_states=cond.tensors["tokens"].to(dtype),
            added_cond_kwargs={
                "text_embeds": cond.tensors["pooled"].to(dtype),
                "time_ids": ids.expand(len(x_t), -1),
            },
            return_dict=False,
        )[0]

    def size_condition(self, scale: Scale) -> tuple[int, int]:
        """Return height and width in pixels for the size conditioning of the UNet (original and target size).

        A latent smaller than the full size represents a full-size image at an intermediate step, so its size
        is the full size with the aspect ratio of the latent. For the actual small size, SDXL generates
        blurred images, like those of that size in its training data.
        """
        factor = (self.full_scale.cells / scale.cells) ** 0.5
        if factor < 1.1:  # already full size, because the buckets of SDXL vary by some percent
            factor = 1.0
        return round(scale.height * factor) * self.vae_factor, round(scale.width * factor) * self.vae_factor

    def block_list(self) -> Sequence[nn.Module]:
        return [self.denoiser.mid_block]  # type: ignore[list-item]

    def repeated_blocks(self) -> list[nn.Module]:
        return [m for m in self.denoiser.modules() if isinstance(m, BasicTransformerBlock)]

    def image_tokens(self, output: Any) -> Tensor:
        return output.flatten(2).transpose(1, 2)

    @classmethod
    def tiny(cls, seed: int = 0) -> SDXL:
        from scalewise.models import tiny

        with tiny.seeded(seed):
            texts = tiny.two_clips(width=16)
            unet = UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=1,
                attention_head_dim=(2, 2, 2),
                norm_num_groups=4,
                cross_attention_dim=32,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
            )
            vae = tiny.image_vae(scaling_factor=0.13, shift_factor=None)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
            steps_offset=1,
        )  # fmt: skip
        pipeline = StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=scheduler, **texts)
        return cls.from_tiny_pipeline(pipeline)

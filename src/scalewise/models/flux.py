"""FLUX.1: packed latents, guidance as an input, position ids computed for every scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from scalewise.method.adapter import GUIDANCE, Condition
from scalewise.method.noise import FlowMatching
from scalewise.method.scales import Scale
from scalewise.models.pipeline_adapter import PipelineAdapter


def pack(latents: Tensor) -> Tensor:
    """Pack 2 x 2 cells of latents [N, C, H, W] into tokens [N, H/2 * W/2, 4 C]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens [N, H/2 * W/2, 4 C] into latents [N, C, H, W]; the inverse of `pack`."""
    return FluxPipeline._unpack_latents(tokens, height, width, vae_scale_factor=1)


class Flux(PipelineAdapter):
    """Models of `FluxPipeline`: FLUX.1-dev, which takes guidance as an input, and variants without it."""

    family = "flux"
    pipeline_class: ClassVar[Any] = FluxPipeline
    text_names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    t5_tokenizer = "tokenizer_2"
    # proj_mlp and proj_out are the MLP of the single blocks. With them, LoRA covers attention and MLP of
    # every
    # block, as in the other families (docs/decisions.md).
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_mlp", "proj_out")

    def configure(self, config: Mapping[str, Any]) -> None:
        self.noise = FlowMatching()
        self.patch, self.channels = 2, int(config["in_channels"]) // 4
        self.double_blocks = int(config["num_layers"])
        self.blocks = self.double_blocks + int(config["num_single_layers"])
        self.width = int(config["num_attention_heads"] * config["attention_head_dim"])
        self.embedded_guidance = 4.5 if config["guidance_embeds"] else None
        side = int(getattr(self.pipeline, "default_sample_size", 128))
        self.full_scale = Scale(1, side, side)

    def tokenizers(self) -> list[tuple[Any, int, str]]:
        # CLIP only gives the pooled embedding, from the first 77 tokens; T5 gives the token embeddings.
        clip = self.pipeline.tokenizer
        return [
            (clip, clip.model_max_length, "CLIP"),
            (self.pipeline.tokenizer_2, self.max_sequence_length, "T5"),
        ]

    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"tokens": tokens, "pooled": pooled}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "tokens": (self.max_sequence_length, self.config["joint_attention_dim"]),
            "pooled": (self.config["pooled_projection_dim"],),
        }

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        dtype: Any = self.denoiser.dtype
        height, width = x_t.shape[-2:]
        if self.embedded_guidance is not None and GUIDANCE not in cond.tensors:
            cond = cond.with_guidance(self.embedded_guidance)
        # The transformer multiplies timestep and guidance by 1000.
        tokens, guidance = cond.tensors["tokens"], cond.tensors.get(GUIDANCE)
        ids = FluxPipeline._prepare_latent_image_ids(
            len(x_t), height // 2, width // 2, device=x_t.device, dtype=torch.float32
        )
        prediction = self.denoiser(
            hidden_states=pack(x_t).to(dtype),
            timestep=t.float() / 1000,
            guidance=None if guidance is None else guidance.float(),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            encoder_hidden_states=tokens.to(dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x_t.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)

    def block_list(self) -> Sequence[nn.Module]:
        transformer: Any = self.denoiser
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def image_tokens(self, output: Any) -> Tensor:
        return output[1]

    def scheduler_options(self, scheduler: Any, steps: int, scale: Scale) -> dict[str, Any]:
        options = super().scheduler_options(scheduler, steps, scale)
        if scheduler.config.get("use_flow_sigmas"):  # it computes its own sigmas, as in the pipeline
            return options
        return options | {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    @classmethod
    def tiny(cls, seed: int = 0) -> Flux:
        from scalewise.models import tiny

        with tiny.seeded(seed):
            transformer = FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=True,
                axes_dims_rope=(2, 2, 4),
            )
            texts = tiny.clip_and_t5_for_flux(width=16)
            vae = tiny.image_vae(scaling_factor=0.4, shift_factor=0.2)
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=16,
            max_image_seq_len=64, shift=3.0,
        )  # fmt: skip
        pipeline = FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)
        return cls.from_tiny_pipeline(pipeline)

"""Stable Diffusion 3 and 3.5 (Medium with its dual attention, Large), and the mini, which is built alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from scalewise.models.base import ALL_PARTS, Condition, ModelAdapter, ModelError, Part
from scalewise.noise import FlowMatching
from scalewise.scales import Scale, shifted_sigmas

_PARTS: dict[Part, tuple[str, ...]] = {
    "denoiser": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
}


class SD3(ModelAdapter):
    """The family of `StableDiffusion3Pipeline`."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")  # as released

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        config: Mapping[str, Any],
        *,
        base: str,
        vae_factor: int,
        max_sequence_length: int | None = None,
    ) -> None:
        """`config` is the denoiser's: sizes are known also while the denoiser itself is not loaded."""
        self.pipeline, self.base, self.noise = pipeline, base, FlowMatching()
        self.patch, self.channels = int(config["patch_size"]), int(config["in_channels"])
        self.blocks = int(config["num_layers"])
        self.width = int(config["num_attention_heads"] * config["attention_head_dim"])
        self.full_scale = Scale(1, config["sample_size"], config["sample_size"])
        positions = int(config["pos_embed_max_size"]) * self.patch
        self.largest_scale: Scale | None = Scale(1, positions, positions)
        self.vae_factor = vae_factor
        # SwD tokenises to 512; a T5 that was made for less says so.
        tokenizer = pipeline.tokenizer_3
        limit = 512 if tokenizer is None else min(512, tokenizer.model_max_length)
        self.max_sequence_length = max_sequence_length or limit

    @classmethod
    def load(
        cls,
        base: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        parts: Sequence[Part] = ALL_PARTS,
        max_sequence_length: int | None = None,
    ) -> SD3:
        left_out = {name: None for part in ALL_PARTS if part not in parts for name in _PARTS[part]}
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(base), dtype=dtype, use_safetensors=True, **left_out
            )
            config = SD3Transformer2DModel.load_config(str(base), subfolder="transformer")
            levels = len(AutoencoderKL.load_config(str(base), subfolder="vae")["block_out_channels"])
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"Cannot load the model {base}: {reason}") from error
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
                component.eval()
        factor = 2 ** (levels - 1)
        return cls(
            pipeline, config, base=str(base), vae_factor=factor, max_sequence_length=max_sequence_length
        )

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    @property
    def denoiser(self) -> nn.Module:  # type: ignore[override]
        return self._need("transformer", "denoiser")

    @property
    def device(self) -> torch.device:
        return next(p.device for c in self._modules() for p in c.parameters())

    def to(self, device: torch.device | str) -> SD3:
        for component in self._modules():
            component.to(device)
        return self

    def release(self, *parts: Part) -> None:
        for part in parts:
            for name in _PARTS[part]:
                setattr(self.pipeline, name, None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self._need("text_encoder", "text")
        self._warn_of_overflow(prompts)
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"tokens": tokens, "pooled": pooled})

    def _warn_of_overflow(self, prompts: Sequence[str]) -> None:
        """Warn of prompts that CLIP or T5 will cut; of SD3.5's encoders T5 reads much further than CLIP."""
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_3
        limits = [(clip, clip.model_max_length, "CLIP"), (t5, self.max_sequence_length, "T5")]
        for prompt in prompts:
            cut = []
            for tokenizer, limit, name in limits:
                length = len(tokenizer(prompt, verbose=False).input_ids)
                if length > limit:
                    cut.append(f"{name} reads {limit} of its {length} tokens")
            if cut:
                warnings.warn(
                    f"The end of the prompt {prompt[:60]!r} is ignored: {', '.join(cut)}. Shorten it.",
                    stacklevel=3,
                )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        vae: Any = self._need("vae", "vae")
        # The mode and not a draw: the cached latent of an image is the same whenever it is made.
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae: Any = self._need("vae", "vae")
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(latents.to(self.device, vae.dtype)).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        kind: Any = self.denoiser.dtype
        return self.denoiser(  # type: ignore[no-any-return]
            hidden_states=x_t.to(kind),
            timestep=t.float(),
            encoder_hidden_states=cond.tensors["tokens"].to(kind),
            pooled_projections=cond.tensors["pooled"].to(kind),
            return_dict=False,
        )[0]

    def block(self, index: int) -> nn.Module:
        if not 0 <= index < self.blocks:
            raise ModelError(f"There is no block {index}; this model has blocks 0 to {self.blocks - 1}.")
        return self.denoiser.transformer_blocks[index]  # type: ignore[index,return-value]

    def image_tokens(self, output: Any) -> Tensor:
        return output[1]  # type: ignore[no-any-return]

    def teacher_sigmas(self, steps: int) -> list[float]:
        return shifted_sigmas(steps, float(self.pipeline.scheduler.config.shift))

    def _need(self, name: str, part: Part) -> Any:
        component = getattr(self.pipeline, name, None)
        assert component is not None, f"the {part} of {self.base} was not loaded"
        return component

    def _modules(self) -> list[nn.Module]:
        return [c for c in self.pipeline.components.values() if isinstance(c, nn.Module)]

    @classmethod
    def tiny(cls, seed: int = 0) -> SD3:
        from scalewise.models import miniature

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            texts = miniature.clip_and_t5(joint_width=16)
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
            vae = AutoencoderKL(
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                scaling_factor=1.3,
                shift_factor=0.1,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **texts
        )
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
                component.eval()
        return cls(pipeline, transformer.config, base="tiny-sd3", vae_factor=2)

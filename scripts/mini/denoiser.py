"""Stage 5: the denoiser (diffusers' SD3Transformer2DModel, patch 1), by flow matching on fresh scenes.

    python scripts/mini/denoiser.py                      # train, resuming automatically
    python scripts/mini/denoiser.py --sheet sheet.png    # a contact sheet of 32 held-out captions

Training begins with mostly 8 x 8 latents, then mostly 16 x 16; every scale of the schedule is always
included, so that the teacher can sample at each. Scenes are rendered and encoded on the fly, so none is
repeated.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path

import torch
from common import Stage, euler, half_is_fast, load_averaged, to_float, work_folder
from diffusers import SD3Transformer2DModel
from PIL import Image
from scenes import held_out_scenes, training_scenes
from text import TeacherText, encode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae import CHANNELS, finished, resized

SCALES = (8, 10, 12, 16)
SMALL_MIX, LARGE_MIX = (0.8, 0.08, 0.08, 0.04), (0.2, 0.1, 0.1, 0.6)
BATCHES = {8: 128, 10: 96, 12: 64, 16: 48}
"""Batch size by scale; small latents need larger batches to use the processor fully."""
# StableDiffusion3Pipeline pads T5 tokens to 256 by default; one batch in 16 is padded like that.
PADDED_LENGTH, PADDED_SHARE = 256, 1 / 16
SHIFT = 3.0  # of the sampling schedule, as in SD3


def build() -> SD3Transformer2DModel:
    """Return an untrained denoiser, initialized as DiT: modulation and output at zero."""
    torch.manual_seed(4)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=7,
        joint_attention_dim=256,
        caption_projection_dim=224,
        pooled_projection_dim=256,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def teacher_text() -> TeacherText:
    """Load the text encoders with matrices rounded to float8, as they ship."""
    text = load_averaged("text", TeacherText())
    assert isinstance(text, TeacherText)
    for parameter in text.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    return text


class Latents:
    """Encodes scenes with the trained VAE; latents have mean 0 and deviation 1 at full scale."""

    @torch.no_grad()
    def __init__(self) -> None:
        self.vae = finished(CHANNELS)
        full = self.vae.encode(to_float(training_scenes(256, seed=6)[0])).latent_dist.mean
        self.shift, self.factor = float(full.mean()), float(1 / full.std())

    @torch.no_grad()
    def encode(self, pixels: Tensor, scale: int) -> Tensor:
        """Encode images [N, 3, 128, 128] in [-1, 1] to latents [N, C, scale, scale]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            moments = self.vae.encode(resized(pixels, 8 * scale)).latent_dist.mean
        return (moments.float() - self.shift) * self.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [N, C, h, w] to images [N, 3, 8 h, 8 w] in [-1, 1]."""
        parts = [self.vae.decode(p / self.factor + self.shift).sample for p in latents.split(32)]
        return torch.cat(parts).clamp(-1, 1)


def train(*, steps: int, small_steps: int) -> None:
    """Train by flow matching; timesteps are half uniform, half logit-normal, 10% of captions are dropped."""
    latents, text = Latents(), teacher_text()
    model = build()
    # On one core a step of 128 at 8 x 8 takes 4.0 s with the processor's flash attention, whose backward pass
    # is slow, 3.1 s with plain matrix products, and 2.0 s if blocks are also compiled, once per scale.
    torch._dynamo.config.recompile_limit = 32
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    stage = Stage("denoiser", model, lr=1.2e-3, steps=steps, ema=0.998, warmup=150, decay_from=0.7)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"denoiser {step}")
        scale = rng.choices(SCALES, SMALL_MIX if step < small_steps else LARGE_MIX)[0]
        count = BATCHES[scale]
        pixels, scenes = training_scenes(count, seed=1_000_000 + step, single=max(0.0, 0.3 - step / 5000))
        x0 = latents.encode(to_float(pixels), scale)
        padded = rng.random() < PADDED_SHARE
        captions = ["" if rng.random() < 0.1 else shown.caption for shown in scenes]
        if padded:
            tokens, pooled = encode(text, captions, PADDED_LENGTH)
        else:
            tokens, pooled = encode(text, captions)
        level = torch.where(
            torch.rand(count) < 0.5, torch.rand(count), torch.sigmoid(0.4 + torch.randn(count))
        )
        sigma, eps = level[:, None, None, None], torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            velocity = model(
                hidden_states=(1 - sigma) * x0 + sigma * eps,
                timestep=1000 * level,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        value = (velocity.float() - (eps - x0)).square().mean()
        return value, {f"loss_{scale}": float(value.detach())}

    with sdpa_kernel(SDPBackend.MATH):
        stage.run(loss, log_every=25)


@cache
def _parts() -> tuple[SD3Transformer2DModel, Latents, TeacherText]:
    return (
        load_averaged("denoiser", build()),
        Latents(),
        teacher_text(),
    )


@torch.no_grad()
def draw(
    captions: list[str], *, side: int = 16, steps: int = 28, guidance: float = 4.0, seed: int = 0
) -> Tensor:
    """Sample images [N, 3, 8 side, 8 side] with the averaged weights (Euler, shifted schedule)."""
    model, latents, text = _parts()
    tokens, pooled = encode(text, captions)
    none_tokens, none_pooled = encode(text, [""])
    both = torch.cat([tokens, none_tokens.expand_as(tokens)])
    both_pooled = torch.cat([pooled, none_pooled.expand_as(pooled)])

    def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=both,
                pooled_projections=both_pooled,
                return_dict=False,
            )[0]
        return found.float().chunk(2)

    x = torch.randn(len(captions), CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))
    return latents.decode(euler(velocity, x, steps=steps, guidance=guidance, shift=SHIFT))


def sheet(path: Path, *, side: int, guidance: float) -> None:
    """Save samples of 32 held-out captions at one scale, each above its rendered scene; print the
    captions.
    """
    pixels, scenes = held_out_scenes(32)
    drawn = draw([shown.caption for shown in scenes], side=side, guidance=guidance)
    real = resized(to_float(pixels), 8 * side)
    page = Image.new("RGB", (16 * 132, 4 * 132), "white")
    for number in range(32):
        for below, image in enumerate((drawn[number], real[number])):
            array = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            place = ((number % 16) * 132, (2 * (number // 16) + below) * 132)
            page.paste(Image.fromarray(array).resize((128, 128), Image.Resampling.NEAREST), place)
    page.save(path)
    print("\n".join(f"{number:2} {shown.caption}" for number, shown in enumerate(scenes)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--small-steps", type=int, default=4000)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args()
    if options.sheet:
        sheet(options.sheet, side=options.side, guidance=options.guidance)
    else:
        work_folder().mkdir(parents=True, exist_ok=True)
        train(steps=options.steps, small_steps=options.small_steps)

"""Stage V4: the video mini's denoiser (diffusers' WanTransformer3DModel, patch 1), by flow matching.

    python scripts/mini/video_denoiser.py                    # train, resuming automatically
    python scripts/mini/video_denoiser.py --sheet sheet.png  # film strips of held-out captions

The world has so few videos that the latents of all of them, at every scale of the schedule, are computed once
(mini-work/video_denoiser/cache.safetensors). Training begins with mostly the smallest scale, then mostly the
full one; every scale is always included, so that the teacher can sample at each.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path

import torch
from common import Stage, batches, euler, half_is_fast, load_averaged, work_folder
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from video_data import LATENTS, SIZES, every_video, filmstrip, pixels_of, resized
from video_text import WIDTH
from video_text import finished as finished_text
from video_vae import CHANNELS
from video_vae import finished as finished_vae

from scalewise.common.images import to_bytes
from scalewise.mini.motions import all_captions, motion_captions

SMALL_MIX, LARGE_MIX = (0.65, 0.15, 0.12, 0.08), (0.2, 0.1, 0.15, 0.55)
BATCHES = (128, 96, 40, 24)
"""Batch size by scale; small latents need larger batches to use the processor fully."""
# Stock WanPipeline pads captions to 512 tokens; one batch in 32 is padded like that.
PADDED_LENGTH, PADDED_SHARE = 512, 1 / 32
SHIFT = 3.0  # of the sampling schedule, as in Wan2.1 for 480p
ENCODED = 16


def build() -> WanTransformer3DModel:
    """Return an untrained denoiser with its output at zero."""
    torch.manual_seed(14)
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.condition_embedder.time_proj.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


@torch.no_grad()
def visibility(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return by how much an error of one unit in each channel [C] changes pixels.

    Trained latents have about the same spread in every channel, however little it adds to the video; a
    denoiser then spends its capacity on what nobody sees. Latents are scaled by these weights instead.
    """
    shown, rng = vae.decode(latents).sample, torch.Generator().manual_seed(0)
    weight = torch.ones(CHANNELS)
    for channel in range(CHANNELS):
        moved = latents.clone()
        moved[:, channel] += 0.2 * torch.randn(latents[:, channel].shape, generator=rng)
        weight[channel] = (vae.decode(moved).sample - shown).square().mean().sqrt() / 0.2
    return weight


@torch.no_grad()
def latents_of_all(*, limit: int | None = None) -> dict[str, Tensor]:
    """Return normalized latents of the training videos by scale ("latents_0", ...), and mean and std [C]."""
    path = work_folder() / "video_denoiser" / "cache.safetensors"
    if path.exists():
        return load_file(path)
    videos, vae = every_video()[:limit], finished_vae()
    found: list[list[Tensor]] = [[] for _ in SIZES]
    for start in range(0, len(videos), ENCODED):
        pixels = pixels_of(videos[start : start + ENCODED])
        for latents, (frames, side) in zip(found, SIZES, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
                latents.append(vae.encode(resized(pixels, frames, side)).latent_dist.mean.float())
        if start % (16 * ENCODED) == 0:
            print(f"{start} of {len(videos)} videos encoded", flush=True)
    full = torch.cat(found[-1])
    mean = full.mean((0, 2, 3, 4))
    weight = visibility(vae, full[:: max(1, len(full) // 12)])
    shape = (1, -1, 1, 1, 1)
    std = ((full - mean.view(shape)) * weight.view(shape)).std() / weight
    out = {"mean": mean, "std": std}
    for i, latents in enumerate(found):
        out[f"latents_{i}"] = ((torch.cat(latents) - mean.view(shape)) / std.view(shape)).half().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, path)
    return out


class Captions:
    """Embeddings of the captions of all training videos, and of the empty caption."""

    @torch.no_grad()
    def __init__(self, videos: int) -> None:
        described = [video.description for video in every_video()][:videos]
        self.text = finished_text()
        self.listed = ["", *dict.fromkeys(c for one in dict.fromkeys(described) for c in all_captions(one))]
        number = {caption: i for i, caption in enumerate(self.listed)}
        self.numbers = [[number[c] for c in all_captions(one)] for one in described]
        parts = [self.text.encode(self.listed[i : i + 256]) for i in range(0, len(self.listed), 256)]
        self.tokens = torch.cat(parts)

    def choose(self, videos: Tensor, rng: random.Random) -> list[int]:
        """Choose one caption of each video; one in ten is empty."""
        return [0 if rng.random() < 0.1 else rng.choice(self.numbers[i]) for i in videos.tolist()]

    @torch.no_grad()
    def padded(self, chosen: list[int]) -> Tensor:
        """Embed captions padded to PADDED_LENGTH tokens."""
        return self.text.encode([self.listed[i] for i in chosen], PADDED_LENGTH)


def train(steps: int, small_steps: int, *, limit: int | None = None) -> bool:
    """Train by flow matching; timesteps are half uniform, half logit-normal, 10% of captions are dropped.

    Returns whether training is complete (False: stopped before the last step).
    """
    data = latents_of_all(limit=limit)
    count = len(data["latents_0"])
    captions, model = Captions(count), build()
    torch._dynamo.config.recompile_limit = 32
    for block in model.blocks:
        block.compile(dynamic=False)
    stage = Stage("video_denoiser", model, lr=1e-3, steps=steps, ema=0.998, warmup=150, decay_from=0.7)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"video denoiser {step}")
        scale = rng.choices(range(len(SIZES)), SMALL_MIX if step < small_steps else LARGE_MIX)[0]
        size = BATCHES[scale]
        videos = batches(count, size, step, seed=14)
        x0 = data[f"latents_{scale}"][videos].float()
        chosen = captions.choose(videos, rng)
        padded = rng.random() < PADDED_SHARE
        tokens = captions.padded(chosen) if padded else captions.tokens[chosen]
        level = torch.where(torch.rand(size) < 0.5, torch.rand(size), torch.sigmoid(0.4 + torch.randn(size)))
        sigma, eps = level[:, None, None, None, None], torch.randn_like(x0)
        # Compiling for the rare padded batches would take longer than it saves.
        torch.compiler.set_stance("force_eager" if padded else "default")
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            velocity = model(
                hidden_states=(1 - sigma) * x0 + sigma * eps,
                timestep=1000 * level,
                encoder_hidden_states=tokens,
                return_dict=False,
            )[0]
        value = (velocity.float() - (eps - x0)).square().mean()
        return value, {f"loss_{scale}": float(value.detach())}

    with sdpa_kernel(SDPBackend.MATH):
        stage.run(loss, log_every=25)
    return stage.step >= stage.steps


def finished() -> WanTransformer3DModel:
    """Return the averaged denoiser."""
    model = load_averaged("video_denoiser", build())
    assert isinstance(model, WanTransformer3DModel)
    return model


@cache
def _parts() -> tuple[WanTransformer3DModel, AutoencoderKLWan, Tensor, Tensor]:
    data = latents_of_all()
    mean, std = (data[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return finished(), finished_vae(), mean, std


@torch.no_grad()
def draw(
    captions: list[str], *, scale: int = 3, steps: int = 28, guidance: float = 4.0, seed: int = 0
) -> Tensor:
    """Sample videos [N, 3, T, H, W] with the averaged weights (Euler, shifted schedule)."""
    model, vae, mean, std = _parts()
    text = finished_text()
    tokens, nothing = text.encode(captions), text.encode([""])
    both = torch.cat([tokens, nothing.expand_as(tokens)])

    def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(hidden_states=x, timestep=t, encoder_hidden_states=both, return_dict=False)[0]
        return found.float().chunk(2)

    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), CHANNELS, *LATENTS[scale], generator=rng)
    x = euler(velocity, x, steps=steps, guidance=guidance, shift=SHIFT)
    return vae.decode(x * std + mean).sample.clamp(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--small-steps", type=int, default=2000)
    parser.add_argument("--limit", type=int, help="number of videos, for a quick trial")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--scale", type=int, default=3, help="0 to 3: the smallest to the full one")
    options = parser.parse_args()
    if options.sheet:
        shown = list(motion_captions(held_out=True)[:16])
        filmstrip(to_bytes(draw(shown, scale=options.scale)), options.sheet, shown)
    elif not train(options.steps, options.small_steps, limit=options.limit):
        raise SystemExit("stopped; the same command resumes")

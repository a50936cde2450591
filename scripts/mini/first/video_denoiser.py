"""The video mini's denoiser (diffusers' WanTransformer3DModel, patch 1), by flow matching on cached latents.

python scripts/mini/first/video_denoiser.py --compile       # trains, resumes by itself
python scripts/mini/first/video_denoiser.py --sheet a.png   # film strips of held-out captions, by the average
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import Stage, batches, euler, half_is_fast, load_averaged, work_folder
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from video import FRAMES, Clip, Clips, filmstrip
from video_text import WIDTH, VideoText
from video_vae import CHANNELS, SIZES
from video_vae import build as build_vae

from scalewise.method.scales import downscale_video

SMALL_MIX, LARGE_MIX = (0.35, 0.3, 0.3, 0.05), (0.15, 0.15, 0.15, 0.55)
# WanPipeline pads to 512 tokens unless told otherwise; one batch in 32 learns that.
PADDED_LENGTH, PADDED_SHARE = 512, 1 / 32
SHIFT, BATCH = 3.0, 32


def build() -> WanTransformer3DModel:
    """Return an untrained denoiser, its output at zero."""
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
    """How much an error of one unit in each channel [C] shows in pixels: what the latents are scaled by.

    Trained latents have about the same spread in every channel, however little it adds to the video; a
    denoiser then spends its capacity on what nobody sees.
    """
    shown, rng = vae.decode(latents).sample, torch.Generator().manual_seed(0)
    weight = torch.ones(CHANNELS)
    for channel in range(CHANNELS):
        moved = latents.clone()
        moved[:, channel] += 0.2 * torch.randn(latents[:, channel].shape, generator=rng)
        weight[channel] = (vae.decode(moved).sample - shown).square().mean().sqrt() / 0.2
    return weight


def learned(clips: Clips) -> list[Clip]:
    """Every second training clip: encoding is dear, and each object stays in several motions."""
    return clips.of("train")[::2]


@torch.no_grad()
def cache() -> dict[str, Tensor]:
    """Latents of the clips at every scale, embeddings of their captions, mean and std per channel."""
    path = work_folder() / "video_denoiser" / "cache.safetensors"
    if path.exists():
        return load_file(path)
    clips, vae = Clips(), load_averaged("video_vae", build_vae())
    known, out = learned(clips), dict[str, Tensor]()
    found: dict[str, list[Tensor]] = {f"latents_{i}": [] for i in range(len(SIZES))}
    for start in range(0, len(known), 16):
        videos = torch.stack([clips.render(clip) for clip in known[start : start + 16]])
        for i, (frames, side) in enumerate(SIZES):
            x = downscale_video(videos, (frames, side, side)) if frames < FRAMES else videos
            found[f"latents_{i}"].append(vae.encode(x).latent_dist.mean)
        if start % 160 == 0:
            print(f"{start} of {len(known)} clips encoded", flush=True)
    full = torch.cat(found[f"latents_{len(SIZES) - 1}"])
    out["mean"] = full.mean((0, 2, 3, 4))
    centred = full - out["mean"][None, :, None, None, None]
    weight = visibility(vae, full[::100])
    out["std"] = (centred * weight[None, :, None, None, None]).std() / weight
    for name, parts in found.items():
        normal = (torch.cat(parts) - out["mean"].view(1, -1, 1, 1, 1)) / out["std"].view(1, -1, 1, 1, 1)
        out[name] = normal.half()
    text = load_averaged("video_text", VideoText(clips))
    captions = [*(clip.caption for clip in known), ""]
    out["tokens"] = torch.cat([text.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, path)
    return out


def train(steps: int, small_steps: int, *, compiled: bool) -> None:
    """Velocity matching at levels half uniform, half logit-normal; one caption in ten is dropped."""
    data, clips = cache(), Clips()
    captions = [*(clip.caption for clip in learned(clips)), ""]
    count = len(captions) - 1
    model, text = build(), load_averaged("video_text", VideoText(clips))
    stage = Stage("video_denoiser", model, lr=1e-3, steps=steps, ema=0.999, warmup=150, decay_from=0.7)
    fast = torch.compile(model, dynamic=False) if compiled else model

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        mix = SMALL_MIX if step < small_steps else LARGE_MIX
        scale = int(torch.multinomial(torch.tensor(mix), 1))
        chosen = batches(count, BATCH, step, seed=14)
        x0 = data[f"latents_{scale}"][chosen].float()
        told = torch.where(torch.rand(BATCH) < 0.1, count, chosen)
        level = torch.where(
            torch.rand(BATCH) < 0.5, torch.rand(BATCH), torch.sigmoid(0.4 + torch.randn(BATCH))
        )
        sigma, eps = level[:, None, None, None, None], torch.randn_like(x0)
        padded = float(torch.rand(1)) < PADDED_SHARE
        tokens = data["tokens"][told]
        if padded:
            with torch.no_grad():
                tokens = text.encode([captions[i] for i in told], PADDED_LENGTH)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            velocity = (model if padded else fast)(
                hidden_states=(1 - sigma) * x0 + sigma * eps,
                timestep=1000 * level,
                encoder_hidden_states=tokens,
                return_dict=False,
            )[0]
        value = (velocity.float() - (eps - x0)).square().mean()
        return value, {f"loss_{scale}": float(value.detach())}

    stage.run(loss)


@torch.no_grad()
def draw(
    captions: list[str], *, scale: int = 3, steps: int = 28, guidance: float = 4.0, seed: int = 0
) -> Tensor:
    """Sample videos [N, 3, F, H, W] with the averaged weights (Euler, shifted schedule)."""
    data, clips = cache(), Clips()
    model, vae = load_averaged("video_denoiser", build()), load_averaged("video_vae", build_vae())
    text = load_averaged("video_text", VideoText(clips))
    tokens, nothing = text.encode(captions), text.encode([""])
    both = torch.cat([tokens, nothing.expand_as(tokens)])

    def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(hidden_states=x, timestep=t, encoder_hidden_states=both, return_dict=False)[0]
        return found.float().chunk(2)

    shape = data[f"latents_{scale}"].shape[1:]
    x = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(seed))
    x = euler(velocity, x, steps=steps, guidance=guidance, shift=SHIFT)
    mean, std = (data[k].view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    return vae.decode(x * std + mean).sample.clamp(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--small-steps", type=int, default=3000)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--scale", type=int, default=3)
    options = parser.parse_args()
    if options.sheet:
        clips = Clips()
        wanted = [c.caption for c in (clips.of("train")[::700] + clips.of("test")[::80])]
        print(json.dumps(wanted, indent=0))
        filmstrip(draw(wanted, scale=options.scale), options.sheet)
    else:
        train(options.steps, options.small_steps, compiled=options.compile)

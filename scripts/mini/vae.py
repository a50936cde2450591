"""Stage 3: the autoencoder (diffusers' AutoencoderKL, factor 8), with a latent made for scaling.

    python scripts/mini/vae.py                # trains, resumes by itself, writes mini-work/vae16
    python scripts/mini/vae.py --measure      # PSNR of held-out scenes at 128, 96, 80 and 64 pixels
    python scripts/mini/vae.py --channels 8 --plain    # another variant, to compare

The decoder has to turn a downscaled, turned or mirrored latent into the downscaled, turned or mirrored image
(EQ-VAE, arXiv 2502.09509). A linear patch basis (principal components of 8 x 8 x 3 patches) pulls the
encoder at first, so that both halves learn from the start.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, psnr, to_float, work_folder
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from scenes import held_out_scenes, training_scenes
from torch import Tensor

CHANNELS = 16
SIZES = (128, 96, 80, 64)
"""Sides in pixels of the schedule's scales."""


def build(channels: int) -> AutoencoderKL:
    """Return an untrained autoencoder with `channels` latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def patch_basis(pixels: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Principal components of 8 x 8 x 3 patches, whitened: weight [channels, 3, 8, 8] and mean [192]."""
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    _, values, basis = torch.pca_lowrank(patches - mean, q=channels, center=True, niter=6)
    scale = values / len(patches) ** 0.5
    # A square root keeps some of the order of importance, as trained autoencoders do.
    return (basis / scale.sqrt()).T.reshape(channels, 3, 8, 8).contiguous(), mean


def resized(pixels: Tensor, side: int) -> Tensor:
    """Scale images [N, 3, H, W] down to side x side pixels by area."""
    return pixels if pixels.shape[-1] == side else F.interpolate(pixels, size=(side, side), mode="area")


def crops(pixels: Tensor, size: int) -> Tensor:
    """Images [N, 3, 128, 128] at one of the schedule's sizes, cropped on the latent's grid."""
    x = resized(pixels, random.choices(SIZES, (4, 1, 1, 2))[0])
    top, left = (8 * int(torch.randint((x.shape[-1] - size) // 8 + 1, ())) for _ in range(2))
    return x[..., top : top + size, left : left + size]


def transform(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Turn, mirror or scale down latents [N, C, h, w] and images [N, 3, 8 h, 8 w] alike."""
    if torch.rand(()) < 0.5:
        turns, mirror = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)
        z, x = torch.rot90(z, turns, (2, 3)), torch.rot90(x, turns, (2, 3))
        return (z.flip(-1), x.flip(-1)) if mirror else (z, x)
    side = int(torch.randint(z.shape[-1] // 2, z.shape[-1], ()))
    return (
        F.interpolate(z, size=(side, side), mode="bicubic", antialias=True),
        F.interpolate(x, size=(8 * side, 8 * side), mode="area"),
    )


def stage_name(channels: int, plain: bool) -> str:
    """The folder of a variant in the work folder."""
    return f"vae{channels}{'-plain' if plain else ''}"


def train(*, channels: int, plain: bool, steps: int, batch: int) -> bool:
    """Train with squared and absolute error, a pull towards the patch basis and equivariance.

    Returns whether training is complete (False: stopped before the last step).
    """
    pool = torch.as_tensor(training_scenes(6000, seed=3)[0])
    weight, mean = patch_basis(to_float(pool[:600]), channels)
    offset = (weight.flatten(1) @ mean)[None, :, None, None]
    model = build(channels)
    stage = Stage(
        stage_name(channels, plain), model, lr=2e-3, steps=steps, ema=0.998, weight_decay=0.0, decay_from=0.55
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random.seed(step)
        x = crops(to_float(pool[torch.randint(len(pool), (batch,))]), 64).contiguous()
        target = F.conv2d(x, weight, stride=8) - offset
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            posterior = model.encode(x).latent_dist
        z = posterior.mean.float() + (0.5 * posterior.logvar.float()).exp() * torch.randn_like(target)
        moved = not plain and step % 2 == 1
        if moved:
            z, x = transform(z, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            out = model.decode(z).sample.float()
        square, absolute = (out - x).square().mean(), (out - x).abs().mean()
        pull = (posterior.mean.float() - target).square().mean()
        spread = (posterior.logvar.float() + 6).square().mean()
        share = max(0.003, 0.2 * (1 - step / 800))
        name = "psnr_moved" if moved else "psnr"
        numbers = {name: float(psnr(out.detach(), x).mean()), "pull": float(pull.detach())}
        return 4 * square + 0.4 * absolute + share * pull + 1e-4 * spread, numbers

    stage.run(loss)
    return stage.step >= stage.steps


@torch.no_grad()
def balance(channels: int, *, plain: bool) -> AutoencoderKL:
    """Scale the latent's channels so that an error of one unit costs the same in pixels in each of them.

    Training leaves every channel with about the same spread, however little it adds to the image; a denoiser
    then spends its capacity on what nobody sees. The scales move into the encoder's last and the decoder's
    first convolution, so reconstructions stay what they are.
    """
    model = load_averaged(stage_name(channels, plain), build(channels))
    latents = model.encode(to_float(training_scenes(64, seed=5)[0])).latent_dist.mean
    shown, rng = model.decode(latents).sample, torch.Generator().manual_seed(0)
    weight = torch.ones(channels)
    for channel in range(channels):
        moved = latents.clone()
        moved[:, channel] += 0.2 * torch.randn(latents[:, channel].shape, generator=rng)
        weight[channel] = (model.decode(moved).sample - shown).square().mean().sqrt() / 0.2
    weight = weight / (latents * weight[None, :, None, None]).std()
    last, first = model.encoder.conv_out, model.decoder.conv_in
    last.weight[:channels] *= weight[:, None, None, None]
    last.bias[:channels] *= weight
    last.bias[channels:] += 2 * weight.log()
    first.weight /= weight[None, :, None, None]
    return model


def finished(channels: int = CHANNELS, *, plain: bool = False) -> AutoencoderKL:
    """The trained and balanced autoencoder."""
    path = work_folder() / stage_name(channels, plain) / "balanced.safetensors"
    if not path.exists():
        save_file(balance(channels, plain=plain).state_dict(), path)
    model = build(channels)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure(channels: int, *, plain: bool, count: int = 256) -> dict[str, float]:
    """PSNR in dB of held-out scenes at every size, and of decoding latents that were scaled down."""
    model, raw = finished(channels, plain=plain), to_float(held_out_scenes(count)[0])
    found = {}
    for side in SIZES:
        values = [
            psnr(model.decode(model.encode(part).latent_dist.mean).sample, part)
            for part in resized(raw, side).split(32)
        ]
        found[f"psnr_{side}"] = round(float(torch.cat(values).mean()), 2)
    values = []
    for part in raw.split(32):
        small = F.interpolate(
            model.encode(part).latent_dist.mean, size=(8, 8), mode="bicubic", antialias=True
        )
        values.append(psnr(model.decode(small).sample, resized(part, 64)))
    found["psnr_latents_scaled_to_64"] = round(float(torch.cat(values).mean()), 2)
    (work_folder() / stage_name(channels, plain) / "measured.json").write_text(
        json.dumps(found), encoding="utf-8"
    )
    return found


@torch.no_grad()
def reconstructions(path: Path, channels: int, *, plain: bool) -> None:
    """Save held-out scenes over their reconstructions."""
    from PIL import Image

    model, raw = finished(channels, plain=plain), to_float(held_out_scenes(8)[0])
    rows = [raw, model.decode(model.encode(raw).latent_dist.mean).sample]
    pixels = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
    Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--plain", action="store_true", help="without the equivariance")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(
        channels=options.channels, plain=options.plain, steps=options.steps, batch=options.batch
    ):
        raise SystemExit("stopped; the same command resumes")
    print(measure(options.channels, plain=options.plain))
    reconstructions(
        work_folder() / stage_name(options.channels, options.plain) / "reconstructions.png",
        options.channels,
        plain=options.plain,
    )

"""Stage 2: the autoencoder (diffusers' AutoencoderKL, factor 8, 16 channels), trained on 64-pixel crops.

    python scripts/mini/first/vae.py            # trains, resumes by itself, writes mini-work/vae
    python scripts/mini/first/vae.py --measure  # PSNR on held-out images at 128, 96, 80 and 64 pixels

A linear patch basis (principal components of 8 x 8 x 3 patches) already reaches 27 dB. The encoder is
pulled towards it for the first steps: both halves then learn from the start instead of first having to
agree on a code, and the latents stay close to a linear map of the picture, which upscaling likes.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from common import Stage, batches, half_is_fast, load_averaged, psnr, to_float, work_folder
from diffusers import AutoencoderKL
from pictures import load_pictures
from safetensors.torch import load_file, save_file
from torch import Tensor

LATENT_CHANNELS = 16


def build() -> AutoencoderKL:
    """Return an untrained autoencoder of the mini's size."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def patch_basis(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of 8 x 8 x 3 patches, whitened: weight [16, 3, 8, 8] and mean [3 * 64]."""
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    _, values, basis = torch.pca_lowrank(patches - mean, q=LATENT_CHANNELS, center=True, niter=6)
    scale = values / len(patches) ** 0.5
    # A square root keeps some of the order of importance, as trained autoencoders do.
    return (basis / scale.sqrt()).T.reshape(LATENT_CHANNELS, 3, 8, 8).contiguous(), mean


def crops(pixels: Tensor, size: int) -> Tensor:
    """Pictures [N, 3, 128, 128] resized (area) to one of the mini's sizes, then cropped and flipped."""
    side = int(torch.tensor([128, 128, 128, 96, 80, 64])[torch.randint(6, ())])
    x = pixels if side == 128 else F.interpolate(pixels, size=(side, side), mode="area")
    top, left = (8 * int(torch.randint((side - size) // 8 + 1, ())) for _ in range(2))
    x = x[..., top : top + size, left : left + size]
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    if torch.rand(()) < 0.25:
        x = x[:, torch.randperm(3)]
    return x


def train(steps: int, size: int, batch: int) -> None:
    """Train with squared and absolute error, a faint KL term and the pull towards the patch basis."""
    pictures = load_pictures(split="train")
    raw = torch.as_tensor(pictures.pixels)
    sample = to_float(raw[torch.randperm(len(raw), generator=torch.Generator().manual_seed(0))[:1500]])
    weight, mean = patch_basis(sample)
    offset = (weight.flatten(1) @ mean)[None, :, None, None]
    model = build()
    stage = Stage("vae", model, lr=2e-3, steps=steps, ema=0.999, clip=1.0, weight_decay=0.0, decay_from=0.6)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        x = crops(to_float(raw[batches(len(raw), batch, step)]), size)
        target = F.conv2d(x, weight, stride=8) - offset
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            posterior = model.encode(x).latent_dist
            z = posterior.sample()
            out = model.decode(z).sample.float()
        square, absolute = (out - x).square().mean(), (out - x).abs().mean()
        pull = (posterior.mean.float() - target).square().mean()
        spread = (posterior.logvar.float() + 8).square().mean()
        share = max(0.01, 0.2 * (1 - step / 1500))
        numbers = {"psnr": float(psnr(out.detach(), x).mean()), "pull": float(pull.detach())}
        return 4 * square + 0.4 * absolute + share * pull + 1e-4 * spread, numbers

    stage.run(loss)


@torch.no_grad()
def balance() -> AutoencoderKL:
    """Scale the latent's channels so that an error of one unit costs the same in pixels in each of them.

    Training leaves every channel with about the same spread, however little it adds to the picture; a
    denoiser then spends its capacity on what nobody sees. The scales move into the encoder's last and the
    decoder's first convolution, so reconstructions stay what they are.
    """
    model = load_averaged("vae", build())
    pixels = to_float(load_pictures(split="train", denoiser_only=True).pixels[::60][:40])
    latents = model.encode(pixels).latent_dist.mean
    shown, generator = model.decode(latents).sample, torch.Generator().manual_seed(0)
    weight = torch.ones(LATENT_CHANNELS)
    for channel in range(LATENT_CHANNELS):
        moved = latents.clone()
        moved[:, channel] += 0.2 * torch.randn(latents[:, channel].shape, generator=generator)
        weight[channel] = (model.decode(moved).sample - shown).square().mean().sqrt() / 0.2
    weight = weight / (latents * weight[None, :, None, None]).std()
    last, first = model.encoder.conv_out, model.decoder.conv_in
    last.weight[:LATENT_CHANNELS] *= weight[:, None, None, None]
    last.bias[:LATENT_CHANNELS] *= weight
    last.bias[LATENT_CHANNELS:] += 2 * weight.log()
    first.weight /= weight[None, :, None, None]
    save_file(model.state_dict(), work_folder() / "vae" / "balanced.safetensors")
    return model


def load_balanced() -> AutoencoderKL:
    """The finished autoencoder."""
    path = work_folder() / "vae" / "balanced.safetensors"
    if not path.exists():
        return balance()
    model = build()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure() -> dict[str, float]:
    """PSNR on held-out pictures at every size of the schedule."""
    model = load_balanced()
    pictures = load_pictures(split="test")
    raw = to_float(pictures.pixels)
    found = {}
    for side in (128, 96, 80, 64):
        x = raw if side == 128 else F.interpolate(raw, size=(side, side), mode="area")
        values = [psnr(model.decode(model.encode(c).latent_dist.mean).sample, c) for c in x.split(32)]
        found[f"psnr_{side}"] = round(float(torch.cat(values).mean()), 2)
    (work_folder() / "vae" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure:
        train(options.steps, options.size, options.batch)
    print(measure())

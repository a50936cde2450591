"""Stage V2: the video mini's autoencoder (diffusers' AutoencoderKLWan: factor 8 in space, 2 in time).

    python scripts/mini/video_vae.py --stills    # single frames first, writes mini-work/video_vae_stills
    python scripts/mini/video_vae.py             # then videos, writes mini-work/video_vae; both resume
    python scripts/mini/video_vae.py --measure   # PSNR of held-out videos at the schedule's sizes

In a single frame a causal convolution uses only its last tap, so stills train the autoencoder as one of
images, five times faster than videos do. The other taps begin at zero, those between frames at repeating a
frame, and are trained on videos. As in the image VAE, a linear patch basis pulls the encoder at first, and
the decoder has to turn a downscaled, turned or mirrored latent into the downscaled, turned or mirrored image
(EQ-VAE, arXiv 2502.09509).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, psnr, work_folder
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from vae import patch_basis, transform
from video_data import SIZES, filmstrip, pixels_of, resized, some_videos

from scalewise.common.images import to_bytes

CHANNELS = 16
CROP = 32
"""Side in pixels of what the autoencoder is trained on."""


@torch.no_grad()
def build() -> AutoencoderKLWan:
    """Return an untrained autoencoder that treats every frame by itself."""
    torch.manual_seed(10)
    model = AutoencoderKLWan(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 5],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, False, True],
        scale_factor_temporal=2,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    for name, module in model.named_modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            if name.endswith("time_conv"):
                # Every second frame is kept, and each kept one is shown twice.
                copies, width = divmod(module.out_channels, module.in_channels)
                assert width == 0
                module.weight.zero_()
                module.bias.zero_()
                module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
            else:
                module.weight[:, :, :-1] = 0
    return model


@contextmanager
def stills() -> Iterator[None]:
    """In the context, convolutions of a single frame use only their last tap, which is exact and faster."""
    whole = WanCausalConv3d.forward

    def flat(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        assert x.shape[2] == 1 and cache_x is None, "stills have one frame"
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[2])
        return out[:, :, None]

    WanCausalConv3d.forward = flat
    try:
        yield
    finally:
        WanCausalConv3d.forward = whole


def crop(video: Tensor) -> Tensor:
    """Cut a square of CROP pixels on the latent's grid from a video [3, T, H, W]: of three the most varied,
    because most of a frame is background.
    """
    places = [8 * torch.randint((video.shape[-1] - CROP) // 8 + 1, (2,)) for _ in range(3)]
    cut = [video[..., top : top + CROP, left : left + CROP] for top, left in (p.tolist() for p in places)]
    return max(cut, key=lambda one: float(one.std()))


def train(steps: int, batch: int, *, still: bool) -> bool:
    """Minimize squared and absolute error; for stills, also the pull towards the patch basis.

    Returns whether training is complete (False: stopped before the last step).
    """
    pool = pixels_of(some_videos(600, seed=10))
    weight, mean = patch_basis(pool[:100, :, ::4].transpose(1, 2).flatten(0, 1), CHANNELS)
    offset = (weight.flatten(1) @ mean)[None, :, None, None]
    model = build()
    name = "video_vae_stills" if still else "video_vae"
    if not still:
        load_averaged("video_vae_stills", model).train().requires_grad_(True)
    stage = Stage(
        name, model, lr=2e-3 if still else 7e-4, steps=steps, weight_decay=0.0, decay_from=0.5, warmup=50,
        ema=0.995,
    )  # fmt: skip

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        videos = resized(pool[torch.randint(len(pool), (batch,))], *SIZES[(3, 0, 3, 1, 3, 2)[step % 6]])
        if still:
            frame = int(torch.randint(videos.shape[2], ()))
            videos = videos[:, :, frame : frame + 1]
        x = torch.stack([crop(video) for video in videos])
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            posterior = model.encode(x).latent_dist
        center, logvar = posterior.mean.float(), posterior.logvar.float()
        z = center + (0.5 * logvar).exp() * torch.randn_like(center)
        moved = still and step % 2 == 1
        goal = x
        if moved:
            z, goal = (part[:, :, None] for part in transform(z[:, :, 0], x[:, :, 0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            out = model.decode(z).sample.float()
        square, absolute = (out - goal).square().mean(), (out - goal).abs().mean()
        value = 4 * square + 0.4 * absolute + 1e-4 * (logvar + 6).square().mean()
        error = psnr(out.detach().transpose(1, 2).flatten(0, 1), goal.transpose(1, 2).flatten(0, 1))
        numbers = {"psnr_moved" if moved else "psnr": float(error.mean())}
        if still:
            pull = (center[:, :, 0] - (F.conv2d(x[:, :, 0], weight, stride=8) - offset)).square().mean()
            value = value + max(0.003, 0.2 * (1 - step / 800)) * pull
            numbers["pull"] = float(pull.detach())
        return value, numbers

    if still:
        with stills():
            stage.run(loss)
    else:
        stage.run(loss, log_every=20)
    return stage.step >= stage.steps


def finished() -> AutoencoderKLWan:
    """Return the trained autoencoder."""
    model = load_averaged("video_vae", build())
    assert isinstance(model, AutoencoderKLWan)
    return model


@torch.no_grad()
def reconstruct(model: AutoencoderKLWan, pixels: Tensor, *, noise: float = 0.0) -> Tensor:
    """Encode and decode videos [N, 3, T, H, W], with noise relative to the latents' deviation in between."""
    found = []
    for part in pixels.split(16):
        latents = model.encode(part).latent_dist.mean
        latents = latents + noise * latents.std() * torch.randn_like(latents)
        found.append(model.decode(latents).sample.clamp(-1, 1))
    return torch.cat(found)


@torch.no_grad()
def measure(count: int = 96) -> dict[str, float]:
    """Return the PSNR in dB of held-out videos at every size of the schedule, and save some of them."""
    model, videos = finished(), some_videos(count, seed=11, held_out=True)
    pixels, found = pixels_of(videos), {}
    for frames, side in SIZES:
        x = resized(pixels, frames, side)
        out = reconstruct(model, x)
        error = psnr(out.transpose(1, 2).flatten(0, 1), x.transpose(1, 2).flatten(0, 1))
        found[f"psnr_{frames}x{side}"] = round(float(error.mean()), 2)
    rows = [row for pair in zip(to_bytes(pixels[:8]), to_bytes(out[:8]), strict=True) for row in pair]
    filmstrip(rows, work_folder() / "video_vae" / "reconstructions.png")
    (work_folder() / "video_vae" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stills", action="store_true")
    parser.add_argument("--steps", type=int, help="default: 3000 for stills, 1200 for videos")
    parser.add_argument("--batch", type=int, help="default: 24 stills, 6 videos")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure:
        steps, batch = (3000, 24) if options.stills else (1200, 6)
        if not train(options.steps or steps, options.batch or batch, still=options.stills):
            raise SystemExit("stopped; the same command resumes")
    if not options.stills:
        print(measure())

"""The video mini's autoencoder (diffusers' AutoencoderKLWan: factor 8 in space, 2 in time, 16 channels).

    python scripts/mini/first/video_vae.py --stills   # single frames first, writes mini-work/video_vae_stills
    python scripts/mini/first/video_vae.py            # then clips, writes mini-work/video_vae; both resume
    python scripts/mini/first/video_vae.py --measure  # PSNR on held-out clips at the schedule's sizes

Of a single frame a causal convolution sees its last tap alone: the stills train the autoencoder as one of
pictures, five times faster than clips do. The other taps begin at zero, those between frames at what repeats
a frame, so that clips go on from there. As the image VAE, the encoder is pulled towards a linear basis.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import Stage, batches, half_is_fast, load_averaged, psnr, work_folder
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from video import FRAMES, Clips

from scalewise.method.scales import downscale_video

CHANNELS = 16
# Pixels of the schedule's scales: frames (4 k + 1, whatever the factor), height and width.
SIZES = ((5, 24), (5, 32), (9, 40), (9, 48))


@torch.no_grad()
def build() -> AutoencoderKLWan:
    """Return an untrained autoencoder of the video mini's size that treats every frame by itself."""
    torch.manual_seed(10)
    model = AutoencoderKLWan(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 3, 6, 10],
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
                # Every second frame is kept, and each kept one shown twice.
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
    """Within it, convolutions of a single frame use their last tap alone, which is exact and faster."""
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


def basis(clips: Clips) -> tuple[Tensor, Tensor]:
    """Principal components of patches of 8 x 8 pixels: weight [16, 3, 8, 8] and offset [16]."""
    frames = torch.cat([clips.render(clip)[:, ::4].transpose(0, 1) for clip in clips.of("train")[::13]])
    patches = F.unfold(frames, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    patches = patches[patches.std(1) > 1e-3]  # white ground says nothing
    mean = patches.mean(0)
    _, values, components = torch.pca_lowrank(patches - mean, q=CHANNELS, center=True, niter=6)
    weight = (components / (values / len(patches) ** 0.5)).T
    return weight.reshape(CHANNELS, 3, 8, 8).contiguous(), weight @ mean


def piece(video: Tensor, frames: int, side: int, *, still: bool) -> Tensor:
    """A clip [3, FRAMES, SIDE, SIDE] at one of the schedule's sizes, or one frame, of 32 pixels at most."""
    x = downscale_video(video[None], (frames, side, side))[0] if frames < FRAMES else video
    if still:
        x = x[:, int(torch.randint(frames, ()))][:, None]
    size = min(32, side)
    top, left = (8 * int(torch.randint((side - size) // 8 + 1, ())) for _ in range(2))
    return x[..., top : top + size, left : left + size]


def train(steps: int, batch: int, *, still: bool) -> None:
    """Squared and absolute error, a faint KL term, for stills the pull towards the linear basis."""
    clips = Clips()
    known, (weight, offset) = clips.of("train"), basis(clips)
    name = "video_vae_stills" if still else "video_vae"
    model = build()
    if not still:
        load_averaged("video_vae_stills", model).train().requires_grad_(True)
    stage = Stage(name, model, lr=2e-3 if still else 7e-4, steps=steps, weight_decay=0.0, decay_from=0.5,
                  warmup=50, ema=0.995)  # fmt: skip

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        size = SIZES[int(torch.randint(len(SIZES), ()))]
        chosen = [clips.render(known[i]) for i in batches(len(known), batch, step, seed=10)]
        x = torch.stack([piece(video, *size, still=still) for video in chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            posterior = model.encode(x).latent_dist
            out = model.decode(posterior.sample()).sample.float()
        square, absolute = (out - x).square().mean(), (out - x).abs().mean()
        spread = (posterior.logvar.float() + 8).square().mean()
        value = 4 * square + 0.4 * absolute + 1e-4 * spread
        flat = (2, 1)
        error = psnr(out.detach().transpose(*flat).flatten(0, 1), x.transpose(*flat).flatten(0, 1))
        numbers = {"psnr": float(error.mean())}
        if still:
            target = F.conv2d(x[:, :, 0], weight, stride=8) - offset[None, :, None, None]
            pull = (posterior.mean.float()[:, :, 0] - target).square().mean()
            value = value + max(0.003, 0.2 * (1 - step / 800)) * pull
            numbers["pull"] = float(pull.detach())
        return value, numbers

    if still:
        with stills():
            stage.run(loss)
    else:
        stage.run(loss, log_every=20)


@torch.no_grad()
def measure() -> dict[str, float]:
    """PSNR in dB on held-out clips at every size of the schedule."""
    clips, model, found = Clips(), load_averaged("video_vae", build()), {}
    videos = torch.stack([clips.render(clip) for clip in clips.of("test")[::13]])
    for frames, side in SIZES:
        x = downscale_video(videos, (frames, side, side)) if frames < FRAMES else videos
        out = torch.cat([model.decode(model.encode(part).latent_dist.mean).sample for part in x.split(8)])
        error = psnr(out.transpose(2, 1).flatten(0, 1), x.transpose(2, 1).flatten(0, 1))
        found[f"psnr_{frames}x{side}"] = round(float(error.mean()), 2)
    (work_folder() / "video_vae" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stills", action="store_true")
    parser.add_argument("--steps", type=int, help="default: 3000 for stills, 400 for clips")
    parser.add_argument("--batch", type=int, help="default: 24 stills, 8 clips")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure:
        steps, batch = (3000, 24) if options.stills else (400, 8)
        train(options.steps or steps, options.batch or batch, still=options.stills)
    if not options.stills:
        print(measure())

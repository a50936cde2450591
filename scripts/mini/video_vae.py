"""The video mini's autoencoder (diffusers' AutoencoderKLWan: factor 8 in space, 4 in time, 16 channels).

    python scripts/mini/video_vae.py            # trains, resumes by itself, writes mini-work/video_vae
    python scripts/mini/video_vae.py --measure  # PSNR on held-out clips at the schedule's sizes

Trained on pieces of five frames (one latent frame for the first, one for the next four): longer videos
repeat the second step. As the image VAE, the encoder is pulled towards a linear basis at first.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from common import Stage, batches, half_is_fast, load_averaged, psnr, work_folder
from diffusers import AutoencoderKLWan
from torch import Tensor
from video import FRAMES, Clips

from scalewise.scales import downscale_video

CHANNELS, PIECE = 16, 5
# Pixels of the schedule's scales: frames, height and width.
SIZES = ((5, 32), (9, 40), (13, 48), (17, 64))


def build() -> AutoencoderKLWan:
    """Return an untrained autoencoder of the video mini's size."""
    torch.manual_seed(10)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 3, 6, 10],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def basis(clips: Clips) -> tuple[Tensor, Tensor]:
    """Principal components of blocks of 4 x 8 x 8 pixels: weight [16, 3, 4, 8, 8] and offset [16]."""
    pieces = torch.stack([clips.render(clip)[:, 1:] for clip in clips.of("train")[::13]])
    blocks = pieces.unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8)
    blocks = blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 768)
    blocks = blocks[blocks.std(1) > 1e-3]  # white ground says nothing
    mean = blocks.mean(0)
    _, values, components = torch.pca_lowrank(blocks - mean, q=CHANNELS, center=True, niter=6)
    weight = (components / (values / len(blocks) ** 0.5).sqrt()).T
    return weight.reshape(CHANNELS, 3, 4, 8, 8).contiguous(), weight @ mean


def linear_latents(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Latents [N, 16, 2, h, w] of pieces [N, 3, 5, H, W]: the first frame stands for four like it."""
    stretched = torch.cat([x[:, :, :1].expand(-1, -1, 4, -1, -1), x[:, :, 1:]], 2)
    return F.conv3d(stretched, weight, stride=(4, 8, 8)) - offset[None, :, None, None, None]


def piece(video: Tensor) -> Tensor:
    """Five frames of a clip [3, FRAMES, 64, 64] at one of the schedule's sizes, cropped to 32 pixels."""
    frames, side = SIZES[int(torch.randint(len(SIZES), ()))]
    start = int(torch.randint(FRAMES - PIECE + 1, ()))
    if frames < FRAMES:  # as many frames of the shortened video as make a piece
        x = downscale_video(video[None], (frames, side, side))[0]
        start = int(torch.randint(frames - PIECE + 1, ()))
    else:
        x = video
    top, left = (8 * int(torch.randint((side - 32) // 8 + 1, ())) for _ in range(2))
    return x[:, start : start + PIECE, top : top + 32, left : left + 32]


def train(steps: int, batch: int) -> None:
    """Squared and absolute error, a faint KL term, the pull towards the linear basis."""
    clips = Clips()
    known, (weight, offset) = clips.of("train"), basis(clips)
    model = build()
    stage = Stage("video_vae", model, lr=2e-3, steps=steps, weight_decay=0.0, decay_from=0.6, warmup=50)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.stack([piece(clips.render(known[i])) for i in batches(len(known), batch, step, seed=10)])
        target = linear_latents(x, weight, offset)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            posterior = model.encode(x).latent_dist
            out = model.decode(posterior.sample()).sample.float()
        square, absolute = (out - x).square().mean(), (out - x).abs().mean()
        pull = (posterior.mean.float() - target).square().mean()
        spread = (posterior.logvar.float() + 8).square().mean()
        share = max(0.003, 0.2 * (1 - step / 1000))
        flat = (2, 1)
        error = psnr(out.detach().transpose(*flat).flatten(0, 1), x.transpose(*flat).flatten(0, 1))
        return 4 * square + 0.4 * absolute + share * pull + 1e-4 * spread, {
            "psnr": float(error.mean()),
            "pull": float(pull.detach()),
        }

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
    (work_folder() / "video_vae" / "measured.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure:
        train(options.steps, options.batch)
    print(measure())

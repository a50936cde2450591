"""Stage V1: videos for training. The videos themselves are `scalewise.mini.videos`.

python scripts/mini/video_data.py    # save a film strip of every motion, print counts and the rendering speed
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import work_folder
from torch import Tensor

from scalewise.common.images import contact_sheet
from scalewise.method.scales import downscale_video
from scalewise.mini.motions import MOTIONS, all_descriptions, write_motion
from scalewise.mini.videos import FRAMES, SIDE, Video, layouts, random_video, render_video

SIZES = ((5, 32), (5, 40), (9, 48), (9, 64))
"""Frames and side in pixels of the schedule's scales; the VAE needs 4 k + 1 frames."""
LATENTS = ((3, 4, 4), (3, 5, 5), (5, 6, 6), (5, 8, 8))
"""The same as frames, rows and columns of latents."""


def every_video(*, held_out: bool = False) -> list[Video]:
    """Return every video of the world that is held out, or every other one, with a caption each."""
    rng = random.Random(0)
    return [
        Video(description, tracks, write_motion(description, rng))
        for description in all_descriptions()
        if description.held_out == held_out
        for tracks in layouts(description)
    ]


def some_videos(count: int, *, seed: int, held_out: bool = False) -> list[Video]:
    """Generate `count` random videos, each motion equally often on average."""
    rng = random.Random(f"some videos {seed}")
    return [random_video(rng, held_out=held_out) for _ in range(count)]


def pixels_of(videos: Sequence[Video]) -> Tensor:
    """Render videos as pixels [N, 3, 9, 64, 64] in [-1, 1]."""
    rendered = torch.from_numpy(np.stack([render_video(video) for video in videos]))
    return rendered.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def resized(pixels: Tensor, frames: int, side: int) -> Tensor:
    """Scale videos [N, 3, T, H, W] down to `frames` frames of side x side pixels."""
    same = pixels.shape[2] == frames and pixels.shape[-1] == side
    return pixels if same else downscale_video(pixels, (frames, side, side))


def restored(pixels: Tensor) -> Tensor:
    """Scale videos [N, 3, t, h, w] up to 9 frames of 64 x 64 pixels."""
    if pixels.shape[2:] == (FRAMES, SIDE, SIDE):
        return pixels
    size = (FRAMES, SIDE, SIDE)
    return torch.nn.functional.interpolate(pixels, size=size, mode="trilinear", align_corners=False)


def filmstrip(rows: Sequence[np.ndarray], path: Path, captions: Sequence[str] = ()) -> None:
    """Save uint8 videos [T, H, W, 3], one row each, below their captions."""
    frames = [frame for row in rows for frame in row]
    contact_sheet(frames, columns=len(rows[0]), gap=2, captions=captions).save(path)


if __name__ == "__main__":
    started = time.process_time()
    some = [render_video(video) for video in some_videos(2000, seed=0)]
    print(f"{len(some) / (time.process_time() - started):.0f} videos per second")
    known, held_out = every_video(), every_video(held_out=True)
    print(f"{len(known)} videos, {len(held_out)} held out")
    rng = random.Random(1)
    shown = [random_video(rng, motion=motion) for motion in MOTIONS]
    work_folder().mkdir(parents=True, exist_ok=True)
    rows = [render_video(video) for video in shown]
    filmstrip(rows, work_folder() / "videos.png", [video.caption for video in shown])

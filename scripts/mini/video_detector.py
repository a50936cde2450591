"""Stage V5: train the detector of the video mini's judge (`scalewise.mini.video_detector`).

    python scripts/mini/video_detector.py             # train, resuming automatically
    python scripts/mini/video_detector.py --measure   # errors on clean, reconstructed, noisy, blurred videos

It is trained on frames of fresh videos, of things at any place, size and angle, and of videos reconstructed
by the autoencoder at every scale; half of the first two are blurred or noised. Both commands measure its
errors and write mini-work/video_detector/detector.safetensors, which `--metric motion=FILE` reads.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, work_folder
from safetensors.torch import save_file
from torch import Tensor
from video_data import SIZES, pixels_of, resized, restored, some_videos
from video_vae import finished as finished_vae
from video_vae import reconstruct

from scalewise.common.images import to_bytes
from scalewise.metrics.motion import MotionJudge
from scalewise.mini.grammar import BACKGROUNDS
from scalewise.mini.motions import GROUNDS, MOVING
from scalewise.mini.video_detector import (
    CELLS,
    CLEAN,
    Frame,
    VideoDetector,
    center_cell,
    encode_pose,
    read_frames,
)
from scalewise.mini.videos import FRAMES, SIDE, SIZE, Pose, Track, Video, draw_thing

Content = tuple[str, tuple[tuple[str, Pose], ...]]
"""Background of a frame, and its things with their poses."""


def contents(video: Video) -> list[Content]:
    """Return the content of every frame."""
    return [
        (video.description.background, tuple((track.thing, track.poses[i]) for track in video.tracks))
        for i in range(FRAMES)
    ]


def free_frame(rng: random.Random) -> tuple[Tensor, Content]:
    """Render a frame [3, 64, 64] with up to two things at any place, size and angle, as students may draw."""
    ground, names = rng.choice(GROUNDS), rng.sample(MOVING, rng.choices((0, 1, 2), (1, 8, 3))[0])
    things = []
    for i, name in enumerate(names):
        size = rng.uniform(20, 52) if len(names) == 1 else SIZE + rng.uniform(-4, 4)
        y = rng.uniform(14, 50) if len(names) == 1 else (16, 48)[i] + rng.uniform(-3, 3)
        angle = rng.choice((0.0, rng.uniform(-30, 120)))
        things.append((name, Pose(rng.uniform(14, 50), y, size, angle)))
    frame = np.empty((SIDE, SIDE, 3), np.float32)
    frame[:] = BACKGROUNDS[ground]
    for name, pose in things:
        draw_thing(frame, name, pose)
    return torch.from_numpy(frame / 127.5 - 1).permute(2, 0, 1), (ground, tuple(things))


def disturbed(pixels: Tensor, rng: random.Random) -> Tensor:
    """Return frames [N, 3, 64, 64] of which half are blurred or noised."""
    half = len(pixels) // 2
    clean, other = pixels.split([len(pixels) - half, half])
    if rng.random() < 0.5:
        side = rng.choice((32, 40, 48))
        other = F.interpolate(F.interpolate(other, size=(side, side), mode="area"), size=SIDE, mode="bicubic")
    else:
        other = other + rng.uniform(0.02, 0.15) * torch.randn_like(other)
    return torch.cat([clean, other]).clamp(-1, 1)


@torch.no_grad()
def reconstructions(count: int) -> tuple[Tensor, list[Content]]:
    """Return frames [M, 3, 64, 64] of training videos that the autoencoder reconstructed at a random scale,
    with noise in the latents.
    """
    videos, vae, frames = some_videos(count, seed=30), finished_vae(), []
    rng = random.Random(30)
    for start in range(0, count, 8):
        size = SIZES[rng.choice((3, 3, 2, 1, 0))]
        x = resized(pixels_of(videos[start : start + 8]), *size)
        frames.append(restored(reconstruct(vae, x, noise=rng.uniform(0, 0.15))).transpose(1, 2).flatten(0, 1))
    return torch.cat(frames), [content for video in videos for content in contents(video)]


def targets(shown: list[Content]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return heat maps [N, things, 16, 16]; indices [K, 3] of centers (frame, row, column) with pose values
    [K, 5]; backgrounds [N].
    """
    heat = torch.zeros(len(shown), len(MOVING), CELLS, CELLS)
    places, poses = [], []
    for number, (_, things) in enumerate(shown):
        for name, pose in things:
            row, column = center_cell(pose)
            heat[number, MOVING.index(name), row, column] = 1
            places.append((number, row, column))
            poses.append(encode_pose(pose))
    grounds = torch.tensor([GROUNDS.index(ground) for ground, _ in shown])
    return heat, torch.tensor(places), torch.tensor(poses), grounds


def train(steps: int, batch: int, decoded: int) -> bool:
    """Minimize the focal loss of the heat maps (arXiv 1904.07850), the errors of poses at the centers, and
    the cross-entropy of the background.

    Returns whether training is complete (False: stopped before the last step).
    """
    torch.manual_seed(17)
    model, third = VideoDetector(), batch // 3
    pool, pool_contents = reconstructions(decoded)
    stage = Stage("video_detector", model, lr=2e-3, steps=steps, ema=0.995, warmup=100, decay_from=0.5)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"video detector {step}")
        videos = some_videos(third // 3, seed=31_000_000 + step)  # three frames of each
        frames, shown = [], []
        for video, pixels in zip(videos, pixels_of(videos), strict=True):
            for i in rng.sample(range(FRAMES), 3):
                frames.append(pixels[:, i])
                shown.append(contents(video)[i])
        for _ in range(third):
            frame, content = free_frame(rng)
            frames.append(frame)
            shown.append(content)
        chosen = [rng.randrange(len(pool)) for _ in range(third)]
        order = rng.sample(range(len(frames)), len(frames))
        images = torch.cat([disturbed(torch.stack([frames[i] for i in order]), rng), pool[chosen]])
        heat, places, poses, grounds = targets([shown[i] for i in order] + [pool_contents[i] for i in chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(images.contiguous(memory_format=torch.channels_last))
        share = found.things.float().sigmoid().clamp(1e-4, 1 - 1e-4)
        focal = -(heat * (1 - share) ** 2 * share.log() + (1 - heat) * share**2 * (1 - share).log())
        focal = focal.sum() / heat.sum()
        values = torch.cat([found.offsets, found.sizes, found.angles], 1).float()
        n, row, column = places.T
        pose = (values[n, :, row, column] - poses).abs().mean()
        background = F.cross_entropy(found.background.float(), grounds)
        numbers = {"focal": float(focal.detach()), "pose": float(pose.detach())}
        return focal + 5 * pose + background, numbers

    stage.run(loss, log_every=25)
    return stage.step >= stage.steps


def pose_errors(frames: list[Frame], shown: list[Content]) -> dict[str, float]:
    """Return the largest errors but for 1% of the things that are found: center, size (pixels), angle."""
    errors: dict[str, list[float]] = {"center": [], "size": [], "angle": []}
    for frame, (_, things) in zip(frames, shown, strict=True):
        true = dict(things)
        for seen in frame.found:
            if pose := true.get(seen.thing):
                errors["center"].append(float(np.hypot(seen.pose.x - pose.x, seen.pose.y - pose.y)))
                errors["size"].append(abs(seen.pose.size - pose.size))
                errors["angle"].append(abs((seen.pose.angle - pose.angle + 180) % 360 - 180))
    return {k: round(float(np.quantile(v, 0.99)), 2) if v else float("nan") for k, v in errors.items()}


def still(video: Video) -> Video:
    """Return a video in which everything stays as in the middle frame: its motion is that of no caption."""
    tracks = tuple(Track(t.thing, (t.poses[FRAMES // 2],) * FRAMES) for t in video.tracks)
    return Video(video.description, tracks, video.caption)


@torch.no_grad()
def measure(count: int) -> dict[str, float]:
    """Return how the judge scores held-out videos: true ones in several qualities, and still ones.

    CLEAN is the steadiness that 99% of the reconstructions exceed.
    """
    model = load_averaged("video_detector", VideoDetector())
    assert isinstance(model, VideoDetector)
    judge, videos = MotionJudge(model, 0.0), some_videos(count, seed=32, held_out=True)
    raw = pixels_of(videos)
    rng = torch.Generator().manual_seed(0)
    variants = {
        "renders": raw,
        "reconstructions": reconstruct(finished_vae(), raw),
        "noisy": (raw + 0.1 * torch.randn(raw.shape, generator=rng)).clamp(-1, 1),
        "blurred": restored(resized(raw, FRAMES, 32)),
        "still": pixels_of([still(video) for video in videos]),
    }
    captions, shown = [v.caption for v in videos], [c for v in videos for c in contents(v)]
    found: dict[str, float] = {}
    for name, pixels in variants.items():
        scores = judge.extract(to_bytes(pixels), captions)
        for key in ("match", "things", "motion", "fidelity", "steadiness"):
            found[f"{name}_{key}"] = round(float(scores[f"video_{key}"].mean()), 4)
        if name == "reconstructions":
            found[CLEAN] = round(float(scores["video_steadiness"].quantile(0.01)), 4)
        if name != "still":
            frames = read_frames(model, pixels.transpose(1, 2).flatten(0, 1))
            found |= {f"{name}_{k}": v for k, v in pose_errors(frames, shown).items()}
    folder = work_folder() / "video_detector"
    (folder / "measured.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    save(model, found[CLEAN], folder / "detector.safetensors")
    return found


def save(model: VideoDetector, clean: float, path: Path) -> None:
    """Write a detector in float16 with the threshold of clean videos."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={CLEAN: str(clean)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--decoded", type=int, default=320, help="number of reconstructed videos")
    parser.add_argument("--count", type=int, default=400, help="number of videos to measure on")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(options.steps, options.batch, options.decoded):
        raise SystemExit("stopped; the same command resumes")
    print(json.dumps(measure(options.count), indent=1))

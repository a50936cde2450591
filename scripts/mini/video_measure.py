"""Stage V7: measure the video mini and its students on held-out captions.

    python scripts/mini/video_measure.py teacher undistilled "both=student:runs/both"

Renders of the same captions and their reconstructions by the VAE are the ceiling. Writes figures.md,
figures.json, timings.json, animated images and a film strip of every sampler to --out: look at them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import work_folder
from video_data import filmstrip

from scalewise.common import console
from scalewise.common.images import read_image, save_image, to_bytes
from scalewise.config.presets import find_recipe
from scalewise.evaluation.compare import compare, file_name
from scalewise.evaluation.scoring import ScoringOptions
from scalewise.metrics.clip import from_bytes
from scalewise.mini.motions import motion_captions
from scalewise.mini.videos import FRAMES, render_videos
from scalewise.training import setup

CHUNK = 16


@torch.no_grad()
def write_ceiling(recipe_file: str, captions: list[str], out: Path) -> list[str]:
    """Write renders of the captions and their reconstructions; returns them as samplers."""
    model = setup.load(find_recipe(recipe_file), ("vae",))
    renders = render_videos(captions, seed=1)
    decoded = []
    for start in range(0, len(renders), CHUNK):
        part = renders[start : start + CHUNK]
        pixels = (
            from_bytes(part.reshape(-1, *part.shape[2:])).unflatten(0, (len(part), FRAMES)).transpose(1, 2)
        )
        decoded.append(to_bytes(model.decode(model.encode(pixels))))
    found = []
    for name, videos in (("renders", renders), ("reconstructions", np.concatenate(decoded))):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, video in enumerate(videos):
            save_image(video, folder / f"{i}.png")
        found.append(f"{name}=folder:{folder}")
    return found


def main(
    samplers: list[str], recipe_file: str, *, count: int, out: Path, detector: Path, speed: bool
) -> None:
    """Sample, judge and time."""
    console.quiet_libraries()
    recipe, captions = find_recipe(recipe_file), list(motion_captions(held_out=True)[:count])
    outcome = compare(
        recipe,
        [*samplers, *write_ceiling(recipe_file, captions, out / "ceiling")],
        captions,
        console.progress,
        out=out,
        speed=speed,
        scoring=ScoringOptions(metrics=(f"motion={detector}",)),
    )
    for row in outcome.rows:
        folder = out / "pictures" / file_name(row.name)
        videos = [read_image(folder / f"{i}.png") for i in range(min(count, 16))]
        filmstrip(videos, out / f"{file_name(row.name)}.png", captions)
    print(outcome.markdown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samplers", nargs="+")
    parser.add_argument("--recipe", default=str(Path(__file__).parent / "video.yaml"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--out", type=Path, default=work_folder() / "video_measured")
    parser.add_argument(
        "--detector", type=Path, default=work_folder() / "video_detector" / "detector.safetensors"
    )
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    options = parser.parse_args()
    main(
        options.samplers, options.recipe, count=options.count, out=options.out, detector=options.detector,
        speed=options.speed,
    )  # fmt: skip

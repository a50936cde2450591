"""Stage 6: train the detector of the judge (`scalewise.mini.detector`) and measure its errors.

    python scripts/mini/detector.py             # train, resuming automatically
    python scripts/mini/detector.py --measure   # its errors on clean, decoded, disturbed scenes

It is trained on fresh renders of all combinations: clean, blurred, noised, and reconstructed by the
autoencoder at every scale.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, psnr, to_float, work_folder
from scenes import all_scenes, held_out_scenes
from torch import Tensor, nn
from vae import SIZES, finished, resized

from scalewise.metrics.scene import fidelity
from scalewise.mini import detector
from scalewise.mini.detector import CELLS, Detector, Reading, center_cell, read_images
from scalewise.mini.grammar import STYLES, THINGS
from scalewise.mini.scenes import Scene


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return heat maps [N, things, 32, 32]; sizes and colors [N, 32, 32], -1 except at centers; style and
    background [N].
    """
    heat = torch.zeros(len(scenes), len(THINGS), CELLS, CELLS)
    sizes = torch.full((len(scenes), CELLS, CELLS), -1)
    colors = sizes.clone()
    for number, shown in enumerate(scenes):
        for item in shown.items:
            row, column = center_cell(item)
            heat[number, THINGS.index(item.thing), row, column] = 1
            sizes[number, row, column] = detector.SIZES.index(item.size)
            colors[number, row, column] = detector.COLORS.index(item.color)
    style = torch.tensor([STYLES.index(shown.description.style) for shown in scenes])
    ground = torch.tensor([detector.GROUNDS.index(shown.description.background) for shown in scenes])
    return heat, sizes, colors, style, ground


def disturbed(pixels: Tensor, rng: random.Random, vae: nn.Module) -> Tensor:
    """Return images [N, 3, 128, 128] of which a third each is clean, reconstructed, and blurred or noised."""
    third = len(pixels) // 3
    clean, decoded, other = pixels.split([len(pixels) - 2 * third, third, third])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
        x = resized(decoded, rng.choice((128, 128, *SIZES)))
        latents = vae.encode(x).latent_dist.mean
        x = vae.decode(latents + rng.uniform(0, 0.12) * torch.randn_like(latents)).sample.float()
    decoded = F.interpolate(x, size=(128, 128), mode="bicubic") if x.shape[-1] != 128 else x
    if rng.random() < 0.5:
        other = F.interpolate(resized(other, rng.choice(SIZES[1:])), size=(128, 128), mode="bicubic")
    else:
        other = other + rng.uniform(0.02, 0.15) * torch.randn_like(other)
    return torch.cat([clean, decoded, other]).clamp(-1, 1)


def train(steps: int, batch: int) -> bool:
    """Minimize the focal loss of the heat maps (arXiv 1904.07850) and the cross-entropy of the other outputs.

    Returns whether training is complete (False: stopped before the last step).
    """
    torch.manual_seed(7)
    model, vae = Detector(), finished()
    stage = Stage("detector", model, lr=2e-3, steps=steps, ema=0.995, warmup=100, decay_from=0.5)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"detector {step}")
        pixels, scenes = all_scenes(batch, seed=step)
        heat, sizes, colors, style, ground = targets(scenes)
        images = disturbed(to_float(pixels), rng, vae)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(images.contiguous(memory_format=torch.channels_last))
        share = found.things.float().sigmoid().clamp(1e-4, 1 - 1e-4)
        focal = -(heat * (1 - share) ** 2 * share.log() + (1 - heat) * share**2 * (1 - share).log())
        value = focal.sum() / heat.sum()
        value = value + F.cross_entropy(found.sizes.float(), sizes, ignore_index=-1)
        value = value + F.cross_entropy(found.colors.float(), colors, ignore_index=-1)
        value = value + F.cross_entropy(found.style.float(), style)
        value = value + F.cross_entropy(found.background.float(), ground)
        return value, {"focal": float((focal.sum() / heat.sum()).detach())}

    stage.run(loss, log_every=25)
    return stage.step >= stage.steps


def is_exact(reading: Reading, shown: Scene) -> bool:
    """Return whether everything is read as it is: style, background, and every item at its place."""
    items = sorted((one.item for one in reading.found), key=str)
    same = (reading.style, reading.background) == (shown.description.style, shown.description.background)
    return same and items == sorted(shown.items, key=str)


def fidelities(model: Detector, pixels: Tensor) -> Tensor:
    """Return the fidelity [M] of all things detected in images [N, 3, 128, 128]."""
    readings, _ = read_images(model, pixels)
    return torch.tensor(
        [
            fidelity(pixels[i], one.item, reading)
            for i, reading in enumerate(readings)
            for one in reading.found
        ]
    )


@torch.no_grad()
def measure(count: int = 2000) -> dict[str, float]:
    """Return the share of held-out scenes read without any error: clean, reconstructed, noised, blurred.

    "clean" is the fidelity that 99% of the things in reconstructions exceed.
    """
    model, vae = load_averaged("detector", Detector()), finished()
    pixels, scenes = held_out_scenes(count, seed=1)
    raw = to_float(pixels)
    decoded = torch.cat(
        [vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1) for p in raw.split(64)]
    )
    rng = torch.Generator().manual_seed(0)
    noisy = raw + 0.1 * torch.randn(raw.shape, generator=rng)
    blurred = F.interpolate(resized(raw, 64), size=(128, 128), mode="bicubic").clamp(-1, 1)
    found = {"psnr_decoded": round(float(psnr(decoded, raw).mean()), 2)}
    for name, images in {"clean": raw, "decoded": decoded, "noisy": noisy, "blurred": blurred}.items():
        right = [is_exact(a, b) for a, b in zip(read_images(model, images)[0], scenes, strict=True)]
        found[f"exact_{name}"] = round(sum(right) / count, 4)
    found["clean"] = round(float(fidelities(model, decoded).quantile(0.01)), 4)
    (work_folder() / "detector" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2900)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(options.steps, options.batch):
        raise SystemExit("stopped; the same command resumes")
    print(measure())

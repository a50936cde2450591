"""World, stage 6: the judge, a detector that reads a scene: things, places, sizes, colors, style, background.

    python scripts/mini/world_detector.py             # trains, resumes by itself
    python scripts/mini/world_detector.py --measure   # its own errors on clean, decoded and disturbed scenes

A convolutional network gives heat maps over 32 x 32 cells, one a thing, with size and color at each cell, and
style and background of the image. It learns from fresh renders: clean, blurred, noised, passed through the
autoencoder at every scale. Its errors are measured exactly, since the truth of every render is known.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
import torch.nn.functional as F
from common import Stage, half_is_fast, load_averaged, psnr, to_float, work_folder
from torch import Tensor, nn
from world_scenes import (
    BACKGROUNDS,
    INKS,
    LARGE,
    SMALL,
    STYLES,
    Item,
    Scene,
    held_out_scenes,
    training_scenes,
)
from world_things import THINGS
from world_vae import SIZES, finished, resized

NAMES, COLORS, GROUNDS = tuple(THINGS), (None, *INKS), tuple(BACKGROUNDS)
SIZE_NAMES = (LARGE, SMALL)
STRIDE, CELLS = 4, 32


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Detector(nn.Module):
    """Images [N, 3, 128, 128] in [-1, 1] to logits: things, sizes and colors by cell; style, background."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 8, stride=STRIDE, padding=2), Block(48), Block(48))
        self.down = nn.Sequential(nn.Conv2d(48, 96, 4, stride=2, padding=1), Block(96), Block(96))
        self.low = nn.Sequential(nn.Conv2d(96, 128, 4, stride=2, padding=1), Block(128), Block(128))
        self.up_1 = nn.Conv2d(128, 96, 1)
        self.up_2 = nn.Conv2d(96, 64, 1)
        self.skip_1 = nn.Conv2d(48, 64, 1)
        self.last = Block(64)
        self.cells = nn.Conv2d(64, len(NAMES) + len(SIZE_NAMES) + len(COLORS), 1)
        nn.init.constant_(self.cells.bias, -4.0)  # hardly any cell is a center
        self.image = nn.Linear(128, len(STYLES) + len(GROUNDS))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 32 x 32, 16 x 16 and 8 x 8 cells."""
        fine = self.stem(x)
        middle = self.down(fine)
        return fine, middle, self.low(middle)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        fine, middle, low = self.features(x)
        joined = middle + F.interpolate(self.up_1(low), scale_factor=2.0)
        joined = self.skip_1(fine) + F.interpolate(self.up_2(joined), scale_factor=2.0)
        cells = self.cells(self.last(joined)).split((len(NAMES), len(SIZE_NAMES), len(COLORS)), dim=1)
        image = self.image(low.mean((2, 3))).split((len(STYLES), len(GROUNDS)), dim=1)
        return (*cells, *image)


def center(item: Item) -> tuple[int, int]:
    """The cell (row, column) of a thing's center; exact, since places lie on a grid."""
    return (item.y + item.size // 2) // STRIDE, (item.x + item.size // 2) // STRIDE


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Heat maps [N, things, 32, 32]; sizes and colors [N, 32, 32], -1 where no center is; style, ground."""
    heat = torch.zeros(len(scenes), len(NAMES), CELLS, CELLS)
    sizes = torch.full((len(scenes), CELLS, CELLS), -1)
    colors = sizes.clone()
    for number, shown in enumerate(scenes):
        for item in shown.items:
            row, column = center(item)
            heat[number, NAMES.index(item.thing), row, column] = 1
            sizes[number, row, column] = SIZE_NAMES.index(item.size)
            colors[number, row, column] = COLORS.index(item.color)
    style = torch.tensor([STYLES.index(shown.style) for shown in scenes])
    ground = torch.tensor([GROUNDS.index(shown.background) for shown in scenes])
    return heat, sizes, colors, style, ground


def disturbed(pixels: Tensor, rng: random.Random, vae: nn.Module) -> Tensor:
    """Images as they are, decoded from latents (at any scale), blurred or noised."""
    kind = rng.choices(("clean", "decoded", "small", "noisy"), (3, 4, 2, 1))[0]
    if kind == "clean":
        return pixels
    if kind == "noisy":
        return pixels + rng.uniform(0.02, 0.15) * torch.randn_like(pixels)
    x = resized(pixels, 128 if kind == "decoded" else rng.choice(SIZES[1:]))
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist.mean
        posterior = posterior + rng.uniform(0, 0.12) * torch.randn_like(posterior)
        x = vae.decode(posterior).sample.clamp(-1, 1)
    return F.interpolate(x, size=(128, 128), mode="bicubic") if x.shape[-1] != 128 else x


def train(steps: int, batch: int) -> bool:
    """Focal loss of the heat maps (Zhou et al., arXiv 1904.07850), cross-entropy of the rest.

    Returns whether training is complete (False: stopped before the last step).
    """
    model, vae = Detector(), finished()
    stage = Stage("world-detector", model, lr=2e-3, steps=steps, ema=0.995, warmup=100, decay_from=0.5)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"detector {step}")
        pixels, scenes = training_scenes(batch, seed=9_000_000 + step)
        heat, sizes, colors, style, ground = targets(scenes)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(disturbed(to_float(pixels), rng, vae))
        things, size, color, styles, grounds = (part.float() for part in found)
        share = things.sigmoid().clamp(1e-4, 1 - 1e-4)
        focal = -(heat * (1 - share) ** 2 * share.log() + (1 - heat) * share**2 * (1 - share).log())
        value = focal.sum() / heat.sum()
        value = value + F.cross_entropy(size, sizes, ignore_index=-1)
        value = value + F.cross_entropy(color, colors, ignore_index=-1)
        value = value + F.cross_entropy(styles, style) + F.cross_entropy(grounds, ground)
        return value, {"focal": float((focal.sum() / heat.sum()).detach())}

    stage.run(loss, log_every=25)
    return stage.step >= stage.steps


@torch.no_grad()
def read(model: Detector, pixels: Tensor, *, threshold: float = 0.4) -> list[tuple]:
    """Read images [N, 3, 128, 128]: a (style, background, sorted items) for each, items as in a Scene."""
    found = []
    for part in pixels.split(64):
        things, size, color, style, ground = model(part)
        share = things.sigmoid()
        # Suppress within 20 pixels, whatever the thing: two centers are never closer than 48.
        best = share.amax(1, keepdim=True)
        peak = (best == F.max_pool2d(best, 11, stride=1, padding=5)) & (best > threshold)
        for number in range(len(part)):
            items = []
            for row, column in peak[number, 0].nonzero().tolist():
                side = SIZE_NAMES[int(size[number, :, row, column].argmax())]
                ink = COLORS[int(color[number, :, row, column].argmax())]
                thing = NAMES[int(share[number, :, row, column].argmax())]
                items.append((thing, ink, STRIDE * column - side // 2, STRIDE * row - side // 2, side))
            names = (STYLES[int(style[number].argmax())], GROUNDS[int(ground[number].argmax())])
            found.append((*names, sorted(items, key=str)))
    return found


def truth(shown: Scene) -> tuple:
    """What `read` should give for a scene."""
    items = [(i.thing, i.color, i.x, i.y, i.size) for i in shown.items]
    return (shown.style, shown.background, sorted(items, key=str))


@torch.no_grad()
def measure(count: int = 2000) -> dict[str, float]:
    """Share of held-out scenes read without any error: clean, decoded from latents, disturbed."""
    model, vae = load_averaged("world-detector", Detector()), finished()
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
        right = [a == truth(b) for a, b in zip(read(model, images), scenes, strict=True)]
        found[f"exact_{name}"] = round(sum(right) / count, 4)
    (work_folder() / "world-detector" / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure and not train(options.steps, options.batch):
        raise SystemExit("stopped; the same command resumes")
    print(measure())

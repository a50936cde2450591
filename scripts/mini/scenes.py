"""Stage 2: batches of scenes for training. The scenes themselves are `scalewise.mini.scenes`.

python scripts/mini/scenes.py          # save a contact sheet, print the rendering speed
"""

from __future__ import annotations

import random
import time

import numpy as np
from common import work_folder
from PIL import Image

from scalewise.mini.scenes import Scene, random_scene, render


def training_scene(rng: random.Random, *, single: float = 0.0) -> Scene:
    """Generate a scene that is not held out; at least a fraction `single` of scenes has only one thing."""
    alone = rng.random() < single
    while True:
        found = random_scene(rng)
        if not alone or len(found.items) == 1:
            return found


def training_scenes(count: int, *, seed: int, single: float = 0.0) -> tuple[np.ndarray, list[Scene]]:
    """Render `count` training scenes: uint8 images [count, 128, 128, 3] and their scenes."""
    rng = random.Random(seed)
    scenes = [training_scene(rng, single=single) for _ in range(count)]
    return np.stack([render(shown) for shown in scenes]), scenes


def all_scenes(count: int, *, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Render `count` scenes of any combination, for models that judge and do not generate."""
    rng = random.Random(f"all {seed}")
    scenes = [random_scene(rng, held_out=rng.random() < 0.2) for _ in range(count)]
    return np.stack([render(shown) for shown in scenes]), scenes


def held_out_scenes(count: int, *, seed: int = 0) -> tuple[np.ndarray, list[Scene]]:
    """Render `count` scenes of held-out combinations: uint8 [count, 128, 128, 3] and their scenes."""
    rng = random.Random(f"held out {seed}")
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return np.stack([render(shown) for shown in scenes]), scenes


if __name__ == "__main__":
    started = time.time()
    pixels, scenes = training_scenes(1000, seed=0)
    print(f"{len(pixels) / (time.time() - started):.0f} scenes per second")
    page = Image.new("RGB", (8 * 130, 4 * 130), "white")
    for number in range(32):
        page.paste(Image.fromarray(pixels[number]), ((number % 8) * 130, (number // 8) * 130))
        print(scenes[number].description.task, "|", scenes[number].caption)
    page.save(work_folder() / "scenes.png")

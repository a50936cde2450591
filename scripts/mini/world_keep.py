"""Store finished stages of the world in the repository in half precision, or restore them.

    python scripts/mini/world_keep.py              # write scripts/mini/kept/*.safetensors
    python scripts/mini/world_keep.py --restore    # write missing stages to the work folder

Restored stages can be used by later stages, but their training cannot be resumed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from common import work_folder
from safetensors.torch import load_file, save_file

KEPT = Path(__file__).parent / "kept"
FILES = {"world-vae16": "balanced.safetensors", "world-text": "state.safetensors"}
"""File of each stage that later stages load."""
TOKENIZER = Path("tokenizers") / "world-clip"
"""Stored with the text encoders, because training it again may assign other token ids."""


def keep() -> None:
    """Write the averaged weights of every finished stage as float16."""
    KEPT.mkdir(exist_ok=True)
    for stage, file in FILES.items():
        tensors = load_file(work_folder() / stage / file)
        if file == "state.safetensors":  # leave out the optimizer and weights that have an average
            averaged = {key[4:] for key in tensors if key.startswith("ema/")}
            tensors = {
                key: value
                for key, value in tensors.items()
                if key.startswith("ema/") or (key.startswith("module/") and key[7:] not in averaged)
            }
        halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(halves, KEPT / f"{stage}.safetensors")
        print(f"{stage}: {sum(v.numel() for v in halves.values()):,} values")
    shutil.copytree(work_folder() / TOKENIZER, KEPT / TOKENIZER.name, dirs_exist_ok=True)


def restore() -> None:
    """Restore every stored stage that is missing in the work folder, in float32."""
    for stage, file in FILES.items():
        place = work_folder() / stage / file
        if place.exists():
            print(f"{place} already exists")
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        tensors = load_file(KEPT / f"{stage}.safetensors")
        save_file({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, place)
        print(f"restored {place}")
    if not (work_folder() / TOKENIZER).exists():
        shutil.copytree(KEPT / TOKENIZER.name, work_folder() / TOKENIZER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restore", action="store_true")
    restore() if parser.parse_args().restore else keep()

"""Store trained stages in the repository in few bits, or restore them.

    python scripts/mini/keep.py              # write scripts/mini/kept/*.safetensors
    python scripts/mini/keep.py --restore    # write missing stages to the work folder

Finished stages are stored as float16. The denoiser, which is still being trained, is stored in 8 bits with a
scale per row; its training continues from these averaged weights with a new optimizer state.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from common import work_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = Path(__file__).parent / "kept"
FILES = {
    "vae16": "balanced.safetensors",
    "text": "state.safetensors",
    "denoiser": "state.safetensors",
}
"""File of each stage that later stages load."""
EIGHT_BITS = ("denoiser",)
MEASURED = ("vae16", "text", "detector")
"""Stages whose measured.json is stored, for the card. The detector itself is in the package."""
TOKENIZER = Path("tokenizers") / "clip"
"""Stored with the text encoders, because training it again may assign other token ids."""


def to_bits(tensors: dict[str, Tensor], *, eight: bool) -> dict[str, Tensor]:
    """Convert floating-point tensors to float16, or matrices [rows, ...] to int8 with a scale per row."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if eight and value.is_floating_point() and value.ndim > 1:
            rows = value.flatten(1)
            scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            found[f"int8/{key}"] = (rows / scale).round().to(torch.int8).reshape(value.shape)
            found[f"scale/{key}"] = scale[:, 0].float()
        else:
            found[key] = value.half() if value.is_floating_point() else value
    return found


def from_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_bits` up to rounding; everything that was a float becomes float32."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith("int8/"):
            scale = tensors[f"scale/{key[5:]}"]
            found[key[5:]] = value.float() * scale.reshape(-1, *[1] * (value.ndim - 1))
        elif not key.startswith("scale/"):
            found[key] = value.float() if value.is_floating_point() else value
    return found


def keep() -> None:
    """Write the averaged weights of every stage in the work folder."""
    KEPT.mkdir(exist_ok=True)
    for stage, file in FILES.items():
        path = work_folder() / stage / file
        if not path.exists():
            print(f"{path} does not exist")
            continue
        with safe_open(path, "pt") as opened:
            head = {
                k: v for k, v in (opened.metadata() or {}).items() if k in ("step", "ema_steps", "seconds")
            }
        tensors = load_file(path)
        if file == "state.safetensors":  # leave out the optimizer and weights that have an average
            averaged = {key[4:] for key in tensors if key.startswith("ema/")}
            tensors = {
                key: value
                for key, value in tensors.items()
                if key.startswith("ema/") or (key.startswith("module/") and key[7:] not in averaged)
            }
        few = to_bits(tensors, eight=stage in EIGHT_BITS)
        save_file(few, KEPT / f"{stage}.safetensors", metadata=head)
        print(f"{stage}: {sum(v.numel() for v in few.values()):,} values, {head}")
    for stage in MEASURED:
        if (path := work_folder() / stage / "measured.json").exists():
            shutil.copy(path, KEPT / f"{stage}.json")
    shutil.copytree(work_folder() / TOKENIZER, KEPT / TOKENIZER.name, dirs_exist_ok=True)


def restore() -> None:
    """Restore every stored stage that is missing in the work folder, in float32."""
    for stage, file in FILES.items():
        place, kept = work_folder() / stage / file, KEPT / f"{stage}.safetensors"
        if place.exists() or not kept.exists():
            print(f"{place} already exists" if place.exists() else f"{kept} does not exist")
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with safe_open(kept, "pt") as opened:
            head = opened.metadata()
        tensors = from_bits(load_file(kept))
        if stage in EIGHT_BITS:  # training continues: live weights start from the average
            tensors |= {f"module/{k[4:]}": v.clone() for k, v in tensors.items() if k.startswith("ema/")}
        save_file(tensors, place, metadata=head)
        print(f"restored {place}")
    for stage in MEASURED:
        path, stored = work_folder() / stage / "measured.json", KEPT / f"{stage}.json"
        if stored.exists() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(stored, path)
    if not (work_folder() / TOKENIZER).exists():
        shutil.copytree(KEPT / TOKENIZER.name, work_folder() / TOKENIZER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restore", action="store_true")
    restore() if parser.parse_args().restore else keep()

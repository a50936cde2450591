"""The embedded teacher: where its parts lie in the package. scripts/mini made them, see MODEL_CARD.md."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
TEACHER = FOLDER / "teacher"
"""StableDiffusion3Pipeline in diffusers' folder layout."""
SCORER = FOLDER / "scorer"
"""The CLIPModel that judges: CLIP score, prompt match, features of the Frechet distance."""
DATA = FOLDER / "data"
"""The synthetic set made by the teacher."""
STUDENT = FOLDER / "student.safetensors"
"""A student distilled from that set with the full loss."""
REFERENCE = FOLDER / "reference.safetensors"
"""Scorer features of real pictures: those held out, and those trained on."""
CAPTIONS = FOLDER / "captions.json"


def captions(split: str) -> list[str]:
    """Captions of the pictures that the mini was trained on ("train") or never saw ("test")."""
    return list(json.loads(CAPTIONS.read_text(encoding="utf-8"))[split])


def resolve(name: str, part: Path) -> str:
    """Turn the word "mini" of a recipe into the folder of the mini's part; other names stay."""
    return str(part) if name == "mini" else name


@cache
def fingerprint(*parts: Path) -> str:
    """Names the version of some parts, by default of what decides what is trained on it and drawn by it."""
    folders = parts or (TEACHER, DATA)
    files = [f for part in folders for f in (part.rglob("*") if part.is_dir() else [part]) if f.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(str(path.relative_to(FOLDER)).encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

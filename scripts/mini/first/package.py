"""Stage 5: put the trained parts into the package, in diffusers' folder layout and half precision.

    python scripts/mini/first/package.py

Writes teacher/, scorer/, captions.json and reference.safetensors in src/scalewise/mini.

What lands there is what `StableDiffusion3Pipeline.from_pretrained` of stock diffusers loads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import load_averaged, to_float, work_folder
from denoiser import SHIFT, cache
from denoiser import build as build_denoiser
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pictures import load_pictures
from safetensors.torch import load_file, save_file
from text import Scorer, TeacherText, embed
from vae import load_balanced

from scalewise.metrics import ClipScorer
from scalewise.metrics.spectral import power_levels

TARGET = Path(__file__).parents[3] / "src" / "scalewise" / "mini"


def teacher() -> StableDiffusion3Pipeline:
    """Assemble the pipeline from the stages' averaged weights."""
    everything, data = load_pictures().captions, cache()
    text = load_averaged("towers", TeacherText(everything))
    trained = load_balanced()
    vae = AutoencoderKL.from_config(
        {**trained.config, "scaling_factor": float(data["factor"]), "shift_factor": float(data["shift"])}
    )
    vae.load_state_dict(trained.state_dict())
    return StableDiffusion3Pipeline(
        transformer=load_averaged("denoiser", build_denoiser()),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=text.text_1,
        text_encoder_2=text.text_2,
        text_encoder_3=text.text_3,
        tokenizer=text.clip_tokenizer,
        tokenizer_2=text.clip_tokenizer,
        tokenizer_3=text.t5_tokenizer,
    )


@torch.no_grad()
def reference(scorer: Scorer) -> dict[str, torch.Tensor]:
    """Normalised scorer features of the denoiser's real pictures, and their power levels, by split."""
    out = {}
    for split in ("test", "train"):
        pixels = to_float(load_pictures(split=split, denoiser_only=True).pixels)
        features = torch.cat([embed(scorer, part) for part in pixels.split(64)])
        out[split] = torch.nn.functional.normalize(features, dim=-1).contiguous()
    return out | spectra()


def spectra() -> dict[str, torch.Tensor]:
    """Power levels of the denoiser's real pictures, by split."""
    out = {}
    for split in ("test", "train"):
        pixels = load_pictures(split=split, denoiser_only=True).pixels
        parts = [power_levels(pixels[i : i + 64]) for i in range(0, len(pixels), 64)]
        out[f"{split}_spectrum"] = torch.cat(parts).float()
    return out


def main() -> None:
    """Write everything but the synthetic set and the student, which the project's own commands make."""
    shutil.rmtree(TARGET / "teacher", ignore_errors=True)
    pipeline = teacher()
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(TARGET / "teacher", safe_serialization=True)
    for config in TARGET.glob("teacher/text_encoder*/config.json"):
        # transformers loads in the precision that the file names, diffusers in float32: they have to agree.
        values = {
            k: v for k, v in json.loads(config.read_text(encoding="utf-8")).items() if k != "torch_dtype"
        }
        config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    if (work_folder() / "scorer" / "state.safetensors").exists():
        shutil.rmtree(TARGET / "scorer", ignore_errors=True)  # without a state the shipped one stays
        scorer = load_averaged("scorer", Scorer(load_pictures().captions))
        save_file(reference(scorer), TARGET / "reference.safetensors")
        ClipScorer(scorer.clip, scorer.clip_tokenizer).save(TARGET / "scorer")
    else:
        shipped = load_file(TARGET / "reference.safetensors")
        save_file(shipped | spectra(), TARGET / "reference.safetensors")
    captions = {s: load_pictures(split=s, denoiser_only=True).captions for s in ("train", "test")}
    (TARGET / "captions.json").write_text(
        json.dumps(captions, indent=0, ensure_ascii=False), encoding="utf-8"
    )
    for file in sorted(TARGET.rglob("*")):
        if file.is_file() and file.stat().st_size > 100_000:
            print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(TARGET)}")


if __name__ == "__main__":
    main()

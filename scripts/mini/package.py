"""Stage 8: put the trained parts into the package, in diffusers' folder layout.

    python scripts/mini/package.py

Writes teacher/, scorer/ and detector.safetensors in src/scalewise/mini. Stock diffusers loads the teacher
with `StableDiffusion3Pipeline.from_pretrained`. The matrices of the denoiser and of the text encoders are
stored in float8 (e4m3), everything else in float16; diffusers converts them to float32 when loading.
"""

from __future__ import annotations

import json
import shutil

import torch
from common import load_averaged, work_folder
from denoiser import SHIFT, Latents, teacher_text
from denoiser import build as build_denoiser
from detector import Detector
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from scorer import finished as finished_scorer
from text import clip_tokenizer, t5_tokenizer

from scalewise import mini

SMALL = torch.float8_e4m3fn


def teacher() -> StableDiffusion3Pipeline:
    """Assemble the pipeline from the averaged weights of the stages."""
    text, latents = teacher_text(), Latents()
    config = {**latents.vae.config, "scaling_factor": latents.factor, "shift_factor": latents.shift}
    vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(latents.vae.state_dict())
    return StableDiffusion3Pipeline(
        transformer=load_averaged("denoiser", build_denoiser()),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=text.text_1,
        text_encoder_2=text.text_2,
        text_encoder_3=text.text_3,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


def write_teacher() -> None:
    """Write the folder of the teacher."""
    target = mini.TEACHER
    shutil.rmtree(target, ignore_errors=True)
    pipeline = teacher()
    small = {
        path: module.state_dict()
        for path, module in (
            ("transformer/diffusion_pytorch_model.safetensors", pipeline.transformer),
            ("text_encoder/model.safetensors", pipeline.text_encoder),
            ("text_encoder_2/model.safetensors", pipeline.text_encoder_2),
            ("text_encoder_3/model.safetensors", pipeline.text_encoder_3),
        )
    }
    small = {path: {k: v.float().clone() for k, v in state.items()} for path, state in small.items()}
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(target, safe_serialization=True)
    for name, state in small.items():
        saved = load_file(target / name).keys()
        tensors = {key: state[key].to(SMALL if state[key].ndim > 1 else torch.float16) for key in saved}
        save_file(tensors, target / name, metadata={"format": "pt"})
    for config in target.glob("text_encoder*/config.json"):
        # transformers loads in the precision that the file names, diffusers in float32: they have to agree.
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write everything but the synthetic dataset and the student, which the project's own commands make."""
    write_teacher()
    shutil.rmtree(mini.SCORER, ignore_errors=True)
    finished_scorer().save(mini.SCORER)
    if (work_folder() / "detector" / "state.safetensors").exists():  # else the shipped one stays
        detector = load_averaged("detector", Detector()).state_dict()
        measured = json.loads((work_folder() / "detector" / "measured.json").read_text(encoding="utf-8"))
        save_file(
            {name: value.half() for name, value in detector.items()}, mini.DETECTOR,
            metadata={"clean": str(measured["clean"])},
        )  # fmt: skip
    for file in sorted(mini.FOLDER.rglob("*")):
        if file.is_file() and file.stat().st_size > 100_000:
            print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(mini.FOLDER)}")


if __name__ == "__main__":
    main()

"""Stage V6: assemble the video mini in diffusers' folder layout, and write files of captions.

    python scripts/mini/video_package.py

Stock diffusers loads mini-work/video_teacher with `WanPipeline.from_pretrained`; `scripts/mini/video.yaml`
distills it. The matrices of the denoiser and of the text encoder are stored in float8 (e4m3), everything else
in float16; diffusers converts them to float32 when loading.
"""

from __future__ import annotations

import json
import shutil

import torch
from common import work_folder
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from video_denoiser import SHIFT, latents_of_all
from video_denoiser import finished as finished_denoiser
from video_text import finished as finished_text
from video_text import tokenizer
from video_vae import finished as finished_vae

from scalewise.mini.motions import motion_captions

SMALL = torch.float8_e4m3fn
FOLDER = work_folder() / "video_teacher"


def teacher() -> WanPipeline:
    """Assemble the pipeline from the averaged weights of the stages."""
    data, trained = latents_of_all(), finished_vae()
    statistics = {f"latents_{k}": [round(float(v), 6) for v in data[k]] for k in ("mean", "std")}
    vae = AutoencoderKLWan.from_config({**trained.config, **statistics})
    vae.load_state_dict(trained.state_dict())
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=finished_text().encoder,
        transformer=finished_denoiser(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
    )


def write_teacher() -> None:
    """Write the folder of the teacher."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    pipeline = teacher()
    small = {
        "transformer/diffusion_pytorch_model.safetensors": pipeline.transformer,
        "text_encoder/model.safetensors": pipeline.text_encoder,
    }
    states = {
        path: {k: v.float().clone() for k, v in part.state_dict().items()} for path, part in small.items()
    }
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(FOLDER, safe_serialization=True)
    for name, state in states.items():
        saved = load_file(FOLDER / name).keys()
        tensors = {key: state[key].to(SMALL if state[key].ndim == 2 else torch.float16) for key in saved}
        save_file(tensors, FOLDER / name, metadata={"format": "pt"})
    config = FOLDER / "text_encoder" / "config.json"
    # transformers loads in the precision that the file names, diffusers in float32: they have to agree.
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the teacher and the captions of both splits."""
    write_teacher()
    for split, held_out in (("train", False), ("test", True)):
        lines = motion_captions(held_out=held_out)
        (work_folder() / f"video_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = {path: path.stat().st_size for path in sorted(FOLDER.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        if size > 100_000:
            print(f"{size / 1e6:7.2f} MB  {path.relative_to(FOLDER)}")
    print(f"{sum(sizes.values()) / 1e6:7.2f} MB  in total")


if __name__ == "__main__":
    main()

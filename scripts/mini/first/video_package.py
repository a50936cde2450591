"""Put the video mini together as stock diffusers loads it: mini-work/video_teacher, with files of prompts.

    python scripts/mini/first/video_package.py

`WanPipeline.from_pretrained(<that folder>)` draws; `scripts/mini/first/video.yaml` distils it.
"""

from __future__ import annotations

from common import load_averaged, work_folder
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from video import Clips
from video_denoiser import SHIFT, build, cache
from video_text import VideoText
from video_vae import build as build_vae


def main() -> None:
    """Assemble the averaged weights of the stages."""
    clips, data = Clips(), cache()
    text, trained = load_averaged("video_text", VideoText(clips)), load_averaged("video_vae", build_vae())
    statistics = {f"latents_{k}": [round(float(v), 6) for v in data[k]] for k in ("mean", "std")}
    vae = AutoencoderKLWan.from_config({**trained.config, **statistics})
    vae.load_state_dict(trained.state_dict())
    pipeline = WanPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder,
        transformer=load_averaged("video_denoiser", build()),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
    )
    pipeline.save_pretrained(work_folder() / "video_teacher", safe_serialization=True)
    for split in ("train", "test"):
        lines = [clip.caption for clip in sorted(clips.of(split), key=lambda clip: clip.number)]
        (work_folder() / f"video_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

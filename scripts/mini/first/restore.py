"""Go on with the mini from the shipped weights: rebuild the stages' states that later training needs.

    python scripts/mini/first/restore.py --step 6400   # then denoiser.py --steps 12000

Writes mini-work/{vae,towers,denoiser,scorer}; `data.py` has to have run. Optimizers start anew, and what is
not shipped starts untrained: the image tower that the text encoders were trained against, and the scorer's
thumbnail head (both matter for training them further only). Stages that have a state are left alone.
"""

from __future__ import annotations

import argparse

from common import own_tensors, work_folder
from denoiser import build as build_denoiser
from diffusers import StableDiffusion3Pipeline
from pictures import load_pictures
from safetensors.torch import save_file
from text import Scorer, TeacherText
from torch import nn

from scalewise import mini
from scalewise.metrics import ClipScorer


def save_state(name: str, module: nn.Module, step: int) -> None:
    """Write a stage's state with the module's weights as live and as averaged ones."""
    path = work_folder() / name / "state.safetensors"
    if path.exists():
        print(f"{name}: has a state already, left alone")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"module/{k}": v.detach().float().contiguous() for k, v in own_tensors(module).items()}
    tensors |= {f"ema/{k}": v.detach().float().clone() for k, v in module.named_parameters()}
    save_file(tensors, path, metadata={"step": str(step), "ema_steps": str(step), "seconds": "0"})
    print(f"{name}: restored")


def main(step: int, scorer_step: int) -> None:
    """Take the shipped pipeline apart again."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(mini.TEACHER)
    tokenizer = work_folder() / "tokenizers" / "clip"
    if not tokenizer.exists():  # trained anew it would give other ids
        pipeline.tokenizer.save_pretrained(tokenizer)
    text = TeacherText(load_pictures().captions)
    for number, encoder in enumerate(
        (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3), 1
    ):
        getattr(text, f"text_{number}").load_state_dict(encoder.float().state_dict())
    denoiser = build_denoiser()
    denoiser.load_state_dict(pipeline.transformer.float().state_dict())
    save_state("towers", text, step=0)
    save_state("denoiser", denoiser, step=step)
    scorer = Scorer(load_pictures().captions)
    scorer.clip.load_state_dict(ClipScorer.load(mini.SCORER).model.state_dict())
    save_state("scorer", scorer, step=scorer_step)
    balanced = work_folder() / "vae" / "balanced.safetensors"
    balanced.parent.mkdir(parents=True, exist_ok=True)
    if not balanced.exists():
        save_file(pipeline.vae.float().state_dict(), balanced)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=1000, help="where the learning rate's schedule goes on")
    parser.add_argument("--scorer-step", type=int, default=430)
    options = parser.parse_args()
    main(options.step, options.scorer_step)

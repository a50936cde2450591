"""Stage 4: the denoiser (diffusers' SD3Transformer2DModel, patch 1), by flow matching on cached latents.

    python scripts/mini/first/denoiser.py                       # trains, resumes by itself
    python scripts/mini/first/denoiser.py --sheet sheet.png     # a contact sheet of held-out captions, by the
    average

Small pictures come first (8 x 8 latents), then mostly full ones, always mixed with every scale of the
schedule, so that the teacher can draw at each of them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Stage, batches, chunks, euler, half_is_fast, load_averaged, to_float, work_folder
from diffusers import SD3Transformer2DModel
from pictures import load_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from text import TeacherText
from torch import Tensor, nn
from vae import load_balanced

SCALES = (8, 10, 12, 16)
SMALL_MIX, LARGE_MIX = (0.7, 0.15, 0.15, 0.0), (0.2, 0.15, 0.15, 0.5)
# StableDiffusion3Pipeline pads the T5's tokens to 256 unless told otherwise; one batch in 16 learns that.
PADDED_LENGTH, PADDED_SHARE = 256, 1 / 16
SHIFT = 3.0  # of the sampling schedule, as in SD3
BATCH = 32


def build() -> SD3Transformer2DModel:
    """Return an untrained denoiser, initialised as DiT: modulation and output at zero."""
    torch.manual_seed(4)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=256,
        caption_projection_dim=192,
        pooled_projection_dim=256,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def cache() -> dict[str, Tensor]:
    """Latents of every scale and embeddings of every caption, made once from the earlier stages."""
    path = work_folder() / "denoiser" / "cache.safetensors"
    if path.exists():
        return load_file(path)
    pictures = load_pictures(split="train", denoiser_only=True)
    vae = load_balanced()
    pixels, out = to_float(pictures.pixels), {}
    for scale in SCALES:
        x = F.interpolate(pixels, size=(8 * scale,) * 2, mode="area") if scale < 16 else pixels
        out[f"latents_{scale}"] = torch.cat([vae.encode(c).latent_dist.mean for c in x.split(64)])
    full = out["latents_16"]
    out["shift"], out["factor"] = full.mean().reshape(1), 1 / full.std().reshape(1)
    for scale in SCALES:
        out[f"latents_{scale}"] = ((out[f"latents_{scale}"] - out["shift"]) * out["factor"]).half()
    text = load_averaged("towers", TeacherText(load_pictures().captions))
    out["tokens"], out["pooled"] = encode(text, [*pictures.captions, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, path)
    return out


@torch.no_grad()
def encode(text: TeacherText, captions: list[str], t5_length: int = 16) -> tuple[Tensor, Tensor]:
    """Embed captions as StableDiffusion3Pipeline does: tokens [N, 16 + t5_length, 256], pooled [N, 256]."""
    tokens, pooled = [], []
    for part in chunks(len(captions), 256):
        clip = text.clip_tokenizer(captions[part], padding="max_length", truncation=True, return_tensors="pt")
        t5 = text.t5_tokenizer(
            captions[part],
            padding="max_length",
            max_length=t5_length,
            truncation=True,
            return_tensors="pt",
        )
        one = text.text_1(clip.input_ids, output_hidden_states=True)
        two = text.text_2(clip.input_ids, output_hidden_states=True)
        both = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        tokens.append(torch.cat([both, text.text_3(t5.input_ids)[0]], dim=1))
        pooled.append(torch.cat([one.text_embeds, two.text_embeds], dim=-1))
    return torch.cat(tokens), torch.cat(pooled)


def train(steps: int, small_steps: int, *, compiled: bool) -> None:
    """Velocity matching at levels half uniform, half logit-normal; one caption in ten is dropped."""
    data = cache()
    count = len(data["latents_16"])
    model = build()
    stage = Stage("denoiser", model, lr=1e-3, steps=steps, ema=0.999, warmup=150, decay_from=0.75)
    fast = torch.compile(model, dynamic=False) if compiled else model
    text = load_averaged("towers", TeacherText(load_pictures().captions))
    captions = [*load_pictures(split="train", denoiser_only=True).captions, ""]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        mix = SMALL_MIX if step < small_steps else LARGE_MIX
        scale = SCALES[int(torch.multinomial(torch.tensor(mix), 1))]
        chosen = batches(count, BATCH, step, seed=4)
        x0 = data[f"latents_{scale}"][chosen].float()
        told = torch.where(torch.rand(BATCH) < 0.1, count, chosen)
        level = torch.where(
            torch.rand(BATCH) < 0.5, torch.rand(BATCH), torch.sigmoid(0.4 + torch.randn(BATCH))
        )
        sigma, eps = level[:, None, None, None], torch.randn_like(x0)
        padded = float(torch.rand(1)) < PADDED_SHARE
        tokens = (
            encode(text, [captions[i] for i in told], PADDED_LENGTH)[0] if padded else data["tokens"][told]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            # A compiled model is compiled anew for every shape, which the rare long one is not worth.
            velocity = (model if padded else fast)(
                hidden_states=(1 - sigma) * x0 + sigma * eps,
                timestep=1000 * level,
                encoder_hidden_states=tokens,
                pooled_projections=data["pooled"][told],
                return_dict=False,
            )[0]
        value = (velocity.float() - (eps - x0)).square().mean()
        return value, {f"loss_{scale}": float(value.detach())}

    stage.run(loss)


@torch.no_grad()
def draw(
    captions: list[str], *, side: int = 16, steps: int = 28, guidance: float = 4.5, seed: int = 0
) -> Tensor:
    """Sample pictures [N, 3, 8 side, 8 side] with the averaged weights (Euler, shifted schedule)."""
    data, model = cache(), load_averaged("denoiser", build())
    text, vae = (
        load_averaged("towers", TeacherText(load_pictures().captions)),
        load_balanced(),
    )
    tokens, pooled = encode(text, captions)
    none_tokens, none_pooled = encode(text, [""])
    both = torch.cat([tokens, none_tokens.expand_as(tokens)])
    both_pooled = torch.cat([pooled, none_pooled.expand_as(pooled)])

    def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast()):
            found = model(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=both,
                pooled_projections=both_pooled,
                return_dict=False,
            )[0]
        return found.float().chunk(2)

    x = torch.randn(len(captions), 16, side, side, generator=torch.Generator().manual_seed(seed))
    x = euler(velocity, x, steps=steps, guidance=guidance, shift=SHIFT)
    return vae.decode(x / data["factor"] + data["shift"]).sample.clamp(-1, 1)


def sheet(pictures: Tensor, path: Path, columns: int = 10) -> None:
    """Save pictures [N, 3, H, W] as one image."""
    rows = math.ceil(len(pictures) / columns)
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    side = pixels.shape[1]
    page = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pixels):
        page.paste(Image.fromarray(picture), ((i % columns) * side, (i // columns) * side))
    page.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--small-steps", type=int, default=3000)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the denoiser (needs a C++ compiler)"
    )
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--side", type=int, default=16)
    options = parser.parse_args()
    if options.sheet:
        known = load_pictures(split="train", denoiser_only=True).captions[::97][:10]
        wanted = [
            "a red apple, noto style",
            "a red apple, fluent style",
            "a dog, flat fluent style",
            "a rocket, noto style",
            "a red crab, fluent style",
            "a sunflower, fluent style",
            "a guitar, noto style",
            "a house, fluent style",
            "a cat face, noto style",
            "an ambulance, flat fluent style",
        ]
        held_out = load_pictures(split="test", denoiser_only=True).captions[::10][:30]
        print(json.dumps([*wanted, *known, *held_out], indent=0))
        sheet(draw([*wanted, *known, *held_out], side=options.side), options.sheet)
    else:
        train(options.steps, options.small_steps, compiled=options.compile)

"""Stage 6: measure the packaged mini on captions and pictures nothing was trained on; write its card.

    python scripts/mini/first/measure.py             # all of it: mini-work/measured.json, then MODEL_CARD.md
    python scripts/mini/first/measure.py --only text # a part of it again, and the card
    python scripts/mini/first/measure.py --only      # the card alone, from measured.json

Contact sheets land in mini-work/sheets: look at them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import psnr, to_float, work_folder
from diffusers import StableDiffusion3Pipeline
from pictures import load_pictures
from safetensors.torch import load_file
from torch import Tensor

from scalewise import mini
from scalewise.common import console
from scalewise.common.images import contact_sheet, to_bytes
from scalewise.config.presets import find_recipe
from scalewise.evaluation.compare import score_real_images
from scalewise.evaluation.samplers import Prompts
from scalewise.evaluation.scoring import load_scorers
from scalewise.method.backbone import Backbone
from scalewise.method.sampling import sample_teacher
from scalewise.method.scales import Scale, downscale_area
from scalewise.metrics import measure
from scalewise.metrics.clip import prompt_match
from scalewise.models import PipelineAdapter, load_model

CARD = mini.FOLDER / "MODEL_CARD.md"
TEMPLATE = Path(__file__).parent / "card.md"


@torch.no_grad()
def reconstruction(model: PipelineAdapter) -> dict[str, float]:
    """PSNR in dB of encoding and decoding held-out pictures, at every size of the schedule."""
    pixels, found = to_float(load_pictures(split="test").pixels), {}
    for side in (128, 96, 80, 64):
        small = downscale_area(pixels, (side, side))
        values = [psnr(model.decode(model.encode(part)), part) for part in small.split(32)]
        found[str(side)] = round(float(torch.cat(values).mean()), 2)
    return found


@torch.no_grad()
def draw(model: PipelineAdapter, prompts: Prompts, scale: Scale) -> Tensor:
    """Pixels of all prompts by the teacher at a scale."""
    recipe, backbone = find_recipe("mini"), Backbone(model, precision="auto")
    uncond, parts = model.encode_prompts([""]), []
    with console.progress(f"teacher at {scale}", len(prompts)) as done:
        for start in range(0, len(prompts), 23):
            some = prompts[start : start + 23]
            cond = model.encode_prompts(some.captions)
            x0 = sample_teacher(
                backbone, scale, cond, some.seeds, steps=recipe.teacher.steps,
                guidance=recipe.teacher.guidance, uncond=uncond,
            )  # fmt: skip
            parts.append(model.decode(x0))
            done(start + len(some))
    return torch.cat(parts)


def real(model: PipelineAdapter) -> dict[str, dict[str, list[float]]]:
    """What real pictures reach by the same judge."""
    rows = score_real_images(load_scorers(find_recipe("mini")))
    return {row.name: {k: v.to_list() for k, v in row.values.items()} for row in rows}


def scales(model: PipelineAdapter) -> dict[str, dict[str, list[float]]]:
    """The teacher's figures at every scale of the schedule, on all held-out captions; its contact sheets."""
    recipe, prompts, found = find_recipe("mini"), Prompts.of(mini.captions("test")), {}
    judge = load_scorers(recipe)
    (work_folder() / "sheets").mkdir(exist_ok=True)
    for scale in recipe.schedule.build().scales:
        images = to_bytes(draw(model, prompts, scale))
        values = measure(judge.score(images, prompts))
        found[str(scale)] = {k: v.to_list() for k, v in values.items()}
        contact_sheet(list(images[:60]), columns=12).save(work_folder() / "sheets" / f"teacher-{scale}.png")
    return found


@torch.no_grad()
def text(model: PipelineAdapter) -> dict[str, float]:
    """How well each text encoder tells pictures apart: rank 1 of 50 through a ridge regression from its
    pooled embedding to the scorer's image features, fitted on the captions that the denoiser learned.

    The image tower that the encoders were trained against does not ship; this needs nothing that does not.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(mini.TEACHER)
    features = {k: v.double() for k, v in load_file(mini.REFERENCE).items()}
    found = {}
    for number, suffix in enumerate(("", "_2", "_3"), 1):
        encoder = getattr(pipeline, f"text_encoder{suffix}").float()
        tokenizer = getattr(pipeline, f"tokenizer{suffix}")
        embeddings = {}
        for split in ("train", "test"):
            ids = tokenizer(mini.captions(split), padding="max_length", truncation=True, return_tensors="pt")
            told = encoder(ids.input_ids)
            embeddings[split] = (told.text_embeds if number < 3 else told[0].mean(1)).double()
        predict = ridge(embeddings["train"], features["train"])
        for split, embedding in embeddings.items():
            hits = prompt_match(features[split], predict(embedding), torch.arange(len(embedding)))
            found[f"text_{number}_rank1_of_50_{split}"] = float(hits.double().mean())
    return found


def ridge(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit y [N, D] by x [N, C], penalty a hundredth of the mean variance; give rows of length 1."""
    mean, offset = x.mean(0), y.mean(0)
    covariance = (x - mean).T @ (x - mean)
    penalty = 0.01 * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(covariance + penalty, (x - mean).T @ (y - offset))
    return lambda z: F.normalize((z - mean) @ weights, dim=-1)


PARTS = {"psnr": reconstruction, "real": real, "text": text, "scales": scales}


def main(parts: list[str]) -> None:
    """Measure the parts; what was measured before stays."""
    console.quiet_libraries()
    path, model = work_folder() / "measured.json", load_model(mini.TEACHER)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in parts:
        found[part] = PARTS[part](model)
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def write_card() -> None:
    """Fill the card's template with what was measured."""
    found = json.loads((work_folder() / "measured.json").read_text(encoding="utf-8"))

    def figure(values: dict[str, list[float]], key: str, factor: float = 1.0, digits: int = 3) -> str:
        value, low, high = (factor * v for v in values[key])
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    lines = ["| images | Fréchet distance | prompt match, % | CLIP score |", "|---|---|---|---|"]
    rows = {f"teacher at {scale}": values for scale, values in found["scales"].items()} | found["real"]
    for name, values in rows.items():
        distance = figure(values, "frechet") if "frechet" in values else "-"
        match = figure(values, "prompt_match", 100, 1)
        lines.append(f"| {name} | {distance} | {match} | {figure(values, 'clip_score', digits=1)} |")
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{figures}}", "\n".join(lines))
    text = text.replace("{{psnr}}", ", ".join(f"{v} dB at {k} px" for k, v in found["psnr"].items()))
    for key, value in found["text"].items():
        text = text.replace("{{" + key + "}}", f"{100 * value:.1f}%")
    CARD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    main(parser.parse_args().only)
    write_card()

"""Stage 6: measure the packaged mini on captions and pictures nothing was trained on; write its card.

    python scripts/mini/measure.py               # all of it: mini-work/measured.json, then MODEL_CARD.md
    python scripts/mini/measure.py --card-only   # the card again, from measured.json

Contact sheets land in mini-work/sheets: look at them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import load_pictures, psnr, to_float, work_folder

from scalewise import console, mini
from scalewise.backbone import Backbone
from scalewise.contenders import Prompts
from scalewise.metrics import measure
from scalewise.models import ModelAdapter, load_model
from scalewise.pictures import sheet, to_bytes
from scalewise.recipes import find_recipe
from scalewise.sampling import last, teacher_steps
from scalewise.scales import Scale, downscale_area
from scalewise.study import judge_of, real_rows

CARD = mini.FOLDER / "MODEL_CARD.md"
TEMPLATE = Path(__file__).parent / "card.md"


@torch.no_grad()
def reconstruction(model: ModelAdapter) -> dict[str, float]:
    """PSNR in dB of encoding and decoding held-out pictures, at every size of the schedule."""
    pixels, found = to_float(load_pictures(split="test").pixels), {}
    for side in (128, 96, 80, 64):
        small = downscale_area(pixels, (side, side))
        values = [psnr(model.decode(model.encode(part)), part) for part in small.split(32)]
        found[str(side)] = round(float(torch.cat(values).mean()), 2)
    return found


@torch.no_grad()
def draw(model: ModelAdapter, prompts: Prompts, scale: Scale) -> torch.Tensor:
    """Pixels of all prompts by the teacher at a scale."""
    recipe, backbone = find_recipe("mini"), Backbone(model, precision="auto")
    uncond, parts = model.encode_prompts([""]), []
    with console.progress(f"teacher at {scale}", len(prompts)) as done:
        for start in range(0, len(prompts), 23):
            some = prompts[start : start + 23]
            cond = model.encode_prompts(some.captions)
            steps = teacher_steps(
                backbone, scale, cond, some.seeds, steps=recipe.teacher.steps,
                guidance=recipe.teacher.guidance, uncond=uncond,
            )  # fmt: skip
            parts.append(model.decode(last(steps)))
            done(start + len(some))
    return torch.cat(parts)


def main() -> None:
    """Measure and write."""
    console.quiet_libraries()
    recipe, model = find_recipe("mini"), load_model(mini.TEACHER)
    judge, texts = judge_of(recipe), mini.captions("test")
    found = {"psnr": reconstruction(model), "scales": {}, "real": {}}
    for row in real_rows(judge):
        found["real"][row.name] = {k: v.to_list() for k, v in row.values.items()}
    (work_folder() / "sheets").mkdir(exist_ok=True)
    for scale in recipe.schedule.build().scales:
        prompts = Prompts.of(texts)
        images = to_bytes(draw(model, prompts, scale))
        values = measure(judge.see(images, prompts))
        found["scales"][str(scale)] = {k: v.to_list() for k, v in values.items()}
        sheet(list(images[:60]), columns=12).save(work_folder() / "sheets" / f"teacher-{scale}.png")
    found["text"] = json.loads((work_folder() / "text_measured.json").read_text())
    (work_folder() / "measured.json").write_text(json.dumps(found, indent=1))


def write_card() -> None:
    """Fill the card's template with what was measured."""
    found = json.loads((work_folder() / "measured.json").read_text())

    def figure(values: dict[str, list[float]], key: str, factor: float = 1.0, digits: int = 3) -> str:
        value, low, high = (factor * v for v in values[key])
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    lines = ["| pictures | Frechet distance | prompt match, % | CLIP score |", "|---|---|---|---|"]
    rows = {f"teacher at {scale}": values for scale, values in found["scales"].items()} | found["real"]
    for name, values in rows.items():
        distance = figure(values, "frechet") if "frechet" in values else "-"
        match = figure(values, "prompt_match", 100, 1)
        lines.append(f"| {name} | {distance} | {match} | {figure(values, 'clip_score', digits=1)} |")
    text = TEMPLATE.read_text().replace("{{figures}}", "\n".join(lines))
    text = text.replace("{{psnr}}", ", ".join(f"{v} dB at {k} px" for k, v in found["psnr"].items()))
    for key, value in found["text"].items():
        text = text.replace("{{" + key + "}}", f"{100 * value:.1f} %")
    CARD.write_text(text)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--card-only", action="store_true")
    if not parser.parse_args().card_only:
        main()
    write_card()

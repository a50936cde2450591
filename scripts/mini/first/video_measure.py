"""Measure the video mini and its students on captions that were held out.

    python scripts/mini/first/video_measure.py teacher undistilled "both=student:runs/video" --count 100

What is shown: the image scorer on the middle frame, against 50 captions of objects. How it moves: a linear
classifier of the frames' centres, sizes and changes, learned on real clips. Real held-out clips stand beside
both. Writes figures.json, timings.json and film strips to --out: look at them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import work_folder
from torch import Tensor
from video import MOTIONS, STYLE, Clip, Clips, filmstrip

from scalewise import mini
from scalewise.common import console
from scalewise.common.images import middle_frame, to_bytes
from scalewise.common.results import write_json
from scalewise.config.presets import find_recipe
from scalewise.evaluation.compare import time_samplers
from scalewise.evaluation.evaluate import Row, save_rows
from scalewise.evaluation.evaluate import table as figures_table
from scalewise.evaluation.samplers import Prompts, SamplerSpec, enter, parse_samplers
from scalewise.evaluation.scoring import Scorers
from scalewise.evaluation.timing import timings_table
from scalewise.metrics import ClipScorer, measure
from scalewise.metrics.shares import wilson
from scalewise.models import ALL_PARTS, PipelineAdapter
from scalewise.training.setup import load

INK = 0.12  # darker than white by this much is part of an object
WORDS = ", flat fluent style"  # of the image mini's captions


def traces(videos: Tensor) -> Tensor:
    """What tells motions apart [N, D]: centre, size and change, frame by frame, of videos [N, 3, F, H, W]."""
    ink = (1 - videos).mean(1) / 2
    side = torch.linspace(-1, 1, ink.shape[-1])
    mass = ink.sum((2, 3)).clamp_min(1e-3)
    x, y = (ink * side).sum((2, 3)) / mass, (ink * side[:, None]).sum((2, 3)) / mass
    spread = ((ink * (side**2 + side[:, None] ** 2)).sum((2, 3)) / mass - x**2 - y**2).clamp_min(1e-4).log()
    change = (videos[:, :, 1:] - videos[:, :, :-1]).abs().mean((1, 3, 4)).clamp_min(1e-5).log()
    return torch.cat([x, y, mass.log(), spread, change, (y - y.mean(1, keepdim=True)).abs()], 1)


class MotionJudge:
    """A linear classifier of motions, learned on real clips."""

    def __init__(self, clips: Clips, *, count: int = 900, steps: int = 600) -> None:
        known = clips.of("train")[:: max(1, len(clips.of("train")) // count)]
        features = traces(torch.stack([clips.render(clip) for clip in known]))
        self.mean, self.std = features.mean(0), features.std(0)
        self.layer = torch.nn.Linear(features.shape[1], len(MOTIONS))
        goal, x = torch.tensor([number(clip) for clip in known]), (features - self.mean) / self.std
        optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.05, weight_decay=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self.layer(x), goal).backward()
            optimizer.step()

    @torch.no_grad()
    def hits(self, videos: Tensor, wanted: list[Clip]) -> Tensor:
        """Whether each video [N, ...] moves as its caption says."""
        found = self.layer((traces(videos) - self.mean) / self.std).argmax(1)
        return (found == torch.tensor([number(clip) for clip in wanted])).float()


def number(clip: Clip) -> int:
    return list(MOTIONS).index(clip.motion)


@torch.no_grad()
def draw(model: PipelineAdapter, contender: SamplerSpec, captions: list[str], *, batch: int = 8) -> Tensor:
    """Videos [N, 3, F, H, W] of all captions, sample i from seed i."""
    uncond, parts = model.encode_prompts([contender.negative_prompt]), []
    with (
        enter(model, contender, precision="auto") as sampler,
        console.progress(f"drawing: {contender.name}", len(captions)) as done,
    ):
        for start in range(0, len(captions), batch):
            some = captions[start : start + batch]
            seeds = range(start, start + len(some))
            parts.append(model.decode(sampler(model.encode_prompts(some), uncond, seeds)))
            done(start + len(some))
    return torch.cat(parts)


def stills(videos: Tensor, side: int = 128) -> Tensor:
    """What the middle frames show [N, 3, side, side], brought to the size at which the scorer knows it."""
    return torch.cat([cut_out(frame[None], side) for frame in middle_frame(videos)])


def cut_out(frame: Tensor, side: int) -> Tensor:
    """The part of a frame [1, 3, H, W] that is not white, as a square with a margin of a tenth."""
    rows, columns = (
        ((1 - frame[0]).amax(dim=(0, other)) > INK).nonzero().flatten().tolist() or [0, frame.shape[-1] - 1]
        for other in (2, 1)
    )
    middle_y, middle_x = ((found[0] + found[-1] + 1) / 2 for found in (rows, columns))
    reach = 0.55 * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    whole = frame.shape[-1]
    theta = torch.tensor([[
        [2 * reach / whole, 0, 2 * middle_x / whole - 1], [0, 2 * reach / whole, 2 * middle_y / whole - 1]
    ]])  # fmt: skip
    grid = F.affine_grid(theta, [1, 3, side, side], align_corners=False)
    # Zeros beyond the edge: white, once 1 is added again.
    return (F.grid_sample(frame - 1, grid, mode="bicubic", align_corners=False) + 1).clamp(-1, 1)


def main(contenders: list[str], recipe_file: str, *, count: int, out: Path) -> None:
    """Draw, judge and time."""
    console.quiet_libraries()
    clips, recipe = Clips(), find_recipe(recipe_file)
    chosen = sorted(clips.of("test"), key=lambda clip: clip.number)
    reference, wanted = chosen[count:], chosen[:count]
    moves, scorer = MotionJudge(clips), ClipScorer.load(mini.SCORER)
    texts = [f"{clip.text}{WORDS}" for clip in wanted]
    pool = [r["caption"] for r in clips.pictures.records if r["style"] == STYLE]
    real = torch.stack([clips.render(clip) for clip in reference])
    judge = Scorers(scorer, scorer.embed_images(to_bytes(stills(real))), pool)
    prompts = Prompts.of(texts)
    model = load(recipe, ALL_PARTS)
    parsed = parse_samplers(contenders, recipe)
    videos = {c.name: draw(model, c, [clip.caption for clip in wanted]) for c in parsed}
    videos["real, held out"] = torch.stack([clips.render(clip) for clip in wanted])
    rows, motion = [], {}
    out.mkdir(parents=True, exist_ok=True)
    about = {c.name: c.about for c in parsed} | {"real, held out": "rendered clips"}
    for name, drawn in videos.items():
        seen = judge.score(to_bytes(stills(drawn)), prompts)
        rows.append(Row(name, "video", about[name], len(drawn), measure(seen)))
        hits = moves.hits(drawn, wanted)
        motion[name] = wilson(float(hits.double().mean()), len(hits)).to_list()
        filmstrip(drawn[:12], out / f"{''.join(c if c.isalnum() else '-' for c in name)}.png")
    save_rows(rows, out)
    (out / "motion.json").write_text(json.dumps(motion, indent=1) + "\n", encoding="utf-8")
    timings = time_samplers(model, recipe, parsed, wanted[0].caption, console.progress)
    write_json(out / "timings.json", timings)
    print(figures_table(rows))
    for name, (value, low, high) in motion.items():
        print(f"motion match, {name}: {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    print(timings_table(timings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--recipe", default=str(Path(__file__).parent / "video.yaml"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=work_folder() / "video_measured")
    options = parser.parse_args()
    main(options.contenders, options.recipe, count=options.count, out=options.out)

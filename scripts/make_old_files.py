"""Make tests/data/before-0.2: a set, a run with a checkpoint and a student as an earlier version writes them.

    git worktree add --detach /tmp/before 5d65ce1
    PYTHONPATH=/tmp/before/src OMP_NUM_THREADS=1 python scripts/make_old_files.py tests/data/before-0.2

It uses the commands of whichever version PYTHONPATH names, on a random miniature of SD3. Files of a later
version go into a folder of their own: these stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scalewise import load_student
from scalewise.data import LatentSet
from scalewise.models import SD3

PROMPTS = ["a dog", "a cat", "a fish"]
OVERRIDES = [
    "name=old",
    "model.base=base",
    "data.path=set",
    "schedule.timesteps=[1000, 700]",
    "schedule.scales=['4', '8']",
    "lora.rank=1",
    "loss.feature_block=1",
    "loss.fake.updates=1",
    "teacher.steps=2",
    # Large, so that two iterations change what the student draws.
    "optimizer.lr=0.03",
    "optimizer.warmup=0",
    "train.iterations=2",
    "train.batch=2",
    "train.precision=float32",
    "train.checkpoint_every=1000",
    "train.keep_checkpoints=1",
    "train.sample_every=0",
    "train.sample_prompts=[]",
]
LOSSES = ("mmd", "dmd", "gan", "fake/denoising", "fake/discriminator", "student/gradient_norm")


def scalewise(*words: str) -> None:
    """Run a command of the version that PYTHONPATH names."""
    subprocess.run([sys.executable, "-m", "scalewise", *words], check=True)


def make(folder: Path) -> None:
    """Write base, set, run and exported student into an empty folder, and what they are expected to give."""
    os.chdir(folder)
    os.environ["SCALEWISE_CACHE"] = tempfile.mkdtemp()
    SD3.tiny().save(Path("base"))
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    generate = ["--prompts", "prompts.txt", "--count", "4", "--batch", "4", "--out", "set"]
    scalewise("generate", "mini", *OVERRIDES, *generate)
    scalewise("distill", "mini", *OVERRIDES, "--out", "run")
    scalewise("export", "run", "kohya.safetensors", "--form", "kohya")
    scalewise("sample", "a dog", "--student", "run", "--out", "drawn")
    # What an uninterrupted run does next, to compare with one that is resumed.
    scalewise("distill", "mini", *OVERRIDES, "train.iterations=3", "--out", "longer")
    Path("expected.json").write_text(json.dumps(expected(), indent=1) + "\n", encoding="utf-8")
    for name in ("longer", "run/tensorboard", "run/samples"):
        shutil.rmtree(name, ignore_errors=True)
    for path in (Path("prompts.txt"), *Path().rglob("*.lock"), *Path().rglob(".lock")):
        path.unlink(missing_ok=True)


def expected() -> dict[str, object]:
    """Numbers of the files in the current folder."""
    data = LatentSet.open("set")
    rows = [json.loads(line) for line in Path("longer/log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "captions": data.captions(range(len(data))),
        "latents": {
            str(scale): [round(float(x), 6) for x in data.latents([0], scale)[0].flatten()[:8]]
            for scale in data.header.scales
        },
        "third iteration": {key: rows[2][key] for key in LOSSES},
        "third student": sum(float(t.abs().sum()) for t in load_student("longer").tensors.values()),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    make(target)

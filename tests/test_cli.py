"""The command line as a user meets it: one clear sentence for an error, a non-zero code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_trainer import run_as_a_process, silent, wait_for_iteration
from tiny_run import PROMPTS, make_tiny

from scalewise import mini
from scalewise.cli import main
from scalewise.common import checkpoint
from scalewise.config.overrides import field_names
from scalewise.config.recipe import Recipe
from scalewise.data import LatentSet, synthetic
from scalewise.data.synthetic import generate
from scalewise.models import SD3
from scalewise.training import run as runs
from scalewise.training import setup


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit code, all it printed on one line)."""

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        printed = capfd.readouterr()
        return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())

    return call


def test_every_command_has_help_with_an_example(run) -> None:
    code, text = run("--help")
    assert code == 0 and all(
        w in text for w in ("demo", "plan", "generate", "distill", "sample", "export", "evaluate", "metrics")
    )
    for command in (
        "plan", "generate", "distill", "sample", "export", "evaluate", "recipes", "bench", "spectrum",
        "study",
    ):  # fmt: skip
        code, text = run(command, "--help")
        assert code == 0 and "Example" in text and "scalewise " in text, command


def test_a_recipe_is_printed_as_yaml_that_reads_back(run, tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "scalewise", "recipes", "mini"], capture_output=True, text=True, check=True
    )
    (tmp_path / "mine.yaml").write_text(completed.stdout)
    assert Recipe.from_yaml(tmp_path / "mine.yaml").name == "mini"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "minni"], "did you mean 'mini'?"),
        (["distill", "mini", "loss.mmd.kernl=rbf"], "did you mean 'loss.mmd.kernel'?"),
        (["distill", "mini", "train.iterations"], "must have the form key=value"),
        (["distill", "mini", "train.batch=0"], "train.batch = 0"),
        (["distill", "mini", "schedule.timesteps=[1000,900,950,600]"], "timesteps must decrease"),
        (["distill", "nowhere.yaml"], "Recipe file nowhere.yaml not found"),
        (["sample", "a dog", "--student", "nowhere"], "There is no student at nowhere"),
        (["sample", "a dog", "--schedule", "minni"], "There is no schedule 'minni'"),
        (["export", "mini", "out.safetensors", "--form", "webui"], "'webui' is not a key format"),
        (["export", "mini", "out.txt"], "out.txt must end in .safetensors"),
        (["sample", "a dog", "--teacher", "--schedule", "mini"], "--schedule only applies to students"),
        (["sample", "a dog", "--schedule", "1000@2x8x8 800@2x8x8"], "is a model for images"),
        (["plan", "mini", "model.base=nowhere/at-all"], "There is no configuration for nowhere/at-all"),
        (["sample", "a dog", "--student", "setup.bin"], "There is no student at setup.bin"),
        (
            ["distill", "mini", "model.base=nowhere/at-all", "--dry-run"],
            "Cannot find the model 'nowhere/at-all'",
        ),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_a_non_zero_code(run, arguments: list[str], said: str) -> None:
    code, text = run(*arguments)
    assert code == 1 and text.startswith("Error:") and said in text and "Traceback" not in text


@pytest.mark.parametrize(("arguments", "said"), [
    (["foo"], "No such command 'foo'"), (["sample"], "Missing argument"), ([], "Usage"),
    (["sample", "a dog", "--cont", "3"], "No such option"), (["generate", "mini", "--count", "0"], "--count"),
])  # fmt: skip
def test_a_slip_on_the_command_line_ends_with_its_usage(run, arguments: list[str], said: str) -> None:
    code, text = run(*arguments)
    assert code == 2 and said in text and "Traceback" not in text


def test_versions_are_told(run) -> None:
    code, text = run("--version")
    assert code == 0 and text.startswith("scalewise-diffusion ") and "torch " in text


def test_every_key_of_a_recipe_is_listed(run) -> None:
    code, text = run("recipes", "--keys")
    assert code == 0 and all(name.split(".")[-1] in text for name in field_names(Recipe))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_kill_is_said_and_leaves_the_signals_as_they_were(run, monkeypatch, number) -> None:
    monkeypatch.setattr("scalewise.cli.run_making.sample_images", lambda *_: os.kill(os.getpid(), number))
    # A shell's background jobs ignore Ctrl-C; a foreground one begins like this.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        before = signal.getsignal(number)
        code, text = run("sample", "a dog")
        assert signal.getsignal(number) is before
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert code == 128 + number and "Stopped. What was written so far is kept." in text


def test_what_was_drawn_is_kept_when_generating_is_stopped(run, recipe, recipe_file, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    arguments = ["generate", recipe_file, "--prompts", tmp_path / "prompts.txt", "--count", 6, "--batch", 2]
    assert run(*arguments, "--out", tmp_path / "whole")[0] == 0
    model = setup.teacher(recipe)
    drawing = generate(model, recipe, ["a dog", "a cat"], tmp_path / "set", count=6, batch=2)
    assert [next(drawing) for _ in range(3)] == [0, 2, 4]
    drawing.close()  # as when the caller's loop is interrupted
    assert len(LatentSet.open(tmp_path / "set")) == 4
    assert run(*arguments, "--out", tmp_path / "set")[0] == 0
    one, other = (LatentSet.open(tmp_path / name) for name in ("set", "whole"))
    assert torch.equal(one.latents(range(6), one.scales[-1]), other.latents(range(6), other.scales[-1]))


def test_a_set_is_written_every_few_minutes(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "SAVE_EVERY_SECONDS", 0.0)
    drawing = generate(setup.teacher(recipe), recipe, ["a dog"], tmp_path / "set", count=6, batch=2)
    assert [next(drawing) for _ in range(3)] == [0, 2, 4]
    assert len(list((tmp_path / "set").glob("*.arrow"))) == 2  # nothing was stopped yet


@pytest.mark.parametrize("command", [
    ["sample", "a dog"], ["generate", "mini"], ["distill", "mini"], ["spectrum", "mini"], ["bench", "mini"],
    ["evaluate", "mini", "teacher"], ["study", "losses"],
])  # fmt: skip
def test_a_file_in_place_of_a_folder_is_refused_at_once(run, tmp_path, command) -> None:
    (tmp_path / "taken").write_text("kept")
    code, text = run(*command, "--out", tmp_path / "taken")
    assert code == 1 and "taken is a file; --out must be a folder" in text
    assert (tmp_path / "taken").read_text() == "kept"


def test_prompts_that_are_no_text_are_refused(run, recipe_file, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\x89PNG")
    code, text = run(
        "generate", recipe_file, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "set"
    )
    assert code == 1 and "prompts.txt is not a text file but a PNG image" in text


def test_a_schedule_that_does_not_begin_with_noise_is_warned_of(run, recipe_file, tmp_path) -> None:
    changes = ["schedule.timesteps=[900,800,700,600]", "train.iterations=1", "--dry-run"]
    code, text = run("distill", recipe_file, *changes)
    assert code == 0 and "begins at t = 900, but sampling starts from pure noise" in text


def test_a_full_device_ends_in_one_sentence(run, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("scalewise.cli.run_making.sample_images", full)
    code, text = run("sample", "a dog")
    assert code == 1 and "out of memory" in text and "--batch" in text and "2 GiB" in text


def test_a_set_of_another_model_is_told(run, recipe: Recipe, recipe_file: str, tmp_path: Path) -> None:
    SD3.tiny(1).save(tmp_path / "other")
    other = ["train.iterations=1", f"model.base={tmp_path / 'other'}", "--out", tmp_path / "run"]
    code, text = run("distill", recipe_file, *other)
    assert code == 0 and "Warning:" in text and "was generated by" in text
    header = Path(recipe.data.path) / "set.json"
    shutil.copytree(header.parent, tmp_path / "set")
    (tmp_path / "set" / "set.json").write_text(header.read_text().replace('"channels": 4', '"channels": 16'))
    wide = [f"data.path={tmp_path / 'set'}", "--out", tmp_path / "wide"]
    code, text = run("distill", recipe_file, *wide)
    assert code == 1 and "has latents of 16 channels" in text


def test_a_teacher_is_drawn_by_its_recipe_without_a_student(run, recipe_file: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "drawn"]
    code, text = run("sample", "a dog", "--teacher", "--recipe", recipe_file, *out)
    assert code == 0, text
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1
    code, text = run("sample", "a dog", "--base", "somewhere/else")
    assert code == 1 and "No student for somewhere/else was given; add --student" in text


def test_a_schedule_that_does_not_fit_the_model_is_refused(run, recipe_file: str) -> None:
    code, text = run("distill", recipe_file, "schedule.scales=['5','6','6','8']", "--dry-run")
    assert code == 1 and "5x5 is not divisible by the patch size 2" in text
    code, text = run("distill", recipe_file, "schedule.scales=['4','6','6','64']", "--dry-run")
    assert code == 1 and "24x24, the largest scale with position embeddings in this model" in text
    code, text = run("distill", recipe_file, "loss.feature_block=7", "--dry-run")
    assert code == 1 and "use one of 0 to 3" in text


def test_training_in_float16_is_refused(run, recipe_file: str, tmp_path: Path) -> None:
    code, text = run("distill", recipe_file, "model.dtype=float16", "--out", tmp_path / "run")
    assert code == 1 and "float16 is only for sampling" in text and "model.dtype=bfloat16" in text


def test_a_schedule_of_another_full_scale_than_the_set_is_refused(
    run, recipe_file: str, tmp_path: Path
) -> None:
    code, text = run("distill", recipe_file, "schedule.scales=['2','4','6','6']", "--out", tmp_path / "run")
    assert code == 1 and "samples of 8x8, but the schedule ends at 6x6" in text


def test_an_empty_or_unreadable_data_folder_is_explained(run, recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, text = run("distill", recipe_file, f"data.path={tmp_path / 'empty'}", "--out", tmp_path / "run")
    assert code == 1 and str(tmp_path / "empty") in text.replace(" ", "") and "image" in text
    code, text = run("distill", recipe_file, f"data.path={tmp_path / 'gone'}", "--out", tmp_path / "run2")
    assert code == 1 and "gone" in text


def test_a_corrupt_shard_is_named(run, recipe: Recipe, recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    code, _ = run(
        "generate", recipe_file, "--prompts", tmp_path / "p.txt", "--count", 8, "--out", tmp_path / "s"
    )
    assert code == 0
    shard = next((tmp_path / "s").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    code, text = run("distill", recipe_file, f"data.path={tmp_path / 's'}", "--out", tmp_path / "run")
    assert code == 1 and shard.name in text and "generate" in text


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    run, recipe_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run("distill", recipe_file, "train.iterations=4", "--out", out)[0] == 0
    newest = out / "checkpoints" / "step-000004" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    code, text = run("distill", recipe_file, "train.iterations=6", "--out", out, "--resume")
    assert code == 0 and "step-000004" in text
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / "step-000006"


def test_an_overlong_prompt_is_drawn_with_a_warning(run, recipe_file: str, tmp_path: Path) -> None:
    assert run("distill", recipe_file, "train.iterations=1", "--out", tmp_path / "run")[0] == 0
    code, text = run("sample", "a dog " * 40, "--student", tmp_path / "run", "--out", tmp_path / "pictures")
    assert code == 0 and "Warning:" in text and "is longer than CLIP reads (24 tokens)" in text
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_ctrl_c_saves_and_the_run_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    long = recipe.override(["train.iterations=100000", "train.checkpoint_every=100000"])
    process = run_as_a_process(long, tmp_path / "run")
    wait_for_iteration(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "SIGINT" in output
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_generate_goes_on_and_does_not_depend_on_the_batch_size(
    run, recipe_file: str, tmp_path: Path
) -> None:
    from scalewise.data import LatentSet

    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    for name, batch in (("one", 1), ("many", 4)):
        code, _ = run(
            "generate",
            recipe_file,
            "--prompts",
            tmp_path / "p.txt",
            "--count",
            6,
            "--batch",
            batch,
            "--out",
            tmp_path / name,
        )
        assert code == 0
    one, many = (LatentSet.open(tmp_path / name) for name in ("one", "many"))
    for scale in one.scales:
        difference = (one.latents(range(6), scale) - many.latents(range(6), scale)).abs().max()
        assert difference < 5e-3, "float16 rounding only"
    code, text = run(
        "generate",
        recipe_file,
        "--prompts",
        tmp_path / "p.txt",
        "--count",
        6,
        "--seed",
        1,
        "--out",
        tmp_path / "one",
    )
    assert code == 1 and "seed" in text


def test_an_image_folder_trains_as_well(run, recipe_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (suffix, size) in enumerate(
        [("png", (40, 24)), ("jpeg", (24, 40)), ("webp", (30, 30)), ("bmp", (20, 20))]
    ):
        Image.new("RGB", size, (40 * i, 200 - 40 * i, 99)).save(folder / f"{i}.{suffix}")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    (folder / "broken.png").write_bytes(b"not an image")
    code, text = run(
        "distill", recipe_file, f"data.path={folder}", "train.iterations=2", "--out", tmp_path / "run"
    )
    assert code == 0 and "broken.png" in text
    assert (tmp_path / "run" / "student.safetensors").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_the_student_loads_in_a_stock_pipeline(run, recipe: Recipe, recipe_file: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    assert run("distill", recipe_file, "train.iterations=1", "--out", tmp_path / "run")[0] == 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(recipe.model.base)
    pipeline.load_lora_weights(tmp_path / "run", weight_name="student.safetensors")
    config = next(iter(pipeline.transformer.peft_config.values()))
    assert config.r == 4 and config.lora_alpha == 4
    assert len(pipeline.get_active_adapters()) == 1


def test_help_works_without_a_home_or_a_terminal(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "TERM")}
    done = subprocess.run(
        [sys.executable, "-m", "scalewise", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "distill" in done.stdout


def test_a_student_is_exported_for_others_and_sampled_from_their_file(run, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run"
    list(runs.distill(recipe.override(["train.iterations=1"]), path, silent))
    code, text = run("export", path, "kohya.safetensors", "--form", "kohya")
    assert code == 0 and "weights written to kohya.safetensors" in text
    for student in (path, "kohya.safetensors"):
        code, text = run("sample", "a dog", "--student", student, "--out", f"out-{Path(student).name}")
        assert code == 0, text
    pictures = [np.asarray(Image.open(next((tmp_path / f"out-{n}").iterdir()))) for n in
                ("run", "kohya.safetensors")]  # fmt: skip
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1  # half precision is all that differs

    code, text = run("export", "kohya.safetensors", "again.safetensors")
    assert code == 0, text
    with (
        safe_open("again.safetensors", "pt") as again,
        safe_open(path / "student.safetensors", "pt") as first,
    ):
        assert set(again.keys()) == set(first.keys())

    # Stripped of its metadata it is a file of others: base and schedule have to be given.
    with safe_open("kohya.safetensors", "pt") as opened:
        save_file({k: opened.get_tensor(k) for k in opened.keys()}, "bare.safetensors")  # noqa: SIM118
    code, text = run("sample", "a dog", "--student", "bare.safetensors")
    assert code == 1 and "has no schedule in its metadata" in text and "scalewise recipes" in text
    schedule = str(recipe.schedule.build())
    code, text = run("sample", "a dog", "--student", "bare.safetensors", "--schedule", schedule)
    assert code == 1 and "does not record its base model; give it with --base" in text
    code, text = run("sample", "a dog", "--student", "bare.safetensors", "--schedule", schedule, "--base",
                     recipe.model.base, "--out", "bare", "--weight", "1")  # fmt: skip
    assert code == 0, text
    found = np.asarray(Image.open(next((tmp_path / "bare").iterdir())))
    assert np.abs(found.astype(int) - pictures[1]).max() <= 1


def test_a_plan_says_what_fits_and_what_to_switch_on(run, recipe_file):
    code, text = run("plan", recipe_file, "--memory", "1", "--gpus", "2")
    assert code == 0
    expected = ("tokens", "TFLOPs", "x over the teacher", "MMD alone", "frozen base (float32)",
                "batch 4 x 2 processes: 8 samples per update", "All four commands fit")  # fmt: skip
    for words in expected:
        assert words in text, (words, text)


def test_metrics_are_listed_with_their_weights(run) -> None:
    code, text = run("metrics")
    assert code == 0 and all(
        name in text for name in ("fid", "pickscore", "geneval", "vbench", "given by NAME=WEIGHTS")
    )


def test_evaluate_takes_a_metric_prompts_of_geneval_and_several_samples_each(
    run, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalewise.metrics.geneval import geneval_prompts

    out = tmp_path / "evaluated"
    metric = f"pickscore={mini.SCORER}"
    code, text = run(
        "evaluate", recipe_file, "undistilled", "--prompts", "geneval", "--count", 4, "--each", 2,
        "--scorer", mini.SCORER, "--metric", metric, "--no-speed", "--out", out,
    )  # fmt: skip
    assert code == 0, text
    [row] = json.loads((out / "figures.json").read_text())
    assert row["images"] == 8 and {"pickscore", "clip_score", "diversity"} <= set(row["values"])
    # The same model judges both: its PickScore is its CLIP score.
    assert row["values"]["pickscore"][0] == pytest.approx(row["values"]["clip_score"][0], abs=1e-3)
    assert len(list((out / "pictures" / "undistilled").glob("*.png"))) == 8
    assert len(geneval_prompts(4)) == 4
    # The pictures are kept, and judged once more without the model being loaded.
    monkeypatch.setattr(setup, "load", lambda *_: pytest.fail("the model was loaded"))
    code, text = run(
        "evaluate", recipe_file, f"folder:{out / 'pictures' / 'undistilled'}", "--prompts", "geneval",
        "--count", 4, "--each", 2, "--metric", metric, "--out", tmp_path / "again",
    )  # fmt: skip
    assert code == 0, text
    [again] = json.loads((tmp_path / "again" / "figures.json").read_text())
    assert again["values"]["pickscore"] == pytest.approx(row["values"]["pickscore"])


@pytest.mark.parametrize(("options", "message"), [
    (["--metric", "beauty"], "Unknown metric 'beauty'"),
    (["--metric", "fd"], "pass a folder of them with --reference"),
    (["--metric", "vbench"], "is for videos, but this model generates images"),
    (["--metric", "hpsv2=nowhere"], "Cannot load a CLIP model from 'nowhere'"),
    (["--metric", "geneval=nowhere", "--prompts", "geneval"], "nowhere"),
    (["--scorer", "nowhere"], "Cannot load a CLIP model from 'nowhere'"),
    (["--metric", "pickscore", "--reference", "nowhere"], "There is no folder nowhere"),
    (["--metric", "spectrum=weights", "--reference", "."], "spectrum has no weights to choose; remove"),
    (["--count", "5"], "There are only 4 prompts, not 5; reduce --count"),
    (["--prompts", "."], "The prompt file . cannot be read (Is a directory); give another"),
    (["--metric", "spectrum", "--reference", ".", "///=undistilled"], "gives no folder name for its images"),
    (["--out", "pyproject.toml/deeper"], "pyproject.toml is a file. Choose another --out"),
])  # fmt: skip
def test_what_cannot_be_judged_is_said_before_anything_is_drawn(
    run, recipe_file: str, options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na house\nthe moon\n")
    code, text = run(
        "evaluate", recipe_file, "undistilled", "--prompts", tmp_path / "prompts.txt", "--out",
        tmp_path / "out", *options,
    )  # fmt: skip
    assert code == 1 and message in text and not (tmp_path / "out").exists()


def test_a_set_stores_the_full_scale_alone_and_the_option_for_others_says_so(
    run, recipe_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    (tmp_path / "prompts.txt").write_text("a dog\n")
    common = ("generate", recipe_file, "--prompts", tmp_path / "prompts.txt", "--count", 2, "--out", out)
    code, text = run(*common, "--scale", "2", "--scale", "6")
    assert code == 1 and "--scale 2 is no longer needed: datasets store the full scale only" in text
    assert not out.exists()
    code, text = run(*common)
    assert code == 0 and f"2 samples in {out}, stored at 8x8; other scales are derived on first use" in text
    assert [str(s) for s in LatentSet.open(out).scales] == ["8x8"]
    code, text = run(*common, "--store", "int8")
    assert code == 1 and "dtype is 'float16' in the stored dataset and 'int8' now" in text
    code, text = run(*common, "--store", "int4")
    assert code == 1 and "--store 'int4' is unknown; choose one of float16, int8" in text

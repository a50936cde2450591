"""What would give wrong figures, or would fail after an hour of drawing, is refused before it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_judging import clip_folder, dino_folder, pictures, reference_folder  # noqa: F401

from scalewise import mini
from scalewise.cli import main
from scalewise.cli.inputs import evaluation_prompts
from scalewise.cli.run_making import free_path
from scalewise.common import console
from scalewise.common.images import read_image, save_image, to_bytes
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.data.image_folder import load_pixels, scan_images
from scalewise.evaluation import compare
from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.samplers import check_fit, parse_sampler
from scalewise.evaluation.scoring import ScoringOptions, load_scorers
from scalewise.evaluation.stored_images import SamplerError, read_folder
from scalewise.metrics import ClipScorer, measure
from scalewise.metrics.base import ImageFeatures
from scalewise.models import Flux
from scalewise.models.lora import StudentError
from scalewise.pipelines import read_schedule


def test_statistics_of_another_model_under_the_same_path_are_taken_anew(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    model, means = tmp_path / "model", []
    shutil.copytree(dino_folder, model)
    asked = ScoringOptions(metrics=(f"fd={model}",), reference=reference_folder(tmp_path / "real"))
    for factor in (1.0, 3.0):
        weights = {k: factor * v for k, v in load_file(dino_folder / "model.safetensors").items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        judge = load_scorers(find_recipe("mini"), asked)
        assert judge.real is not None
        means.append(judge.real["fd"].mean)
    assert not torch.allclose(*means)
    assert len(list((tmp_path / "cache" / "statistics").glob("fd-*.safetensors"))) == 2


def test_a_clip_model_that_would_judge_by_chance_is_refused(
    clip_folder: Path, dino_folder: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=r"Cannot load a CLIP model .*its model type is 'dinov2'"):
        shutil.copytree(clip_folder, tmp_path / "other")
        shutil.copy(dino_folder / "config.json", tmp_path / "other")
        ClipScorer.load(tmp_path / "other")

    def changed(name: str) -> Path:
        return Path(shutil.copytree(clip_folder, tmp_path / name))

    lacking = changed("lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is missing 1 weights of CLIPModel, for example visual_projection"):
        ClipScorer.load(lacking)
    speechless = changed("speechless")
    for file in speechless.glob("*token*"):
        file.unlink()
    for name in ("vocab.json", "merges.txt"):
        (speechless / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"tokenizer|Cannot load a CLIP model"):
        ClipScorer.load(speechless)
    torn = changed("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match="Cannot load a CLIP model from"):
        ClipScorer.load(torn)
    odd = changed("odd")
    (odd / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Cannot load a CLIP model from .*image_mean"):
        ClipScorer.load(odd)


def seen_by(geneval: torch.Tensor) -> ImageFeatures:
    nothing = torch.full_like(geneval, torch.nan)
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    looks = {f"geneval_{task}": nothing for task in tasks}
    looks |= {"geneval_counting": geneval, "geneval": geneval}
    return ImageFeatures(None, torch.arange(len(geneval)), None, outputs=looks)


@pytest.mark.parametrize("known", [1, 3, 19, 20])
def test_a_share_has_an_interval_at_every_count(known: int) -> None:
    values = torch.full((20,), torch.nan)
    values[:known] = 1.0
    ours, theirs = seen_by(values), seen_by(0 * values)
    z2 = 1.959964**2
    assert measure(ours)["geneval_counting"].to_list() == pytest.approx([1, known / (known + z2), 1])
    for name in ("geneval", "geneval_counting"):
        row = Row("a", "folder", "", 20, {}, "b", measure(ours, against=theirs))
        assert row.differences[name].value == 1.0
        assert row.verdict(name) == ("" if known == 1 else "better")  # 1 - 1.12 lies below 0, 1 - 0.79 above


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"] * 9, ScoringOptions(), "A comparison needs at least 2 different prompts, got 1"),
        (
            ["a", "b", "c", "d"],
            ScoringOptions(metrics=("geneval=x,y",)),
            "none of the 4 prompts is one",
        ),
    ],
)
def test_prompts_that_give_no_figure_are_refused_before_anything_is_loaded(
    texts: list[str], options: ScoringOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_scorers", lambda *_, **__: pytest.fail("a judge was loaded"))
    with pytest.raises(ValueError, match=message):
        compare.compare(
            find_recipe("mini"), ["teacher"], texts, console.progress, out=tmp_path, scoring=options
        )


def test_one_real_picture_is_refused(tmp_path: Path) -> None:
    save_image(pictures(1)[0], tmp_path / "0.png")
    with pytest.raises(RecipeError, match=r"needs at least 2 real images, but .* has 1"):
        load_scorers(find_recipe("mini"), ScoringOptions(reference=tmp_path))


def test_tasks_of_geneval_that_no_prompt_belongs_to_are_warned_of() -> None:
    from scalewise.metrics import EXTRAS

    check = EXTRAS["geneval"].check
    assert check is not None
    with pytest.warns(UserWarning, match=r"tasks two_object, counting, .*; the mean is over 1 of 6 tasks"):
        check(["a photo of a bench", "a photo of an apple"])


def test_a_student_of_another_model_is_refused_before_anything_is_drawn() -> None:
    recipe = find_recipe("mini")
    with pytest.raises(StudentError, match="does not fit this base"):
        check_fit(Flux.tiny(), [parse_sampler("teacher", recipe), parse_sampler("student:mini", recipe)])


def compared(out: Path, contenders: list[str], texts: list[str], **options: object) -> list[Row]:
    found = compare.compare(
        find_recipe("mini"), contenders, texts, console.progress, out=out, speed=False, **options
    )  # type: ignore[arg-type]
    return [result.row for result in found.results]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Six numbered pictures."""
    (tmp_path / "drawn").mkdir()
    for number, picture in enumerate(pictures(6)):
        save_image(picture, tmp_path / "drawn" / f"{number}.png")
    return tmp_path / "drawn"


def test_a_comparison_leaves_nothing_of_an_earlier_one(drawn: Path, tmp_path: Path) -> None:
    texts, out = mini.captions("test")[:6], tmp_path / "out"
    compared(out, [f"a=folder:{drawn}"], texts)
    (out / "timings.json").write_text("[]")
    compared(out, [f"a=folder:{drawn}"], texts[:4])
    kept = out / "pictures" / "a"
    assert sorted(p.name for p in kept.iterdir()) == ["0.png", "1.png", "2.png", "3.png", "prompts.json"]
    assert not (out / "timings.json").exists()
    assert json.loads((kept / "prompts.json").read_text())["captions"] == texts[:4]


def test_kept_pictures_are_not_judged_by_other_prompts(drawn: Path, tmp_path: Path) -> None:
    texts = mini.captions("test")[:6]
    compared(tmp_path, [f"a=folder:{drawn}"], texts)
    again = compared(tmp_path, [f"folder:{tmp_path / 'pictures' / 'a'}"], texts[:5])
    assert again[0].images == 5
    assert len(list((tmp_path / "pictures" / "a").glob("*.png"))) == 6, "what was read stays as it was"
    with pytest.raises(SamplerError, match=r"0\.png was generated for .* but is to be scored with"):
        compared(tmp_path, [f"folder:{tmp_path / 'pictures' / 'a'}"], texts[1:])


@pytest.mark.parametrize("text", ["[1, 2]", "{}", "{broken"])
def test_a_file_of_others_beside_pictures_is_named(text: str, drawn: Path, tmp_path: Path) -> None:
    (drawn / "prompts.json").write_text(text)
    with pytest.raises(SamplerError, match=r"prompts\.json does not contain the captions and seeds"):
        compared(tmp_path, [f"folder:{drawn}"], mini.captions("test")[:6])


def test_names_that_share_a_folder_are_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match="'a\\+b' and 'a-b' would go into the same folder"):
        compared(tmp_path, [f"a+b=folder:{drawn}", f"a-b=folder:{drawn}"], mini.captions("test")[:4])


def test_what_was_judged_is_kept_when_the_next_one_fails(drawn: Path, tmp_path: Path) -> None:
    texts = mini.captions("test")[:6]
    (tmp_path / "few").mkdir()
    shutil.copy(drawn / "0.png", tmp_path / "few")
    with pytest.raises(SamplerError, match="too few images"):
        compared(tmp_path / "out", [f"a=folder:{drawn}", f"b=folder:{tmp_path / 'few'}"], texts)
    names = [row["name"] for row in json.loads((tmp_path / "out" / "figures.json").read_text())]
    assert names[0] == "a" and "b" not in names


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "turned"])
def test_a_contenders_pictures_are_read_as_references_are(mode: str, tmp_path: Path) -> None:
    colours = pictures(1, (12, 8))[0]
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([colours, 255 - colours[..., 0]]))
        image.save(tmp_path / "0.png")
    elif mode == "I;16":
        Image.fromarray(257 * colours[..., 0].astype(np.uint16)).save(tmp_path / "0.png")
    else:
        image = Image.fromarray(colours)
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by a quarter
        image.save(tmp_path / "0.png", exif=exif)
    [entry], _ = scan_images(tmp_path, captions=False)
    expected = to_bytes(load_pixels(entry, (entry.height, entry.width))[None])[0]
    found = read_image(tmp_path / "0.png")
    assert np.array_equal(found, expected) and found.std() > 5
    contender = parse_sampler(f"folder:{tmp_path}", find_recipe("mini"))
    assert np.array_equal(read_folder(contender.path, ["a"])[0], expected)


def test_all_prompts_of_a_file_are_taken_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(600)))
    assert len(evaluation_prompts(file, "mini", None)) == 600
    assert evaluation_prompts(file, "mini", 5) == [f"prompt {i}" for i in range(5)]
    assert len(evaluation_prompts(Path("geneval"), "mini", None)) == 553
    assert evaluation_prompts(None, "mini", None) == mini.captions("test")


def test_pictures_are_not_overwritten(tmp_path: Path) -> None:
    for expected in ("a.png", "a-2.png", "a-3.png"):
        path = free_path(tmp_path / "a.png")
        assert path.name == expected
        path.touch()


@pytest.mark.parametrize("text", ["1000@64 8..@80", "1000@64 600@8x", "1000@"])
def test_a_schedule_that_cannot_be_read_is_said_so(text: str) -> None:
    with pytest.raises(ValueError, match="Cannot parse the schedule"):
        read_schedule(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "training-cost", "--seed", "0"], "training-cost only accepts --rounds"),
        (["study", "losses", "--rounds", "2"], "--rounds only applies to training-cost"),
        (["study", "losses", "--count", "500"], "There are only 299 held-out captions, not 500"),
        (
            ["bench", "mini", "--training", "--set", "model.dtype=float16"],
            "model.dtype=float16 is only for sampling",
        ),
        (["bench", "mini", "model.dtype=float16", "--training"], "model.dtype=float16 is only for sampling"),
        (["evaluate", "mini", "model.base=x"], "No sampler given"),
        (["evaluate", "mini", "teacher", "train.iteration=5"], "did you mean 'train.iterations'"),
        (["bench", "mini", "teacher", "loss.gan=5"], "'loss.gan' is a group of keys"),
        (["spectrum", "mini", "--data", "pics #1"], "pics #1"),
    ],
)
def test_options_that_would_be_ignored_or_misread_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", "out"])
    printed = capfd.readouterr()
    assert ended.value.code != 0
    assert message in " ".join((printed.out + printed.err).replace("│", " ").split())

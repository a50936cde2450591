"""Comparing contenders: how they are named, what they draw, and that the base stays untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from scalewise.config.recipe import Recipe
from scalewise.evaluation import evaluate
from scalewise.evaluation.samplers import (
    Prompts,
    enter,
    generate_images,
    generate_steps,
    parse_sampler,
    parse_samplers,
)
from scalewise.evaluation.scoring import Scorers
from scalewise.evaluation.stored_images import SamplerError
from scalewise.evaluation.timing import bench
from scalewise.method.backbone import Backbone
from scalewise.method.rng import SampleNoise
from scalewise.metrics import ClipScorer
from scalewise.models import SD3, tiny
from scalewise.models.lora import StudentError, fused, load_student, save_student

PROMPTS = Prompts.of(["a cat", "a red dog", "the moon", "an old house"], each=2)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.from_mapping({
        "name": "tiny", "schedule": {"timesteps": [1000, 800, 500], "scales": ["4", "6", "8"]},
        "teacher": {"steps": 3, "guidance": 3.0}, "lora": {"rank": 2},
    })  # fmt: skip


def make_student(path: Path, recipe: Recipe, seed: int = 0) -> Path:
    """Write a student whose adapter changes what is drawn."""
    backbone = Backbone(SD3.tiny(), ["student"], rank=recipe.lora.rank, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        k: 0.3 * torch.randn(v.shape, generator=draw) for k, v in backbone.parameters("student").items()
    }
    save_student(path, tensors, recipe, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    tokenizer = tiny.clip_and_t5(joint_width=16)["tokenizer"]
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ClipScorer(
            CLIPModel(CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)),
            tokenizer,
        )


def test_every_form_of_a_contender_is_read(recipe: Recipe, tmp_path: Path) -> None:
    file = make_student(tmp_path / "student.safetensors", recipe)
    texts = [
        "teacher",
        "teacher:4",
        "undistilled",
        "undistilled:full",
        f"student:{tmp_path}",
        f"folder:{tmp_path}",
    ]
    teacher, short, bare, full, student, folder = parse_samplers(texts, recipe)
    assert (teacher.name, teacher.steps, teacher.guidance) == ("teacher", 3, 3.0)
    assert (short.name, short.steps, short.guidance) == ("teacher, 4 steps", 4, 3.0)
    assert (bare.steps, bare.guidance, str(bare.schedule)) == (3, 1.0, "1000@4x4 800@6x6 500@8x8")
    assert str(full.schedule) == "1000@8x8 800@8x8 500@8x8"
    assert (student.kind, student.schedule) == ("student", load_student(file).schedule)
    assert (folder.kind, folder.path) == ("folder", tmp_path)
    assert [c.about for c in (teacher, bare, full)] == [
        "3 steps at 8x8, guidance 3", "3 steps at 4x4 → 6x6 → 8x8", "3 steps at 8x8",
    ]  # fmt: skip


def test_a_label_before_the_form_becomes_the_name_and_an_equals_sign_in_a_path_does_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    assert parse_sampler("few steps=teacher:2", recipe).name == "few steps"
    odd = tmp_path / "lr=1"
    odd.mkdir()
    assert parse_sampler(f"folder:{odd}", recipe).name == "lr=1"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("techer", "write teacher, teacher:STEPS, undistilled"),
        ("teacher:four", "needs a number of steps, as in teacher:4"),
        ("teacher:0", "needs a number of steps"),
        ("undistilled:half", "write undistilled or undistilled:full"),
        ("student", "as in student:runs/mini"),
        ("folder:/nowhere", "does not exist; give a folder of images"),
    ],
)
def test_an_unreadable_contender_is_refused_with_what_to_write_instead(
    text: str, remedy: str, recipe: Recipe
) -> None:
    with pytest.raises(SamplerError, match=remedy):
        parse_sampler(text, recipe)


def test_a_missing_student_is_reported_before_anything_is_drawn(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no student at"):
        parse_sampler(f"student:{tmp_path / 'gone.safetensors'}", recipe)


def test_two_contenders_of_one_name_are_refused(recipe: Recipe) -> None:
    with pytest.raises(SamplerError, match="label them, as in mine=student:PATH"):
        parse_samplers(["teacher", "teacher"], recipe)


@pytest.mark.parametrize("form", ["teacher", "undistilled", "student"])
def test_image_i_is_the_same_at_any_batch_size(form: str, model: SD3, recipe: Recipe, tmp_path: Path) -> None:
    make_student(tmp_path / "student.safetensors", recipe)
    contender = parse_sampler(f"student:{tmp_path}" if form == "student" else form, recipe)
    together = generate_images(model, contender, PROMPTS, batch=8)
    assert together.shape == (8, 16, 16, 3)
    assert together.dtype == np.uint8
    apart = generate_images(model, contender, PROMPTS, batch=3)
    assert np.abs(together.astype(int) - apart).max() <= 1  # rounding may fall to either side
    assert not np.array_equal(together[0], together[1])  # one prompt, two seeds


def test_the_undistilled_contender_and_a_student_whose_adapter_is_zero_draw_the_same(
    model: SD3, recipe: Recipe, tmp_path: Path
) -> None:
    zero = {k: v.detach() for k, v in Backbone(SD3.tiny(), ["student"], rank=2).parameters("student").items()}
    save_student(tmp_path / "student.safetensors", zero, recipe, dtype=torch.float32)
    student = parse_sampler(f"student:{tmp_path}", recipe)
    bare = parse_sampler("undistilled", recipe)
    assert np.array_equal(generate_images(model, student, PROMPTS), generate_images(model, bare, PROMPTS))


def test_the_base_is_bit_identical_after_students_of_two_ranks_have_drawn(
    model: SD3, recipe: Recipe, tmp_path: Path
) -> None:
    def answer() -> torch.Tensor:
        cond = model.encode_prompts(["a cat"])
        x_t = SampleNoise([1])((4, 8, 8))
        with torch.no_grad():
            return model.predict(x_t, torch.tensor([700.0]), cond)

    before, names = answer(), [name for name, _ in model.denoiser.named_modules()]
    teacher = parse_sampler("teacher", recipe)
    first = generate_images(model, teacher, PROMPTS)
    pictures = []
    for rank in (2, 3):
        other = recipe.override([f"lora.rank={rank}"])
        make_student(tmp_path / str(rank) / "student.safetensors", other, seed=rank)
        pictures.append(
            generate_images(model, parse_sampler(f"student:{tmp_path / str(rank)}", recipe), PROMPTS)
        )
    assert not np.array_equal(*pictures)
    assert [name for name, _ in model.denoiser.named_modules()] == names
    assert torch.equal(answer(), before)
    assert np.array_equal(generate_images(model, teacher, PROMPTS), first)


def test_a_backbone_in_training_keeps_its_adapters_while_a_student_is_evaluated(
    recipe: Recipe, tmp_path: Path
) -> None:
    make_student(tmp_path / "student.safetensors", recipe)
    backbone = Backbone(SD3.tiny(), ["student", "fake"], rank=4)
    for parameter in backbone.parameters("student").values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x_t, t, cond = (
        SampleNoise([1])((4, 8, 8)),
        torch.tensor([700.0]),
        backbone.model.encode_prompts(["a cat"]),
    )
    before = {role: backbone.predict_x0(x_t, t, cond, role=role) for role in ("teacher", "student", "fake")}
    student = parse_sampler(f"student:{tmp_path}", recipe)
    drawn = generate_images(backbone.model, student, PROMPTS)
    for role, x0 in before.items():
        assert torch.equal(backbone.predict_x0(x_t, t, cond, role=role), x0)
    assert np.array_equal(
        drawn, generate_images(SD3.tiny(), parse_sampler(f"student:{tmp_path}", recipe), PROMPTS)
    )


def test_a_student_that_does_not_fit_leaves_the_base_as_it_was(
    model: SD3, recipe: Recipe, tmp_path: Path
) -> None:
    student = load_student(make_student(tmp_path / "student.safetensors", recipe))
    names = [name for name, _ in model.denoiser.named_modules()]
    broken = replace(student, tensors=dict(list(student.tensors.items())[1:]))
    with pytest.raises(ValueError, match="incomplete: 1 layers have only one"), fused(model.denoiser, broken):
        pass
    assert [name for name, _ in model.denoiser.named_modules()] == names


def test_the_steps_of_a_contender_grow_with_its_scales_and_end_in_its_picture(
    model: SD3, recipe: Recipe
) -> None:
    bare = parse_sampler("undistilled", recipe)
    steps = generate_steps(model, bare, PROMPTS[:2])
    assert [step.shape for step in steps] == [(2, 8, 8, 3), (2, 12, 12, 3), (2, 16, 16, 3)]
    assert np.array_equal(steps[-1], generate_images(model, bare, PROMPTS[:2]))


def test_pictures_of_a_folder_are_matched_by_number_and_else_by_caption(
    recipe: Recipe, tmp_path: Path
) -> None:
    prompts = Prompts.of(["a cat", "a red dog"])
    for folder, names in (("numbers", ("00000", "1")), ("captions", ("a cat", "a red dog"))):
        (tmp_path / folder).mkdir()
        for shade, name in zip((10, 200), names, strict=True):
            Image.new("RGB", (16, 16), (shade,) * 3).save(tmp_path / folder / f"{name}.png")
        contender = parse_sampler(f"folder:{tmp_path / folder}", recipe)
        images = generate_images(SD3.tiny(), contender, prompts)
        assert images[:, 0, 0, 0].tolist() == [10, 200]
    with pytest.raises(SamplerError, match="too few images with the caption 'the moon'"):
        generate_images(SD3.tiny(), contender, Prompts.of(["the moon"]))
    Image.new("RGB", (16, 20)).save(tmp_path / "numbers" / "1.png")
    with pytest.raises(SamplerError, match="16x16 and 16x20 pixels; resize them to one size"):
        generate_images(SD3.tiny(), parse_sampler(f"folder:{tmp_path / 'numbers'}", recipe), prompts)


def test_a_picture_that_cannot_be_read_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    from scalewise.common import console
    from scalewise.config.presets import find_recipe
    from scalewise.evaluation import compare

    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (128, 128), "red").save(folder / f"{number}.png")
    Image.new("RGB", (8, 8)).save(folder / "²³.png")  # digits, but no number
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SamplerError, match=r"Cannot read .*2\.png \(.*; replace it"):
        compare.compare(
            find_recipe("mini"), ["undistilled", f"folder:{folder}"], ["a", "b", "c", "d"], console.progress,
            out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out" / "pictures").exists()


def test_all_contenders_are_judged_on_the_same_prompts_and_compared_with_the_first(
    model: SD3, recipe: Recipe, scorer: ClipScorer, tmp_path: Path
) -> None:
    make_student(tmp_path / "student.safetensors", recipe)
    contenders = parse_samplers(["teacher", "undistilled", f"student:{tmp_path}"], recipe)
    real = scorer.embed_pixels(torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    judge = Scorers(scorer, real, [f"caption {i}" for i in range(60)])
    drawn = dict[str, np.ndarray]()
    results = evaluate.evaluate(
        model, contenders, PROMPTS, judge, batch=4,
        keep=lambda contender, numbers, images: drawn.update({contender.name: images[list(numbers)]}),
    )  # fmt: skip
    rows = [result.row for result in results]
    assert [row.name for row in rows] == ["teacher", "undistilled", "student"]
    for row in rows:
        assert list(row.values) == ["frechet", "clip_score", "prompt_match", "diversity"]
        assert row.images == 8
    assert rows[0].differences == {}
    assert rows[2].compared_with == "teacher"
    difference = rows[2].values["clip_score"].value - rows[0].values["clip_score"].value
    assert rows[2].differences["clip_score"].value == pytest.approx(difference)
    assert drawn["undistilled"].shape == (8, 16, 16, 3)


def test_figures_are_stored_and_read_back_and_the_table_says_what_is_better_and_worse(tmp_path: Path) -> None:
    interval = evaluate.Interval
    teacher = evaluate.Row("teacher", "teacher", "28 steps", 200, {"frechet": interval(0.2, 0.15, 0.25)})
    student = evaluate.Row(
        "student", "student", "4 steps", 200,
        {"frechet": interval(0.1, 0.05, 0.15), "prompt_match": interval(0.5, 0.4, 0.6)}, "teacher",
        {"frechet": interval(-0.1, -0.15, -0.05), "prompt_match": interval(-0.2, -0.3, -0.1)},
    )  # fmt: skip
    evaluate.save_rows([teacher, student], tmp_path)
    assert evaluate.load_rows(tmp_path) == [teacher, student]
    lines = (tmp_path / "figures.md").read_text().splitlines()
    assert lines[0] == "|  | settings | images | Fréchet distance ↓ | Prompt match ↑ |"
    assert lines[2] == "| teacher | 28 steps | 200 | 0.200 [0.150, 0.250] | - |"
    assert (
        lines[3] == "| student | 4 steps | 200 | 0.100 [0.050, 0.150] better | 50.0% [40.0%, 60.0%] worse |"
    )
    unsure = replace(student, differences={"frechet": interval(-0.1, -0.2, 0.01)})
    assert unsure.verdict("frechet") == ""


def test_a_contender_is_timed_by_part_from_caption_to_pixels(
    model: SD3, recipe: Recipe, tmp_path: Path
) -> None:
    make_student(tmp_path / "student.safetensors", recipe)
    contenders = parse_samplers(["teacher", f"student:{tmp_path}"], recipe)
    subjects = [evaluate.timed_sampler(model, contender, "a cat") for contender in contenders]
    timings = bench(subjects, batches=(1, 2), rounds=1)
    assert [(t.name, t.batch) for t in timings] == [
        ("teacher", 1),
        ("student", 1),
        ("teacher", 2),
        ("student", 2),
    ]
    for timing in timings:
        assert list(timing.parts) == ["text", "denoiser", "vae", "total"]
        assert all(spread.value > 0 for spread in timing.parts.values())
    assert timings[1].speedup.keys() == {"text", "denoiser", "vae", "total"}


def test_a_folder_cannot_be_entered(model: SD3, recipe: Recipe, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="cannot sample"),
        enter(model, parse_sampler(f"folder:{tmp_path}", recipe)),
    ):
        pass

"""Every family through an iteration, through compiled blocks, and from the command line to a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from separate import (
    BLOCK,
    LOSSES,
    draw,
    fake_gradients,
    gradients,
    joint_student_loss,
    largest_error,
    make_head,
    own_gradients,
    separate_model,
    streams,
)

import scalewise
from scalewise import mini, models
from scalewise.cli import main
from scalewise.common import console
from scalewise.common.images import read_image
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.evaluation import compare
from scalewise.evaluation import samplers as drawing
from scalewise.evaluation.samplers import Prompts, parse_sampler
from scalewise.evaluation.scoring import ScoringOptions
from scalewise.evaluation.stored_images import read_folder
from scalewise.method.backbone import Backbone
from scalewise.method.distill import Batch, DistillStep
from scalewise.method.loss_config import LossRecipe
from scalewise.method.scales import ScaleSchedule
from scalewise.metrics import ClipScorer
from scalewise.models import SD3, SDXL, ModelError, PipelineAdapter, Wan
from scalewise.models.lora import Student, write_student
from scalewise.training import setup


@pytest.fixture(params=models.FAMILIES)
def family(request) -> type[PipelineAdapter]:
    return models.FAMILIES[request.param]


def make_step(family: type[PipelineAdapter], name: str, *, checkpointing: bool = False) -> DistillStep:
    """A step whose adapters and head are the same in every call."""
    block = 0 if family is SDXL else BLOCK
    loss = LossRecipe.model_validate(LOSSES[name].model_dump() | {"feature_block": block})
    backbone = Backbone(family.tiny(), ["student", *(["fake"] if loss.needs_fake else [])], rank=4)
    for number, role in enumerate(backbone.roles.names):
        for i, parameter in enumerate(backbone.parameters(role).values()):
            parameter.data = 0.2 * draw(*parameter.shape, seed=1000 * number + i)
    if checkpointing:
        backbone.enable_checkpointing()
    return DistillStep(backbone, loss, head=make_head(backbone, loss))


def make_batch(model: PipelineAdapter) -> Batch:
    """Two pairs of latents, 8 x 4 and of five frames for videos."""
    shape = (2, 4, 5, 8, 4) if model.video else (2, 4, 8, 4)
    cond, uncond = model.encode_prompts(["a red apple", "a dog"]), model.encode_prompts([""])
    return Batch(draw(*shape), 0.8 * draw(*shape, seed=1), cond, uncond, t=737.0558, index=2)


@pytest.mark.parametrize("name", ["paper", "released", "mmd alone"])
def test_an_iteration_of_every_family_has_the_gradients_of_separate_models(family, name):
    step = make_step(family, name)
    batch, loss = make_batch(step.backbone.model), step.loss
    student, teacher = separate_model(step, "student"), separate_model(step, None)
    fake = separate_model(step, "fake") if loss.needs_fake else None
    joint_student_loss(loss, batch, streams(3, 2), student, fake, teacher, step.head).backward()
    step.student_step(batch, streams(3, 2))
    assert largest_error(gradients(step, "student"), own_gradients(student)) < 1e-4
    if loss.needs_fake:
        assert all(gradient is None for gradient in gradients(step, "fake").values())
        expected, head_gradients = fake_gradients(step, batch, streams(4, 2))
        step.fake_step(batch, streams(4, 2))
        assert largest_error(gradients(step, "fake"), expected) < 1e-4
        for parameter, gradient in zip(step.head.parameters(), head_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compute", ["student_step", "fake_step"])
def test_gradient_checkpointing_changes_no_gradient_of_any_family(family, compute):
    plain, saving = (make_step(family, "paper", checkpointing=on) for on in (False, True))
    batch = make_batch(plain.backbone.model)
    assert getattr(plain, compute)(batch, streams(3, 2)) == getattr(saving, compute)(batch, streams(3, 2))
    role = compute.removesuffix("_step")
    assert largest_error(gradients(saving, role), gradients(plain, role)) < 1e-6


def load_quietly(family: type[PipelineAdapter], folder: Path, **options: Any) -> Any:
    """A pipeline of the family's miniature with a random student."""
    family.tiny().save(folder)
    roles = Backbone(family.tiny(), ["student"], rank=4).roles.state("student")
    weights = {name: 0.2 * draw(*value.shape, seed=i) for i, (name, value) in enumerate(roles.items())}
    schedule = ScaleSchedule.parse("1000@2x4x4 600@3x8x8" if family.video else "1000@4x4 600@8x8")
    student = Student(weights, schedule, 4, 4.0, str(folder), {}, family.denoiser_name)
    write_student(folder / "student.safetensors", student)
    pipe = scalewise.load(folder, student=folder / "student.safetensors", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_compiled_blocks_draw_the_same(family, tmp_path):
    pipe = load_quietly(family, tmp_path)
    expected = pipe(["a dog"], seed=0, output_type="latent")[0]
    graphs = []

    def backend(graph, _inputs):  # without code generation it takes seconds, not minutes
        graphs.append(graph)
        return graph.forward

    pipe.compile_blocks(fullgraph=True, backend=backend)
    found = pipe(["a dog"], seed=0, output_type="latent")[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs


def test_float16_draws_about_the_same(family, tmp_path):
    exact = load_quietly(family, tmp_path)(["a dog"], seed=0, output_type="latent")[0]
    rough = load_quietly(family, tmp_path, dtype=torch.float16)(["a dog"], seed=0, output_type="latent")[0]
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).square().mean() < 1e-3 * exact.var()


@pytest.fixture
def run(capfd):
    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        printed = capfd.readouterr()
        assert not ended.value.code, printed.err
        return " ".join((printed.out + printed.err).split())

    return call


def test_from_a_set_to_a_student_to_a_drawing_on_the_command_line(family, run, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    family.tiny().save(tmp_path / "base")
    scales = ["2x4x4", "3x8x8"] if family.video else ["4x4", "8x8"]
    recipe = find_recipe("mini").override([
        f"model.base={tmp_path / 'base'}", f"data.path={tmp_path / 'set'}", f"schedule.scales={scales}",
        "schedule.timesteps=[1000.0, 600.0]", "lora.rank=4", "loss.feature_block=0", "loss.fake.updates=2",
        "teacher.steps=2", "train.iterations=2", "train.batch=2", "train.sample_every=2",
        "train.gradient_checkpointing=true", "train.sample_prompts=['a dog']",
        f"model.family={family.family}",
    ])  # fmt: skip
    Path("own.yaml").write_text(recipe.to_yaml())
    Path("prompts.txt").write_text("a dog\na cat\n")
    run("generate", "own.yaml", "--prompts", "prompts.txt", "--count", 3, "--out", "set")
    run("distill", "own.yaml", "--out", "run")
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    text = run("sample", "a dog", "a cat", "--count", 2, "--batch", 3, "--student", "run", "--out", "drawn")
    assert "4 images" in text
    run("sample", "a cat", "--seed", 2, "--student", "run", "--out", "again")
    one, other = (
        [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(Image.open(f))]
        for f in (tmp_path / "drawn" / "a-cat-2.png", tmp_path / "again" / "a-cat-2.png")
    )
    assert len(one) == (9 if family.video else 1)
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(one, other, strict=True))  # whatever the batch


def test_videos_are_compared_by_their_middle_frames_and_kept_as_animations(tmp_path):
    Wan.tiny().save(tmp_path)
    recipe = find_recipe("mini").override([
        f"model.base={tmp_path}", "schedule.scales=['2x4x4', '3x8x8']", "schedule.timesteps=[1000.0, 600.0]",
        "model.family=wan",
        "train.precision=float32",  # as the videos below are drawn; "auto" is bfloat16 where that is native
    ])  # fmt: skip
    texts = ["a dog", "a cat", "a house", "the moon"]
    outcome = compare.compare(
        recipe, ["undistilled", "full=undistilled:full"], texts, console.progress, out=tmp_path / "out",
        scoring=ScoringOptions(scorer=str(mini.SCORER)), speed=False,
    )  # fmt: skip
    recipe_model, prompts = setup.load(recipe, ("denoiser", "vae", "text")), Prompts.of(texts)
    for result, text in zip(outcome.results, ["undistilled", "full=undistilled:full"], strict=True):
        contender = parse_sampler(text, recipe)
        videos, scorer = (
            drawing.generate_images(recipe_model, contender, prompts),
            ClipScorer.load(mini.SCORER),
        )
        assert videos.shape[:2] == (4, 9)
        cosine = (scorer.embed_images(videos[:, 4]) * scorer.embed_texts(texts)).sum(-1)
        assert result.row.values["clip_score"].value == pytest.approx(100 * float(cosine.mean()), abs=1e-3)
        kept = tmp_path / "out" / "pictures" / contender.name
        assert np.array_equal(read_image(kept / "3.png"), videos[3])
        again = parse_sampler(f"folder:{kept}", recipe)
        assert np.array_equal(read_folder(again.path, texts), videos)


def test_pictures_are_encoded_anew_for_another_vae(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    for seed in (0, 1):
        SD3.tiny(seed).save(tmp_path / f"base-{seed}")
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 99, 200)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a dog")
    recipe = find_recipe("mini").override([
        f"model.base={tmp_path / 'base-0'}", f"data.path={tmp_path / 'pictures'}", "train.batch=2",
        "schedule.scales=['4x4', '8x8']", "schedule.timesteps=[1000.0, 600.0]",
    ])  # fmt: skip
    found = []
    for vae in ("null", tmp_path / "base-1" / "vae"):
        [latents] = setup._encode_images(recipe.override([f"model.vae={vae}"]), tmp_path / "pictures",
                                         console.progress)  # fmt: skip
        found.append(latents.latents(range(2), latents.scales[-1]))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_folder_of_pictures_is_refused_for_a_video_model(tmp_path):
    Wan.tiny().save(tmp_path / "base")
    recipe = find_recipe("mini").override([
        f"model.base={tmp_path / 'base'}", "schedule.scales=['2x4x4', '3x8x8']",
        "schedule.timesteps=[1000.0, 600.0]", "model.family=wan",
    ])  # fmt: skip
    with pytest.raises(RecipeError, match=r"is a folder of images, but .* generates videos"):
        setup._encode_images(recipe, tmp_path, console.progress)
    with pytest.raises(ModelError, match=r"is a model for videos; use \[N, 3, T, H, W\]"):
        Wan.tiny().encode(torch.zeros(1, 3, 32, 32))

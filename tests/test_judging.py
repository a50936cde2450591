"""Metrics with models of their own, real classes with random weights, and who is asked to judge what."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from scalewise.common.images import read_image, save_image
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import RecipeError
from scalewise.evaluation.samplers import Prompts
from scalewise.evaluation.scoring import Scorers, ScoringOptions, load_scorers
from scalewise.metrics import EXTRAS, METRICS, ClipScorer, measure
from scalewise.metrics.base import Gaussian, ImageFeatures
from scalewise.metrics.clip import from_bytes, letterbox, resize_and_crop
from scalewise.metrics.extras import parse_metric
from scalewise.metrics.features import VisionFeatures
from scalewise.metrics.frechet import distance, distance_to, frechet_distance
from scalewise.metrics.preference import HPSV2, PICKSCORE
from scalewise.metrics.video import VideoScorer, consistency, steadiness
from scalewise.models import tiny

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def pictures(count: int, size: tuple[int, int] = (40, 32), seed: int = 0) -> np.ndarray:
    """Smooth random pictures, bytes [count, *size, 3]."""
    coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (255 * fine).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in the hub's layout."""
    tokenizer = tiny.clip_and_t5(joint_width=16)["tokenizer"]
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 8}
        config = CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=8)
        scorer = ClipScorer(CLIPModel(config), tokenizer)
    folder = tmp_path_factory.mktemp("clip")
    scorer.save(folder, dtype=torch.float32)
    return folder


def processor_file(folder: Path, kind: str, size: int) -> None:
    settings = {
        "image_processor_type": kind, "do_resize": True, "size": {"height": size, "width": size},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 in the hub's layout."""
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    processor_file(folder, "ViTImageProcessor", 28)
    return folder


def apart(look: VisionFeatures, images: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """Features of all images at once, and one by one."""
    alone = [look.extract(images[i : i + 1], [""])[name] for i in range(len(images))]
    return look.extract(images, [""] * len(images))[name], torch.cat(alone)


def test_features_of_a_vision_model_are_those_of_its_own_processor_and_forward(dino_folder: Path) -> None:
    found, model = VisionFeatures.load(str(dino_folder), "cpu"), Dinov2Model.from_pretrained(dino_folder)
    images = pictures(3)
    resized = [np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BILINEAR)) for i in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = model.eval()(pixel_values=pixels).last_hidden_state[:, 0]
    together, alone = apart(found, images, "fd")
    assert torch.allclose(together, wanted, atol=1e-5)
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_model_without_pooling_weights_gives_its_class_token_not_random_numbers(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(
            tmp_path
        )
    processor_file(tmp_path, "ViTImageProcessor", 32)
    first, second = (VisionFeatures.load(str(tmp_path), "cpu") for _ in range(2))
    images = pictures(2)
    assert torch.equal(*(model.extract(images, ["", ""])["fd"] for model in (first, second)))


def test_a_vision_model_that_lacks_weights_is_refused(dino_folder: Path, tmp_path: Path) -> None:
    for file in dino_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is missing 1 weights of Dinov2Model, .* layernorm\.weight"):
        VisionFeatures.load(str(tmp_path), "cpu")


def test_a_source_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot load a vision model from .*with an internet connection"):
        VisionFeatures.load(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(ValueError, match="Cannot load a CLIP model"):
        ClipScorer.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(("extra", "name"), [(PICKSCORE, "pickscore"), (HPSV2, "hpsv2")])
def test_preference_scores_are_a_hundred_cosines(clip_folder: Path, extra: object, name: str) -> None:
    examiner = extra.load(str(clip_folder), "cpu")  # type: ignore[attr-defined]
    images, captions = pictures(5, (36, 36)), ["a cat", "a dog", "a cat", "the moon", "a cat"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    scorer = ClipScorer.load(clip_folder, resize=letterbox if name == "hpsv2" else None)
    with torch.no_grad():
        texts = torch.stack([
            model.get_text_features(
                **scorer.tokenizer(c, padding="max_length", max_length=24, return_tensors="pt")
            ).pooler_output[0]
            for c in captions
        ])  # fmt: skip
    seen = scorer.embed_images(images)
    wanted = 100 * torch.nn.functional.cosine_similarity(seen, texts)
    found = examiner.extract(images, captions)[name]
    assert torch.allclose(found, wanted, atol=1e-3)
    alone = torch.cat([examiner.extract(images[i : i + 1], captions[i : i + 1])[name] for i in range(5)])
    assert torch.allclose(found, alone, atol=1e-4)
    features = ImageFeatures(None, torch.arange(5), None, outputs={name: found})
    assert measure(features)[name].value == pytest.approx(float(wanted.mean()), abs=1e-3)


@pytest.mark.parametrize("count", [5, 40])
def test_the_frechet_distance_equals_the_one_by_eigenvalues_of_the_plain_product(count: int) -> None:
    """With fewer images than dimensions, and with more."""
    draw = torch.Generator().manual_seed(4)
    a = torch.randn(count, 12, generator=draw).double() @ torch.randn(12, 12, generator=draw).double()
    b = torch.randn(60, 12, generator=draw).double() + 1
    covariances = [np.cov(x.numpy().T) for x in (a, b)]
    # The eigenvalues of S_a S_b, which is not symmetric, are real and not negative.
    shared = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    wanted = (
        float((a.mean(0) - b.mean(0)).square().sum()) + sum(np.trace(c) for c in covariances) - 2 * shared
    )
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    seen = ImageFeatures(None, torch.arange(count), None)
    assert distance_to(a, seen, Gaussian.fit(b))(torch.arange(count)) == pytest.approx(wanted, rel=1e-6)


def test_one_image_has_no_frechet_distance() -> None:
    with pytest.raises(ValueError, match="at least 2 generated and 2 real images; got 1"):
        distance(torch.ones(1, 3), Gaussian.fit(torch.randn(4, 3)))


def reference_folder(folder: Path, count: int = 24) -> Path:
    """Real pictures of two sizes."""
    folder.mkdir(parents=True)
    for i, size in enumerate([(40, 32), (32, 48)]):
        for j, picture in enumerate(pictures(count // 2, size, seed=9 + i)):
            Image.fromarray(picture).save(folder / f"{i}-{j}.png")
    return folder


def test_statistics_of_real_pictures_are_taken_once_and_hold_for_pictures_of_many_sizes(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    folder = reference_folder(tmp_path / "real")
    asked = ScoringOptions(metrics=(f"fd={dino_folder}",), reference=folder)
    judge = load_scorers(find_recipe("sd35-medium"), asked)
    model = VisionFeatures.load(str(dino_folder), "cpu")
    features = torch.cat(
        [
            model.extract(pictures(12, size, seed=9 + i), [""] * 12)["fd"]
            for i, size in enumerate([(40, 32), (32, 48)])
        ]
    )
    assert judge.real is not None
    assert torch.allclose(judge.real["fd"].mean, features.double().mean(0), atol=1e-5)
    assert judge.real["fd"].count == 24

    def fail(*_: object) -> dict[str, Tensor]:
        raise AssertionError("the pictures were read again")

    with monkeypatch.context() as patched:
        patched.setattr(VisionFeatures, "extract", fail)
        again = load_scorers(find_recipe("sd35-medium"), asked)
    assert again.real is not None and torch.equal(again.real["fd"].covariance, judge.real["fd"].covariance)
    seen = judge.score(pictures(20, seed=5), Prompts.of([f"caption {i}" for i in range(20)]))
    found = measure(seen, rounds=20)
    assert list(found) == ["fd"]
    drawn = model.extract(pictures(20, seed=5), [""] * 20)["fd"]
    assert found["fd"].value == pytest.approx(frechet_distance(drawn, features), rel=1e-5)


def test_fewer_real_pictures_than_features_are_warned_of(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    asked = ScoringOptions(metrics=(f"fd={dino_folder}",), reference=reference_folder(tmp_path / "real", 10))
    judge = load_scorers(find_recipe("sd35-medium"), asked)
    with pytest.warns(UserWarning, match="10 real images are not more than the 16 features of fd"):
        judge.warn_of_few(100)
    with pytest.warns(UserWarning, match="16 generated images are not more than the 16 features of fd"):
        judge.warn_of_few(16)
    mini_judge = load_scorers(find_recipe("mini"))
    with pytest.warns(UserWarning, match="128 generated images are not more than the 128 features"):
        mini_judge.warn_of_few(128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini_judge.warn_of_few(129)


def test_a_reference_serves_the_scorer_too(clip_folder: Path, tmp_path: Path) -> None:
    asked = ScoringOptions(scorer=str(clip_folder), reference=reference_folder(tmp_path / "real"))
    judge = load_scorers(find_recipe("mini"), asked)
    assert judge.reference is not None and judge.reference.shape == (24, 8)
    assert not judge.is_mini_default
    assert load_scorers(find_recipe("mini")).is_mini_default


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ScoringOptions(), "only the mini has its own scorer"),
        (ScoringOptions(metrics=("beauty",)), "Unknown metric 'beauty'; use one of fid, fd"),
        (
            ScoringOptions(metrics=("hpsv2",)),
            "has no default weights; add a hub id or folder: hpsv2=SOURCE",
        ),
        (ScoringOptions(metrics=("fd=x",)), "The metric fd compares with real images"),
        (ScoringOptions(metrics=("pickscore=a", "pickscore=b")), "pickscore is given twice"),
        (ScoringOptions(metrics=("vbench=one",)), "Cannot parse the models 'one'"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_sentence(asked: ScoringOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_scorers(find_recipe("sd35-medium"), asked)


def test_metrics_are_read_with_and_without_a_source() -> None:
    assert parse_metric("fd", EXTRAS) == (EXTRAS["fd"], "facebook/dinov2-base")
    assert parse_metric("fd=a/b=c", EXTRAS) == (EXTRAS["fd"], "a/b=c")
    assert {m.name for e in EXTRAS.values() for m in e.metrics} < set(METRICS)


def test_pictures_that_are_not_square_are_kept_whole_by_hpsv2_and_cropped_by_clip(clip_folder: Path) -> None:
    wide = torch.full((1, 3, 20, 40), 1.0)
    boxed = letterbox(wide, 32)
    assert boxed.shape == (1, 3, 32, 32)
    assert torch.allclose(boxed[..., 8:24, :], torch.ones(1, 3, 16, 32))
    assert boxed[..., :8, :].max() == boxed[..., 24:, :].max() == -1
    assert resize_and_crop(wide, 32).shape == (1, 3, 32, 32)
    images = pictures(2, (20, 40))
    scores = [
        extra.load(str(clip_folder), "cpu").extract(images, ["a", "b"])[extra.name]
        for extra in (HPSV2, PICKSCORE)
    ]
    assert not torch.allclose(*scores)


def test_dino_sees_the_whole_frame_of_a_video_that_is_not_square(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ViTModel(ViTConfig(**SMALL, image_size=28, patch_size=14), add_pooling_layer=False).save_pretrained(
            tmp_path
        )
    processor_file(tmp_path, "ViTImageProcessor", 28)
    model, video = VisionFeatures.load(str(tmp_path), "cpu"), pictures(3, (30, 60))
    resized = torch.nn.functional.interpolate(from_bytes(video), size=(28, 56), mode="bilinear")
    with torch.no_grad():
        asked = {"pixel_values": resized, "interpolate_pos_encoding": True}  # mean and std are 0.5
        wanted = model.model(**asked).last_hidden_state[:, 0]
        assert torch.allclose(model.extract_uncropped(from_bytes(video)), wanted, atol=1e-5)
        square = pictures(3, (28, 28))
        same = model.extract(square, [""] * 3)["fd"]
        assert torch.allclose(model.extract_uncropped(from_bytes(square)), same, atol=1e-5)


def test_consistency_of_frames_is_the_mean_cosine_to_the_first_and_the_one_before() -> None:
    angles = torch.tensor([0.0, 0.3, 1.0, 2.5])
    frames = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    before, first = (0.3, 0.7, 1.5), (0.3, 1.0, 2.5)
    wanted = np.mean(
        [(max(0, np.cos(a)) + max(0, np.cos(b))) / 2 for a, b in zip(before, first, strict=True)]
    )
    assert float(consistency(frames)) == pytest.approx(wanted, abs=1e-6)
    assert float(consistency(torch.ones(3, 5))) == pytest.approx(1)


def test_steadiness_is_one_for_a_still_and_falls_with_the_change() -> None:
    video = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    assert steadiness(video) == 1
    video[1] = 51  # up by a fifth, then down by a fifth
    assert steadiness(video) == pytest.approx(0.8)


def test_videos_are_judged_frame_by_frame_and_pictures_refused(clip_folder: Path, dino_folder: Path) -> None:
    examiner = VideoScorer.load(f"{dino_folder},{clip_folder}", "cpu")
    videos = np.stack([pictures(4, seed=i) for i in range(3)])
    found = examiner.extract(videos, [""] * 3)
    with torch.no_grad():
        frames = VisionFeatures.load(str(dino_folder), "cpu").extract_uncropped(from_bytes(videos[1]))
    assert float(found["vbench_subject"][1]) == pytest.approx(float(consistency(frames)), abs=1e-5)
    assert float(found["vbench_steadiness"][2]) == pytest.approx(steadiness(videos[2]))
    assert set(found) == {m.name for m in EXTRAS["vbench"].metrics}
    with pytest.raises(ValueError, match="needs videos of at least 2 frames"):
        examiner.extract(videos[0], [""] * 4)


def test_a_judge_shows_pictures_metrics_the_middle_frame_of_a_video(clip_folder: Path) -> None:
    scorer = ClipScorer.load(clip_folder)
    pick = PICKSCORE.load(str(clip_folder), "cpu")
    videos = np.stack([pictures(5, seed=i) for i in range(4)])
    prompts = Prompts.of([f"caption {i}" for i in range(4)])
    seen = Scorers(scorer, examiners=((PICKSCORE, pick),)).score(videos, prompts)
    assert torch.equal(seen.outputs["pickscore"], pick.extract(videos[:, 2], prompts.captions)["pickscore"])
    assert seen.images is not None and torch.equal(seen.images, scorer.embed_images(videos[:, 2]))


def test_videos_are_saved_as_animations_and_read_back(tmp_path: Path) -> None:
    video = pictures(3, (16, 24))
    assert np.array_equal(read_image(save_image(video, tmp_path / "0.png")), video)
    assert np.array_equal(read_image(save_image(video[0], tmp_path / "1.png")), video[0])


def test_metrics_of_videos_are_refused_for_pictures_before_anything_is_loaded(tmp_path: Path) -> None:
    from scalewise.common import console
    from scalewise.evaluation import compare

    with pytest.raises(
        RecipeError, match=r"The metric vbench .* is for videos, but this model generates images"
    ):
        compare.compare(
            find_recipe("mini"), ["teacher"], ["a cat"], console.progress, out=tmp_path,
            scoring=ScoringOptions(metrics=("vbench",)),
        )  # fmt: skip


def test_real_pictures_that_cannot_be_read_are_warned_of(clip_folder: Path, tmp_path: Path) -> None:
    folder = reference_folder(tmp_path / "real")
    (folder / "broken.png").write_bytes((folder / "0-0.png").read_bytes()[:60])
    asked = ScoringOptions(scorer=str(clip_folder), reference=folder)
    with pytest.warns(UserWarning, match=r"24 images used, 1 skipped: 1 unreadable \(broken\.png\)"):
        judge = load_scorers(find_recipe("mini"), asked)
    assert judge.reference is not None and len(judge.reference) == 24


def test_clip_prepares_images_as_its_own_processor_does_by_pillow(clip_folder: Path) -> None:
    """Large and oblong images, whose tensors another filter would resize to other bytes."""
    scorer = ClipScorer.load(clip_folder)
    [image] = pictures(1, (90, 150))
    image = image ^ np.random.default_rng(0).integers(0, 64, image.shape, dtype=np.uint8)
    resized = Image.fromarray(image).resize((53, 32), Image.Resampling.BICUBIC)  # int(32 * 150 / 90)
    square = np.asarray(resized)[:, 10 : 10 + 32]
    with torch.no_grad():
        wanted = scorer.model.visual_projection(
            scorer.model.vision_model(from_bytes(square[None])).pooler_output
        )
    found = scorer.embed_images(image[None])
    assert torch.allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-6)
    assert not torch.allclose(scorer.embed_pixels(from_bytes(image[None])), found, atol=1e-4)


def test_hpsv2_resizes_a_tensor_and_cuts_no_overshoot() -> None:
    stripes = torch.ones(1, 3, 48, 48)
    stripes[..., 24:] = -1
    resized = torch.nn.functional.interpolate(stripes, size=(32, 32), mode="bicubic", antialias=True)
    assert torch.equal(letterbox(stripes, 32), resized) and float(resized.max()) > 1.01

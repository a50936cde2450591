"""Scenes of the mini: layouts that fit the caption, deterministic renders, and how the judge scores them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scalewise.evaluation.scoring import ScoringOptions, check_scoring
from scalewise.metrics import ImageFeatures, measure
from scalewise.metrics.base import Gaussian
from scalewise.metrics.clip import from_bytes
from scalewise.metrics.frechet import distance
from scalewise.metrics.geneval import relations
from scalewise.metrics.scene import EXTRA, SceneJudge, expected_distance, fidelity
from scalewise.metrics.ssim import ssim
from scalewise.mini.detector import load_detector, read_images
from scalewise.mini.grammar import BACKGROUNDS, CaptionError, parse_caption
from scalewise.mini.scenes import (
    SIDE,
    drawing,
    held_out_captions,
    layout,
    random_scene,
    render,
    render_captions,
    scene_of,
)

CAPTIONS = held_out_captions(120)


def box(item):
    return item.x, item.y, item.x + item.size, item.y + item.size


@pytest.fixture(scope="module")
def judge():
    return SceneJudge.load("", "cpu")


def test_layouts_are_what_the_caption_says():
    rng = random.Random(0)
    for caption in held_out_captions(300):
        described = parse_caption(caption)
        for _ in range(5):
            items = layout(described, rng)
            named = sorted((t.name, t.color) for t in described.things for _ in range(t.count))
            assert sorted((i.thing, i.color) for i in items) == named
            assert all(0 <= edge <= SIDE for item in items for edge in box(item))
            for i, one in enumerate(items):
                for two in items[i + 1 :]:
                    assert abs(one.x - two.x) >= one.size or abs(one.y - two.y) >= one.size, "things overlap"
            if described.relation:
                assert described.relation in relations(box(items[0]), box(items[1]))


def test_a_render_shows_the_drawing_at_its_place_and_the_background_elsewhere():
    scene = scene_of("a red key on a pink background, ink style", random.Random(3))
    image, [item] = render(scene), scene.items
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    outside = np.ones((SIDE, SIDE), bool)
    outside[item.y : item.y + item.size, item.x : item.x + item.size] = False
    assert (image[outside] == BACKGROUNDS["pink"]).all()
    page = Image.new("RGB", (item.size, item.size), BACKGROUNDS["pink"])
    sprite = drawing("ink", "key", "red", item.size)
    page.paste(sprite, (0, 0), sprite)
    assert (image[~outside].reshape(item.size, item.size, 3) == np.asarray(page)).all()


def test_renders_are_deterministic_and_differ_by_seed():
    first, again, other = (render_captions(CAPTIONS[:20], seed=seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    with pytest.raises(CaptionError, match="dragon"):
        render_captions(["a dragon"])


def test_random_scenes_are_nearly_all_different():
    rng = random.Random(0)
    images = [render(random_scene(rng)) for _ in range(300)]
    assert len({image.tobytes() for image in images}) > 290


def test_the_detector_reads_renders(judge):
    """The errors of the detector are measured on thousands of scenes in MODEL_CARD.md; these are 120."""
    scores = judge.extract(render_captions(CAPTIONS), CAPTIONS)
    assert float(scores["scene_match"].mean()) >= 0.98
    assert float(scores["scene_fidelity"].nanmean()) > 0.99


def test_scores_do_not_depend_on_the_batch(judge):
    images = render_captions(CAPTIONS[:8])
    together = judge.extract(images, CAPTIONS[:8])
    for i in range(8):
        alone = judge.extract(images[i : i + 1], CAPTIONS[i : i + 1])
        for name, values in together.items():
            torch.testing.assert_close(alone[name], values[i : i + 1], atol=1e-4, rtol=1e-4, equal_nan=True)


NOTO, INK = ", white background, noto style", ", white background, ink style"


@pytest.mark.parametrize(
    ("drawn", "asked"),
    [
        (f"two cats{NOTO}", f"three cats{NOTO}"),
        (f"three cats{NOTO}", f"two cats{NOTO}"),
        (f"a cat{NOTO}", f"a dog{NOTO}"),
        (f"a cat{NOTO}", "a cat, pink background, noto style"),
        (f"a red cat{INK}", f"a blue cat{INK}"),
        (f"a red cat{INK}", f"a cat{NOTO}"),
        (f"a cat and a dog{NOTO}", f"a cat{NOTO}"),
        (f"a cat left of a dog{NOTO}", f"a cat right of a dog{NOTO}"),
        (f"a cat left of a dog{NOTO}", f"a cat above a dog{NOTO}"),
        (f"a red cat and a blue dog{INK}", f"a blue cat and a red dog{INK}"),
    ],
)
def test_an_image_of_something_else_does_not_match(judge, drawn, asked):
    images = render_captions([drawn] * 4)
    assert judge.extract(images, [drawn] * 4)["scene_match"].tolist() == [1, 1, 1, 1]
    assert judge.extract(images, [asked] * 4)["scene_match"].tolist() == [0, 0, 0, 0]


def test_fidelity_finds_blur_and_the_best_shift(judge):
    scene = scene_of("a guitar on a white background, noto style", random.Random(1))
    pixels = from_bytes(render(scene)[None])
    [reading], _ = read_images(load_detector(), pixels)
    item = reading.found[0].item
    assert item == scene.items[0]
    assert fidelity(pixels[0], item, reading) > 0.999
    moved = torch.roll(pixels[0], (2, -1), (1, 2))
    assert fidelity(moved, item, reading) > 0.999
    blurred = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)[0]
    noisy = pixels[0] + 0.3 * torch.randn(pixels[0].shape, generator=torch.Generator().manual_seed(0))
    assert 0.4 < fidelity(blurred, item, reading) < 0.95
    assert fidelity(noisy, item, reading) < 0.8


def test_a_thing_without_a_color_in_the_ink_style_has_no_true_drawing():
    pixels = from_bytes(render_captions(["a black cat on a white background, ink style"]))
    [reading], _ = read_images(load_detector(), pixels)
    item = reading.found[0].item
    assert fidelity(pixels[0], item, reading) > 0.999
    assert fidelity(pixels[0], replace(item, color=None), reading) == 0


def test_captions_are_checked_before_images_are_generated():
    check_scoring(ScoringOptions(metrics=("scene",)), CAPTIONS[:20], video=False)
    with pytest.raises(CaptionError, match="wizard"):
        check_scoring(ScoringOptions(metrics=("scene",)), [*CAPTIONS[:20], "a wizard"], video=False)
    assert EXTRA.frechet, "few images are warned about"


def test_the_frechet_distance_grows_with_disturbance(judge):
    captions = held_out_captions(150)
    real = Gaussian.fit(judge.extract(render_captions(captions * 2), captions * 2)["scene"])
    pixels = from_bytes(render_captions(captions, seed=1))
    blurred = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)
    noisy = pixels + 0.3 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    distances = [distance(read_images(load_detector(), x)[1], real) for x in (pixels, noisy, blurred)]
    assert distances[0] < 0.7 * distances[1] and distances[1] < 0.7 * distances[2], distances


def test_ssim_has_known_values():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    # Constant images: only the luminance term remains, (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.0001 and
    # gray values in [0, 1].
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.5)
    expected = (2 * 0.75 * 0.25 + 1e-4) / (0.75**2 + 0.25**2 + 1e-4)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-4)
    assert float(ssim(x, -x).max()) < 0


def test_diversity_is_one_for_renders_and_zero_for_copies(judge):
    captions = [c for c in CAPTIONS if parse_caption(c).task != "counting"][:24]
    repeated = [c for c in captions for _ in range(4)]
    prompt = torch.arange(24).repeat_interleave(4)

    def diversity(images):
        return measure(ImageFeatures(None, prompt, None, outputs=judge.extract(images, repeated)))[
            "scene_diversity"
        ]

    assert 0.8 < diversity(render_captions(repeated)).value < 1.2
    copies = np.repeat(render_captions(captions), 4, axis=0)
    assert diversity(copies).value == 0


def test_four_things_can_only_lie_in_the_four_corners():
    assert expected_distance(parse_caption("four cats on a white background, noto style")) == 0
    single = expected_distance(parse_caption("a cat on a white background, noto style"))
    assert 15 < single < 25  # nine places 16 pixels apart


def test_images_of_another_size_are_judged_too(judge):
    images = render_captions(CAPTIONS[:12])
    small = np.stack([np.asarray(Image.fromarray(i).resize((96, 96), Image.Resampling.BOX)) for i in images])
    assert float(judge.extract(small, CAPTIONS[:12])["scene_match"].mean()) >= 0.9


def test_empty_captions_give_features_alone_and_others_are_refused(judge):
    images = render_captions(CAPTIONS[:2])
    scores = judge.extract(images, ["", ""])
    assert scores["scene"].shape == (2, 128) and scores["scene_match"].isnan().all()
    with pytest.raises(CaptionError, match="wizard"):
        judge.extract(images, ["a wizard", "a cat"])

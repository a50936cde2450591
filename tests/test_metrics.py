"""Metrics: known distances, independence of batch size, and intervals that keep their promise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from scalewise.metrics import (
    SCORER_METRICS,
    ClipScorer,
    ImageFeatures,
    Resampled,
    bootstrap_interval,
    measure,
)
from scalewise.metrics.clip import clip_score, from_bytes, prompt_match, resize_and_crop
from scalewise.metrics.diversity import diversity
from scalewise.metrics.frechet import frechet_distance
from scalewise.models import tiny


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    """A random CLIP of a few thousand parameters for 32 x 32 pixels."""
    tokenizer = tiny.clip_and_t5(joint_width=16)["tokenizer"]
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
        return ClipScorer(CLIPModel(config), tokenizer)


def gaussian(count: int, mean: Tensor, root: Tensor, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, len(mean), generator=draw, dtype=torch.float64) @ root


def unit_rows(count: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def known_pair(count: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Samples of N(0, diag(1, 4)) and N((3, 0), diag(9, 4)), and their distance 3^2 + (1 - 3)^2 + 0 = 13."""
    a = gaussian(count, torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 2.0])).double(), seed)
    b = gaussian(
        count, torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([3.0, 2.0])).double(), seed + 1000
    )
    return a, b, 13.0


def test_the_frechet_distance_of_two_gaussians_is_the_one_known_in_closed_form() -> None:
    a, b, distance = known_pair(200_000)
    assert frechet_distance(a, b) == pytest.approx(distance, rel=0.01)


def test_the_mean_of_figures_is_taken_half_by_half() -> None:
    one, two = Resampled(1.0, torch.tensor([1.0, 2.0]), 4), Resampled(3.0, torch.tensor([5.0, 2.0]), 4)
    mean = Resampled.mean([one, two])
    assert mean.value == 2.0 and mean.halves.tolist() == [3.0, 2.0]


def test_the_frechet_distance_handles_covariances_that_do_not_commute() -> None:
    # For 2 x 2 matrices, tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det AB)).
    one, two = (
        torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double(),
        torch.tensor([[0.7, -0.4], [-0.4, 1.5]]).double(),
    )
    a = gaussian(100_000, torch.zeros(2).double(), torch.linalg.cholesky(one).T, 1)
    b = gaussian(100_000, torch.zeros(2).double(), torch.linalg.cholesky(two).T, 2)
    sa, sb = torch.cov(a.T), torch.cov(b.T)
    shared = math.sqrt((sa @ sb).trace() + 2 * math.sqrt(torch.linalg.det(sa @ sb)))
    expected = (a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-10)


def test_the_frechet_distance_of_a_set_to_itself_is_zero_also_with_fewer_images_than_dimensions() -> None:
    few = unit_rows(10, 64, 0)
    assert frechet_distance(few, few) < 1e-8


def test_a_single_image_has_no_frechet_distance_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 2 generated and 2 real images; got 1\. Use more"):
        frechet_distance(torch.randn(1, 4), torch.randn(9, 4))


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = torch.randn(401, generator=torch.Generator().manual_seed(3)).double()
    found = bootstrap_interval(lambda rows: float(values[rows].mean()), len(values), rounds=2000)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / math.sqrt(401), rel=0.1)


def test_the_interval_of_a_frechet_distance_holds_the_known_distance_about_as_often_as_promised() -> None:
    held = 0
    for trial in range(40):
        a, b, distance = known_pair(200, seed=trial)
        found = bootstrap_interval(lambda rows, a=a, b=b: frechet_distance(a[rows], b), 200, rounds=60)
        # The other set is a sample, too, but not resampled: measure against its own exact distance.
        mean, std = b.mean(0), b.std(0)
        exact = mean.square().sum() + ((std - torch.tensor([1.0, 2.0])) ** 2).sum()
        held += found.low <= float(exact) <= found.high
        assert abs(float(exact) - distance) < 5
    assert held >= 34  # of 40; 38 are expected


def test_resampling_with_replacement_would_push_the_frechet_distance_out_of_its_own_interval() -> None:
    a, b = unit_rows(120, 32, 1), unit_rows(400, 32, 2)
    value = frechet_distance(a, b)
    draw = torch.Generator().manual_seed(0)
    naive = [frechet_distance(a[torch.randint(120, (120,), generator=draw)], b) for _ in range(50)]
    assert min(naive) > value
    found = bootstrap_interval(lambda rows: frechet_distance(a[rows], b), 120, rounds=50)
    assert found.low < value < found.high


def test_an_interval_is_the_same_every_time_and_refuses_too_few_samples() -> None:
    values = torch.arange(20).double()
    once, again = (
        bootstrap_interval(lambda rows: float(values[rows].mean()), 20, rounds=20) for _ in range(2)
    )
    assert once == again
    with pytest.raises(ValueError, match="Use more prompts"):
        bootstrap_interval(lambda rows: 0.0, 19)


def test_features_do_not_depend_on_how_many_images_are_given_at_once(scorer: ClipScorer) -> None:
    pixels = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = scorer.embed_pixels(pixels)
    apart = torch.cat([scorer.embed_pixels(pixels[i : i + 7]) for i in range(0, 70, 7)])
    assert together.shape == (70, 8)
    assert torch.allclose(together, apart, atol=1e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(70), atol=1e-6)
    captions = [f"picture {i}" for i in range(70)]
    assert torch.allclose(scorer.embed_texts(captions)[33:34], scorer.embed_texts(captions[33:34]), atol=1e-6)


def test_images_of_bytes_and_of_floats_have_the_same_features(scorer: ClipScorer) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(scorer.embed_images(images), scorer.embed_pixels(from_bytes(images)))


def test_larger_and_oblong_images_are_brought_to_the_models_size() -> None:
    flat = torch.full((2, 3, 100, 60), 0.25)
    assert resize_and_crop(flat, 32).shape == (2, 3, 32, 32)
    assert torch.allclose(resize_and_crop(flat, 32), torch.tensor(0.25), atol=1e-5)
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1  # finer than the small size can show: antialiasing makes them grey
    assert resize_and_crop(stripes, 16).abs().max() < 0.35


def test_a_saved_scorer_is_read_back_by_us_and_by_transformers(scorer: ClipScorer, tmp_path: Path) -> None:
    scorer.save(tmp_path)
    again = ClipScorer.load(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert torch.allclose(
        again.embed_images(images), scorer.embed_images(images), atol=2e-3
    )  # half precision on disk
    assert torch.allclose(again.embed_texts(["a cat"]), scorer.embed_texts(["a cat"]), atol=2e-3)
    assert load_file(tmp_path / "model.safetensors")["visual_projection.weight"].dtype == torch.float16
    processed = CLIPImageProcessor.from_pretrained(tmp_path)(list(images), return_tensors="pt").pixel_values
    assert torch.allclose(processed, from_bytes(images), atol=1e-6)


def test_a_folder_without_a_scorer_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be used as the scorer because config\.json is missing"):
        ClipScorer.load(tmp_path)


def test_the_clip_score_is_a_hundred_for_equal_and_zero_for_orthogonal_embeddings() -> None:
    rows = torch.eye(4)
    assert clip_score(rows, 3 * rows) == pytest.approx(100)
    assert clip_score(rows, rows.roll(1, 0)) == pytest.approx(0)


def test_prompt_match_is_certain_for_true_captions_and_at_chance_for_random_images() -> None:
    captions = unit_rows(200, 16, 0)
    own = torch.arange(200)
    assert prompt_match(captions, captions, own).all()
    many = torch.arange(2000) % 200
    chance = prompt_match(unit_rows(2000, 16, 5), captions, many, of=10).float().mean()
    assert float(chance) == pytest.approx(0.1, abs=0.03)


def test_prompt_match_is_deterministic_and_counts_a_tie_as_a_miss() -> None:
    captions, images = unit_rows(60, 4, 0), unit_rows(60, 4, 1)
    first = prompt_match(images, captions, torch.arange(60))
    assert torch.equal(first, prompt_match(images, captions, torch.arange(60)))
    same = torch.ones(50, 4)
    assert not prompt_match(same[:1], same, torch.tensor([0])).any()


def test_prompt_match_needs_enough_captions() -> None:
    with pytest.raises(ValueError, match=r"needs at least 50 distinct captions; got 10\. Use more captions"):
        prompt_match(unit_rows(10, 4, 0), unit_rows(10, 4, 0), torch.arange(10))


def test_diversity_is_zero_for_one_picture_over_and_over_and_one_for_orthogonal_ones() -> None:
    prompt = torch.tensor([0, 0, 1, 1])
    assert diversity(torch.ones(4, 3), prompt) == pytest.approx(0, abs=1e-9)
    assert diversity(torch.eye(4), prompt) == pytest.approx(1)
    with pytest.raises(ValueError, match="several seeds"):
        diversity(torch.eye(2), torch.arange(2))


def seen(images: Tensor, *, per_prompt: int = 2, reference: bool = True) -> ImageFeatures:
    prompt = torch.arange(len(images)) // per_prompt
    return ImageFeatures(images, prompt, unit_rows(60, 16, 9), unit_rows(300, 16, 8) if reference else None)


def test_every_registered_metric_is_measured_and_its_interval_holds_its_value() -> None:
    found = measure(seen(unit_rows(80, 16, 0)), rounds=40)
    assert (
        list(found)
        == [m.name for m in SCORER_METRICS]
        == ["frechet", "clip_score", "prompt_match", "diversity"]
    )
    for interval in found.values():
        assert interval.low <= interval.value <= interval.high


def test_metrics_that_what_was_seen_does_not_allow_are_left_out() -> None:
    found = measure(seen(unit_rows(40, 16, 0), per_prompt=1, reference=False), rounds=10)
    assert list(found) == ["clip_score", "prompt_match"]


def test_paired_differences_are_sharper_than_two_intervals_side_by_side() -> None:
    base, caption = seen(unit_rows(80, 16, 0), per_prompt=1), unit_rows(60, 16, 9)
    # The same images, each moved a little towards its caption (the first 40 prompts have one).
    nearer = torch.nn.functional.normalize(base.images[:40] + 0.05 * caption[:40], dim=-1)
    ours = ImageFeatures(nearer, torch.arange(40), caption, base.reference)
    theirs = ImageFeatures(base.images[:40], torch.arange(40), caption, base.reference)
    alone, paired = (
        measure(ours, rounds=60)["clip_score"],
        measure(ours, against=theirs, rounds=60)["clip_score"],
    )
    assert paired.low > 0
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_halves_without_any_image_that_counts_are_left_out_of_the_interval() -> None:
    values = torch.full((40,), torch.nan)
    values[:3] = torch.tensor([0.0, 1.0, 1.0])
    found = bootstrap_interval(lambda rows: float(values[rows].nanmean()), 40)
    assert found.value == pytest.approx(2 / 3) and math.isfinite(found.low) and math.isfinite(found.high)
    none = bootstrap_interval(lambda rows: 0.5 if len(rows) == 40 else math.nan, 40).within(0, 1)
    assert not none.known and none.to_list() == [0.5, None, None]

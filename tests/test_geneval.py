"""GenEval: its prompts, its check without any model, and real detectors with random weights."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.mask2former import modeling_mask2former
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from scalewise.metrics import ClipScorer, ImageFeatures, bootstrap_interval
from scalewise.metrics.detection import COLORS, ColorClassifier, Detection, Detector, common_name, crop
from scalewise.metrics.geneval import (
    EXTRA,
    NAMES,
    RELATIONS,
    SIZES,
    GenEval,
    ObjectSpec,
    Requirement,
    correct,
    geneval_prompts,
    parse_prompt,
    relations,
)
from scalewise.models import tiny

STATISTICS = {metric.name: metric.statistic for metric in EXTRA.metrics}
LABELS = dict(enumerate(["person", "mouse", "remote", "dog"]))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


# Prompts.


def in_words(asked: Requirement) -> str:
    """GenEval's grammar once more, written from the paper's templates."""

    def article(words: str) -> str:
        return ("an " if words.startswith(("a", "e", "i", "o", "u")) else "a ") + words

    first = asked.objects[0]
    if asked.task == "counting":
        return f"a photo of {['two', 'three', 'four'][first.count - 2]} {first.name}" + (
            "es" if first.name[-1] == "s" else "s"
        )
    things = [article(f"{thing.color or ''} {thing.name}".strip()) for thing in asked.objects]
    return {
        "single_object": "a photo of {0}", "colors": "a photo of {0}", "two_object": "a photo of {0} and {1}",
        "color_attr": "a photo of {0} and {1}", "position": "a photo of {0} {relation} {1}",
    }[asked.task].format(*things, relation=asked.relation)  # fmt: skip


def test_every_prompt_is_understood_and_written_back_word_for_word() -> None:
    # All prompts of five tasks, and as many of colour attribution as there are rounds by then.
    rounds = SIZES["position"]
    prompts = geneval_prompts(sum(min(size, rounds) for size in SIZES.values()))
    asked = [parse_prompt(prompt) for prompt in prompts]
    assert [one and in_words(one) for one in asked] == prompts
    assert len(set(prompts)) == len(prompts)
    drawn = Counter(one.task for one in asked if one)
    assert drawn == {
        "single_object": 80, "two_object": 80 * 79, "counting": 240, "colors": 790, "position": 80 * 79 * 4,
        "color_attr": 80 * 79 * 4,
    }  # fmt: skip
    assert not any(
        "person" in (thing.name for thing in one.objects) for one in asked if one and one.objects[0].color
    )


def test_more_prompts_than_there_are_or_none_at_all_cannot_be_drawn() -> None:
    assert sum(SIZES.values()) == 80 + 80 * 79 + 80 * 3 + 79 * 10 + 80 * 79 * 4 + 79 * 78 * 10 * 9
    for count in (587_291, 0):
        with pytest.raises(ValueError, match=r"between 1 and 587,290; got -?[\d,]+\."):
            geneval_prompts(count)


def test_any_beginning_is_balanced_and_single_objects_drop_out_when_all_have_been_named() -> None:
    tasks = [asked.task for asked in map(parse_prompt, geneval_prompts(553)) if asked]
    assert tasks[: 6 * 80] == list(SIZES) * 80
    assert tasks[6 * 80 :] == ([*SIZES][1:] * 15)[:73]
    for end in range(1, 480):
        counts = Counter(tasks[:end])
        assert max(counts.values()) - min(counts[task] for task in SIZES) <= 1


def test_prompts_are_the_same_every_time_and_a_longer_list_begins_with_a_shorter_one() -> None:
    assert geneval_prompts(6) == [
        "a photo of a cow", "a photo of a hair drier and a tie", "a photo of two forks",
        "a photo of a red backpack", "a photo of a truck below a potted plant",
        "a photo of a pink broccoli and a red dog",
    ]  # fmt: skip
    assert geneval_prompts(600)[:97] == geneval_prompts(97)
    assert not set(geneval_prompts(60, seed=1)) >= set(geneval_prompts(60))


@pytest.mark.parametrize(
    ("text", "task", "objects", "relation"),
    [
        ("a photo of an orange", "single_object", [("orange", 1, None)], None),
        ("a photo of an orange orange", "colors", [("orange", 1, "orange")], None),
        ("a photo of a hot dog", "single_object", [("hot dog", 1, None)], None),
        ("a photo of a bench and a sports ball", "two_object",
         [("bench", 1, None), ("sports ball", 1, None)], None),
        ("a photo of two clocks", "counting", [("clock", 2, None)], None),
        ("a photo of four computer keyboards", "counting", [("computer keyboard", 4, None)], None),
        ("a photo of three buses", "counting", [("bus", 3, None)], None),
        ("a photo of two wine glasses", "counting", [("wine glass", 2, None)], None),
        ("a photo of two toothbrushs", "counting", [("toothbrush", 2, None)], None),
        ("a photo of four knifes", "counting", [("knife", 4, None)], None),
        ("a photo of a white tv remote", "colors", [("tv remote", 1, "white")], None),
        ("a photo of a bench left of a bear", "position", [("bench", 1, None), ("bear", 1, None)], "left of"),
        ("a photo of an orange above an airplane\n", "position",
         [("orange", 1, None), ("airplane", 1, None)], "above"),
        ("a photo of an orange orange and a red orange", None, [], None),
        ("a photo of a purple wine glass and a black apple", "color_attr",
         [("wine glass", 1, "purple"), ("apple", 1, "black")], None),
    ],
)  # fmt: skip
def test_the_authors_wording_is_understood(
    text: str, task: str | None, objects: list[tuple[str, int, str | None]], relation: str | None
) -> None:
    wanted = Requirement(task, tuple(ObjectSpec(*one) for one in objects), relation) if task else None
    assert parse_prompt(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of", "a photo of a unicorn", "a photo of a red person", "a photo of five dogs",
        "a photo of one dog", "a photo of a apple", "a photo of a dog and a dog", "two dogs",
        "a photo of a red dog and a cat", "a photo of a red dog and a red cat",
        "a photo of a red dog left of a blue cat", "a photo of a dog near a cat", "my a photo of a dog",
        "a photo of a dog and a cat and a bear", "a photo of two person",
    ],
)  # fmt: skip
def test_other_texts_are_none_of_genevals(text: str) -> None:
    assert parse_prompt(text) is None


# The check.


def box(name: str, left: float = 0, top: float = 0, *, score: float = 0.95, size: float = 10) -> Detection:
    return Detection(name, (left, top, left + size, top + size), score)


def never(_: Detection) -> str:
    raise AssertionError("no colour is to be asked for")


def passes(prompt: str, found: Sequence[Detection], colour_of: Callable[[Detection], str] = never) -> bool:
    asked = parse_prompt(prompt)
    assert asked
    return correct(asked, found, colour_of)


def test_an_object_counts_above_three_tenths_and_more_than_one_do_no_harm() -> None:
    assert passes("a photo of a dog", [box("dog", score=0.31)])
    assert not passes("a photo of a dog", [box("dog", score=0.3), box("cat")])
    assert passes("a photo of a dog", [box("dog")] * 20)
    assert passes("a photo of a dog and a cat", [box("cat", score=0.4), box("bear"), box("dog", score=0.5)])
    assert not passes("a photo of a dog and a cat", [box("dog"), box("dog")])


def test_counting_wants_the_exact_number_of_detections_above_nine_tenths() -> None:
    def dogs(sure: int, unsure: int = 0) -> list[Detection]:
        return [*[box("dog", score=0.91)] * sure, *[box("dog", score=0.9)] * unsure, box("cat")]

    for wanted, word in ((2, "two"), (3, "three"), (4, "four")):
        prompt = f"a photo of {word} dogs"
        verdicts = [passes(prompt, dogs(count)) for count in range(20)]
        assert verdicts == [count == wanted for count in range(20)]
        assert passes(prompt, dogs(wanted, unsure=5))
        assert not passes(prompt, dogs(wanted - 1, unsure=1))


def test_of_one_name_sixteen_detections_are_looked_at() -> None:
    sixteen = Requirement("counting", (ObjectSpec("dog", 16),))
    for count in range(14, 20):
        assert correct(sixteen, [box("dog")] * count, never) == (count >= 16)
    seventeen = Requirement("counting", (ObjectSpec("dog", 17),))
    assert not correct(seventeen, [box("dog")] * 17, never)


def test_the_colour_is_that_of_the_surest_detection_alone() -> None:
    sure, unsure = box("dog", score=0.8), box("dog", 5, score=0.7)
    colours = {sure: "red", unsure: "blue"}
    assert passes("a photo of a red dog", [unsure, sure], colours.__getitem__)
    assert not passes("a photo of a blue dog", [unsure, sure], colours.__getitem__)
    assert not passes("a photo of a blue dog", [box("cat")], never)


def test_in_colour_attribution_each_object_has_its_own_colour() -> None:
    dog, cat = box("dog"), box("cat", 30)
    prompt = "a photo of a red dog and a blue cat"
    assert passes(prompt, [dog, cat], {dog: "red", cat: "blue"}.__getitem__)
    for worn in ({dog: "blue", cat: "red"}, {dog: "red", cat: "red"}, {dog: "blue", cat: "blue"}):
        assert not passes(prompt, [dog, cat], worn.__getitem__)
    assert not passes(prompt, [dog], {dog: "red"}.__getitem__)


def test_the_first_object_lies_where_asked_for_seen_from_the_second() -> None:
    dog, cat = box("dog", 0), box("cat", 50)
    assert passes("a photo of a dog left of a cat", [dog, cat])
    assert passes("a photo of a cat right of a dog", [dog, cat])
    assert not passes("a photo of a dog right of a cat", [dog, cat])
    assert not passes("a photo of a dog above a cat", [dog, cat])
    assert not passes("a photo of a dog left of a cat", [dog])
    # Only the surest dog counts, wherever another one is.
    assert not passes("a photo of a dog left of a cat", [box("dog", 90, score=0.99), dog, cat])


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((0, 0, 10, 10), (10, 0, 20, 10), {"left of"}),  # they touch
        ((0, 0, 10, 10), (0, 10, 10, 20), {"above"}),
        ((0, 0, 10, 10), (10, 10, 20, 20), {"left of", "above"}),  # 8 / sqrt(200) = 0.57 on both axes
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),  # as near as a tenth of both sizes
        ((3.9, 0, 13.9, 10), (0, 0, 10, 10), set()),  # 1.9 of 3.9
        ((4.1, 0, 14.1, 10), (0, 0, 10, 10), {"right of"}),  # 2.1 of 4.1
        ((0, 0, 100, 100), (40, 45, 50, 55), set()),  # one inside the other
    ],
)
def test_relations_of_boxes_are_those_worked_out_by_hand(
    a: tuple[float, ...], b: tuple[float, ...], wanted: set[str]
) -> None:
    assert relations(a, b) == wanted


def exact_relations(a: Sequence[int], b: Sequence[int]) -> set[str] | None:
    """The rule in rational numbers, without roots; None where a comparison is a tie."""
    offset = [Fraction(a[i] + a[i + 2] - b[i] - b[i + 2], 2) for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    square = offset[0] ** 2 + offset[1] ** 2
    found = set()
    for axis, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        apart = abs(offset[axis]) - Fraction(sizes[axis], 10)
        if apart > 0 and 4 * apart**2 == square:
            return None
        if apart > 0 and 4 * apart**2 > square:
            found.add(after if offset[axis] > 0 else before)
    return found


def test_relations_agree_with_rational_numbers_and_turn_round_with_their_objects() -> None:
    draw = np.random.default_rng(0)
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    seen: Counter[frozenset[str]] = Counter()
    for _ in range(1500):
        corners = draw.integers(0, 40, (2, 2))
        (a, b) = (tuple(map(int, (*corner, *(corner + draw.integers(1, 60, 2))))) for corner in corners)
        wanted = exact_relations(a, b)
        if wanted is not None:
            assert relations(a, b) == wanted
            assert relations(b, a) == {opposite[relation] for relation in wanted}
            seen[frozenset(wanted)] += 1
    assert len(seen) == 9
    assert sum(seen.values()) > 1450


# Colours.


class TextTable:
    """A hand-made scorer: an embedding for each text it is asked for, and the picture's mean for pictures."""

    def __init__(self) -> None:
        self.texts_seen: list[str] = []
        self.crops: list[np.ndarray] = []

    @staticmethod
    def row(text: str) -> Tensor:
        draw = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(text)))
        return nn.functional.normalize(torch.randn(3, generator=draw), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        self.texts_seen += prompts
        return torch.stack([self.row(prompt) for prompt in prompts])

    def embed_images(self, images: np.ndarray) -> Tensor:
        self.crops += list(images)
        mean = torch.from_numpy(images).float().mean((1, 2)) - 127.5
        return nn.functional.normalize(mean, dim=-1)


def test_the_colour_is_the_nearest_mean_of_three_wordings() -> None:
    table = TextTable()
    judge = ColorClassifier(table)  # type: ignore[arg-type]
    pictures = np.random.default_rng(0).integers(0, 256, (12, 1, 1, 3), dtype=np.uint8)
    found = Detection("bus", (0, 0, 1, 1), 0.9)
    worn = []
    for picture in pictures:
        pixel = (picture[0, 0].astype(float) - 127.5) / np.linalg.norm(picture[0, 0] - 127.5)
        best = {}
        for colour in COLORS:
            wordings = (f"{colour} bus", f"{colour}-colored bus", f"{colour} object")
            mean = sum(table.row(f"a photo of a {words}").double().numpy() for words in wordings)
            best[colour] = pixel @ mean / np.linalg.norm(mean)
        worn.append(max(best, key=best.__getitem__))
    assert [judge(picture, found) for picture in pictures] == worn
    assert len(set(worn)) > 3
    assert len(table.texts_seen) == 30  # asked for once, not at every picture


def test_the_crop_is_the_box_with_everything_but_the_mask_grey() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 10:16] = True
    mask[5, 10] = False
    wanted = picture[5:9, 10:16].copy()
    wanted[0, 0] = 153
    assert np.array_equal(crop(picture, Detection("bus", (10, 5, 16, 9), 0.9, mask)), wanted)
    assert np.array_equal(crop(picture, Detection("bus", (9.6, 5.4, 16.2, 8.9), 0.9)), picture[5:9, 10:16])
    table = TextTable()
    ColorClassifier(table)(picture, Detection("bus", (10, 5, 16, 9), 0.9, mask))  # type: ignore[arg-type]
    assert np.array_equal(table.crops[0], wanted)


@pytest.mark.parametrize("edges", [(30, 20, 30, 20), (4.2, 4.2, 4.3, 4.3), (0, 0, 0, 0)])
def test_a_box_without_area_still_gives_a_pixel(edges: tuple[float, float, float, float]) -> None:
    assert crop(np.zeros((20, 30, 3), dtype=np.uint8), Detection("bus", edges, 0.9)).shape == (1, 1, 3)


# Detectors.


def settled(model: nn.Module, seed: int) -> nn.Module:
    """Weights so large that objects differ from picture to picture."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw)
    return model


def save(model: Any, folder: Path, kind: str, size: dict[str, int]) -> str:
    """A model with its image processor in the hub's layout."""
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": kind, "do_resize": True, "size": size, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [*MEAN], "image_std": [*STD],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Mask2Former with a Swin backbone."""
    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, dim_feedforward=16,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8,
        id2label=LABELS,
    )  # fmt: skip
    with patch.object(modeling_mask2former, "requires_backends", lambda *_: None):
        model = settled(Mask2FormerForUniversalSegmentation(config), seed=7)
    size = {"height": 64, "width": 96}
    return save(model, tmp_path_factory.mktemp("mask2former"), "Mask2FormerImageProcessor", size)


def yolos() -> YolosForObjectDetection:
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 96],
        patch_size=8, num_detection_tokens=8, use_mid_position_embeddings=False, id2label=LABELS,
    )  # fmt: skip
    return YolosForObjectDetection(config)


SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}


def detr(**backbone: object) -> DetrForObjectDetection:
    resnet = ResNetConfig(**SMALL_RESNET, out_features=["stage4"])
    config = DetrConfig(
        **backbone or {"backbone_config": resnet, "use_timm_backbone": False, "backbone": None}, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=8, id2label=LABELS,
    )  # fmt: skip
    return DetrForObjectDetection(config)


def rt_detr() -> RTDetrForObjectDetection:
    resnet = RTDetrResNetConfig(**SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])
    config = RTDetrConfig(
        backbone_config=resnet, encoder_hidden_dim=16, encoder_in_channels=[8] * 3, encoder_layers=1,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, num_queries=8, num_denoising=0,
        decoder_in_channels=[16] * 3, decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
        id2label=LABELS,
    )  # fmt: skip
    return RTDetrForObjectDetection(config)


def pictures(count: int, size: tuple[int, int] = (50, 70), seed: int = 0) -> np.ndarray:
    """Smooth random pictures, bytes [count, *size, 3]."""
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (255 * fine).round().byte().permute(0, 2, 3, 1).numpy()


def shown(picture: np.ndarray, size: tuple[int, int] = (64, 96)) -> Tensor:
    """What a detector is shown, [1, 3, *size], worked out with PIL and numpy."""
    resized = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)) / 255
    return torch.from_numpy(((resized - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32))


def plain(found: Sequence[Detection]) -> list[tuple[object, ...]]:
    return [(f.name, f.box, f.score, None if f.mask is None else f.mask.tobytes()) for f in found]


def test_mask2former_gives_names_boxes_scores_and_masks_at_the_pictures_own_size(segmenter: str) -> None:
    detector = Detector.load(segmenter, "cpu")
    picture = pictures(1)[0]
    with torch.no_grad():
        seen = detector.model(shown(picture))
    classes = seen.class_queries_logits[0].softmax(-1)[:, :4]
    enlarge = nn.functional.interpolate
    masks = enlarge(enlarge(seen.masks_queries_logits, (64, 96), mode="bilinear"), (50, 70), mode="bilinear")
    wanted = []
    # As many pairs of query and label as there are queries.
    pairs = sorted(((q, label) for q in range(8) for label in range(4)), key=lambda one: -classes[one])[:8]
    for query, label in pairs:
        logits = masks[0, query].numpy()
        mask = logits > 0
        score = float(classes[query, label]) * (1 / (1 + np.exp(-logits[mask]))).mean() if mask.any() else 0
        if score > 0.3:
            rows, columns = np.where(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            wanted.append((["person", "computer mouse", "tv remote", "dog"][label], box, score, mask))
    wanted.sort(key=lambda one: -one[2])
    found = detector.find(picture)
    assert len(found) >= 3
    assert [(one.name, one.box) for one in found] == [one[:2] for one in wanted]
    assert [one.score for one in found] == pytest.approx([one[2] for one in wanted], abs=2e-3)
    for one, (*_, mask) in zip(found, wanted, strict=True):
        assert one.mask is not None and one.mask.dtype == bool and one.mask.shape == (50, 70)
        assert (one.mask != mask).mean() < 2e-3  # so large weights let rounding grow
    assert len({one.box for one in found}) > 1


class HandMade(nn.Module):
    """A Mask2Former that says what it is told to, and keeps what it was shown."""

    def __init__(self, classes: Tensor, masks: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="mask2former", id2label=LABELS)
        self.nothing = nn.Parameter(torch.zeros(1))
        self.answer = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
        self.shown: tuple[int, ...] = ()

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.shown = tuple(pixel_values.shape)
        return self.answer


def test_masks_and_scores_are_those_of_transformers_where_its_fixed_size_fits() -> None:
    draw = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(30, 5, generator=draw)
    masks = (
        4 * nn.functional.interpolate(torch.randn(1, 30, 6, 6, generator=draw), (96, 96), mode="bicubic")[0]
    )
    model = HandMade(classes, masks)
    [theirs] = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        model.answer, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    # The same size in other words, since 384 x 384 itself would be taken for the hub's conversions.
    shows = Mask2FormerImageProcessorPil(size={"shortest_edge": 384, "longest_edge": 384})
    ours = Detector(model, shows).find(np.zeros((384, 384, 3), dtype=np.uint8))
    order = sorted(range(len(ours)), key=lambda i: -theirs["segments_info"][i]["score"])
    assert len(ours) == len(theirs["segments_info"]) >= 10
    for one, i in zip(ours, order, strict=True):
        info = theirs["segments_info"][i]
        assert one.name == common_name(LABELS[info["label_id"]])
        assert one.score == pytest.approx(info["score"], abs=2e-6)
        assert np.array_equal(one.mask, theirs["segmentation"][i].bool().numpy())


def test_a_square_of_a_hand_made_mask_is_found_where_it_is() -> None:
    classes, masks = torch.full((2, 5), -50.0), torch.full((2, 16, 16), -9.0)
    classes[0, 1], classes[1, 4] = 50.0, 50.0  # a mouse, and nothing
    masks[0, 4:8, 8:16] = 9.0
    detector = Detector(
        HandMade(classes, masks), Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})
    )
    [one] = detector.find(np.zeros((128, 256, 3), dtype=np.uint8))
    assert (one.name, one.box) == ("computer mouse", (128, 32, 256, 64))
    assert one.mask is not None and not one.mask[:, :128].any()
    assert 0.99 * 128 * 32 < one.mask.sum() <= 128 * 32  # enlarging rounds the corners
    assert 0.95 < one.score < 1


def test_no_more_objects_are_found_than_the_model_has_queries() -> None:
    torn = torch.tensor([[5.0, 5.1, -50.0, -50.0, -50.0]])  # 48% and 52%
    model = HandMade(torn, torch.full((1, 16, 16), 9.0))
    detector = Detector(model, Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}))
    assert [one.name for one in detector.find(np.zeros((32, 32, 3), dtype=np.uint8))] == ["computer mouse"]


@pytest.mark.parametrize(
    ("size", "picture", "seen"),
    [
        ({"height": 384, "width": 384}, (200, 200), (800, 800)),  # the hub's conversions
        ({"height": 384, "width": 384}, (200, 300), (800, 1216)),  # 800 x 1200, in multiples of 32
        ({"height": 64, "width": 96}, (200, 200), (64, 96)),
        ({"shortest_edge": 64, "longest_edge": 96}, (200, 200), (64, 64)),
    ],
)
def test_the_hubs_conversions_are_shown_800_pixels_and_others_what_their_folder_says(
    size: dict[str, int], picture: tuple[int, int], seen: tuple[int, int]
) -> None:
    model = HandMade(torch.zeros(1, 5), torch.zeros(1, 4, 4))
    Detector(model, Mask2FormerImageProcessorPil(size=size)).find(np.zeros((*picture, 3), dtype=np.uint8))
    assert model.shown == (1, 3, *seen)


@pytest.mark.parametrize(
    ("make", "kind", "size"),
    [
        (yolos, "YolosImageProcessor", {"height": 64, "width": 96}),
        (detr, "DetrImageProcessor", {"height": 64, "width": 96}),
        (rt_detr, "RTDetrImageProcessor", {"height": 64, "width": 96}),
    ],
)
def test_object_detection_models_give_boxes_without_masks(
    make: Callable[[], nn.Module], kind: str, size: dict[str, int], tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = save(settled(make(), seed=1), tmp_path, kind, size)
    detector, picture = Detector.load(source, "cpu"), pictures(1)[0]
    with torch.no_grad():
        seen = detector.model(shown(picture))
    sigmoid = kind == "RTDetrImageProcessor"
    scores = seen.logits[0].sigmoid() if sigmoid else seen.logits[0].softmax(-1)[:, :4]
    ranked = sorted(
        ((float(scores[query, label]), query, label) for query in range(8) for label in range(4)),
        reverse=True,
    )
    if sigmoid:  # a query may have several names
        ranked = ranked[:8]
    else:
        ranked = [one for one in ranked if one[0] == float(scores[one[1]].max())]
    found = detector.find(picture, threshold=0.2)
    wanted = [one for one in ranked if one[0] > 0.2]
    assert len(found) >= 3
    assert [one.score for one in found] == pytest.approx([one[0] for one in wanted], abs=1e-5)
    for one, (_, query, label) in zip(found, wanted, strict=True):
        x, y, width, height = seen.pred_boxes[0, query].tolist()
        edges = [70 * (x - width / 2), 50 * (y - height / 2), 70 * (x + width / 2), 50 * (y + height / 2)]
        assert one.name == common_name(LABELS[label])
        assert one.box == pytest.approx(tuple(np.clip(edges, 0, [70, 50, 70, 50])), abs=1e-3)
        assert one.mask is None


def test_labels_are_known_by_genevals_names_and_those_that_lack_are_named(segmenter: str) -> None:
    detector = Detector.load(segmenter, "cpu")
    detector.require(["person", "computer mouse", "tv remote", "dog"])
    with pytest.raises(ValueError, match="has 4 labels, none for cat, tie; use a detector of COCO's 80"):
        detector.require(["dog", "tie", "cat"])
    spellings = [
        "mouse",
        "computer mouse",
        "remote",
        "tv remote",
        "keyboard",
        "computer keyboard",
        "sofa",
        "TV",
    ]
    assert {common_name(spelling) for spelling in spellings} <= set(NAMES)
    assert {common_name(name) for name in NAMES} == set(NAMES)


def test_a_detector_that_lacks_weights_is_refused(segmenter: str, tmp_path: Path) -> None:
    for file in Path(segmenter).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is missing 1 weights of Mask2Former.* class_predictor\.weight"):
        Detector.load(str(tmp_path), "cpu")


def test_what_is_no_detector_or_is_not_there_is_named_with_the_remedy(
    clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"Cannot load a detector from .*with an internet connection"):
        Detector.load(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(ValueError, match=r"Cannot load a detector from .*CLIPConfig"):
        Detector.load(clip_folder, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_detector_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    save(detr(), tmp_path, "DetrImageProcessor", {"height": 64, "width": 96})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"needs a package that is not installed \(.*timm"):
        Detector.load(str(tmp_path), "cpu")


# All together.


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP in the hub's layout."""
    tokenizer = tiny.clip_and_t5(joint_width=16)["tokenizer"]
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 8}
        config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
        scorer = ClipScorer(CLIPModel(config), tokenizer)
    folder = tmp_path_factory.mktemp("clip")
    scorer.save(folder, dtype=torch.float32)
    return str(folder)


@pytest.fixture(scope="module")
def examiner(segmenter: str, clip_folder: str) -> GenEval:
    found = EXTRA.load(f"{segmenter},{clip_folder}", "cpu")
    assert isinstance(found, GenEval)
    return found


CAPTIONS = (
    "a photo of a dog", "a photo of a tv remote and a dog", "a photo of two persons", "a landscape",
    "a photo of a pink computer mouse", "a photo of a green computer mouse",
    "a photo of a dog left of a tv remote", "a photo of a red dog and a blue tv remote",
)  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_figures_follow_from_detections_and_do_not_depend_on_neighbours(examiner: GenEval) -> None:
    images, captions = pictures(len(CAPTIONS) * 2), CAPTIONS * 2
    looks = examiner.extract(images, captions)
    assert list(looks) == ["geneval", *(f"geneval_{task}" for task in SIZES)]
    for i, caption in enumerate(captions):
        asked = parse_prompt(caption)
        alone = {task: looks[f"geneval_{task}"][i] for task in SIZES}
        if asked is None:
            assert all(value.isnan() for value in (*alone.values(), looks["geneval"][i]))
            continue
        assert [task for task, value in alone.items() if not value.isnan()] == [asked.task]
        assert looks["geneval"][i] == alone[asked.task]
        found = [one.name for one in examiner.detector.find(images[i])]
        if asked.task in ("single_object", "two_object"):
            assert bool(alone[asked.task]) == {thing.name for thing in asked.objects}.issubset(found)
        parts = [(images[i : i + 1], [caption])]
        if i < 3:
            parts.append((images[[i, 3]], [caption, "a landscape"]))
        for part, texts in parts:
            again = examiner.extract(part, texts)
            assert all(same(value[:1], looks[name][i : i + 1]) for name, value in again.items())
    assert {0.0, 1.0} <= set(looks["geneval"].tolist())  # both verdicts occur


def test_detections_do_not_depend_on_what_was_seen_before(segmenter: str) -> None:
    detector, images = Detector.load(segmenter, "cpu"), pictures(3)
    first = [plain(detector.find(image)) for image in images]
    assert [plain(detector.find(image)) for image in images[::-1]] == first[::-1]
    assert len({str(one) for one in first}) == 3


def test_the_colour_task_asks_the_judge_about_the_surest_object(examiner: GenEval) -> None:
    image = next(
        i for i in pictures(20) if any(f.name == "computer mouse" for f in examiner.detector.find(i))
    )
    mouse = next(one for one in examiner.detector.find(image) if one.name == "computer mouse")
    worn = examiner.colors(image, mouse)
    article = "an" if worn == "orange" else "a"
    texts = [f"a photo of {article} {worn} computer mouse", *(c for c in CAPTIONS[4:6] if worn not in c)]
    found = examiner.extract(np.stack([image] * len(texts)), texts)["geneval_colors"]
    assert found.tolist() == [1.0] + [0.0] * (len(texts) - 1)


def test_other_prompts_are_refused_with_the_remedy(examiner: GenEval) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 prompts is one.*--prompts geneval"):
        examiner.extract(pictures(2), ["a cat", "the moon"])
    with pytest.raises(ValueError, match="has 4 labels, none for cat"):
        examiner.extract(pictures(1), ["a photo of a cat"])


@pytest.mark.parametrize("source", ["", ",", "one,", ",two", "one,two,three"])
def test_a_source_that_is_not_one_or_two_models_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="write geneval=DETECTOR or geneval=DETECTOR,CLIP"):
        EXTRA.load(source, "cpu")


def test_the_clip_model_is_the_authors_unless_another_is_named(
    segmenter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(ClipScorer, "load", lambda source, *, device: asked.append((source, device)))
    EXTRA.load(segmenter, "cpu")
    EXTRA.load(f"{segmenter},other", "cpu")
    assert asked == [("openai/clip-vit-large-patch14", "cpu"), ("other", "cpu")]
    assert EXTRA.source == "facebook/mask2former-swin-small-coco-instance"


def test_the_overall_figure_is_the_mean_over_tasks_that_the_given_prompts_have() -> None:
    # Two pictures of each of three prompts: of two tasks, and of none of GenEval's.
    looks = {f"geneval_{task}": torch.full((6,), torch.nan) for task in SIZES}
    looks["geneval_single_object"][:2] = torch.tensor([1.0, 0.0])
    looks["geneval_position"][2:4] = 1
    seen = ImageFeatures(None, torch.tensor([0, 0, 1, 1, 2, 2]), None, outputs=looks)
    overall = STATISTICS["geneval"](seen)
    assert overall is not None
    assert overall(torch.arange(3)) == pytest.approx((1 / 2 + 1) / 2)
    assert overall(torch.tensor([0])) == pytest.approx(1 / 2)
    assert overall(torch.tensor([1, 2])) == pytest.approx(1)
    single = STATISTICS["geneval_single_object"](seen)
    assert single is not None and single(torch.arange(3)) == pytest.approx(1 / 2)
    assert STATISTICS["geneval_counting"](seen) is None
    assert STATISTICS["geneval"](ImageFeatures(None, torch.arange(2), None)) is None


def test_the_overall_figure_weighs_tasks_alike_whatever_their_numbers_of_pictures() -> None:
    # 90 pictures of one object, 80% right, and 10 of two, 30% right: 55%, not 75%.
    right = {"single_object": torch.arange(90) % 5 != 0, "two_object": torch.arange(10) % 10 < 3}
    looks = {f"geneval_{task}": torch.full((100,), torch.nan) for task in SIZES}
    looks["geneval_single_object"][:90] = right["single_object"].float()
    looks["geneval_two_object"][90:] = right["two_object"].float()
    statistic = STATISTICS["geneval"](ImageFeatures(None, torch.arange(100), None, outputs=looks))
    assert statistic is not None
    found = bootstrap_interval(statistic, 100, rounds=100)
    assert found.value == pytest.approx((0.8 + 0.3) / 2)
    assert found.low < found.value < found.high


def test_the_metrics_are_shares_named_after_the_tasks() -> None:
    assert [metric.name for metric in EXTRA.metrics] == [
        "geneval", "geneval_single_object", "geneval_two_object", "geneval_counting", "geneval_colors",
        "geneval_position", "geneval_color_attr",
    ]  # fmt: skip
    assert {(m.better, m.bounds, m.percent) for m in EXTRA.metrics} == {("higher", (0, 1), True)}
    assert EXTRA.metrics[3].title == "GenEval counting"
    assert EXTRA.metrics[0].show(0.553) == "55.3%"

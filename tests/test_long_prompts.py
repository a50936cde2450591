"""Prompts longer than a text encoder reads: one warning for all of a run's, with counts by encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalewise.config.presets import find_recipe
from scalewise.data import PromptCache
from scalewise.data.synthetic import generate
from scalewise.evaluation.evaluate import evaluate
from scalewise.evaluation.samplers import Prompts, parse_sampler
from scalewise.models import SD3, SDXL
from scalewise.models.long_prompts import describe_truncation

SHORT, MIDDLE, LONG = "a dog", "a dog on a red sofa, noto style", "a dog " * 40


class Words:
    """A tokenizer of words."""

    def __call__(self, prompts: list[str], verbose: bool = True) -> Words:
        self.input_ids = [prompt.split() for prompt in prompts]
        return self


def said(work: Callable[[], object]) -> list[str]:
    """The warnings of some work about prompts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if "longer than" in str(w.message)]


def tiny() -> SD3:
    model = SD3.tiny()
    model.max_sequence_length = 64
    return model


def test_the_sentence_counts_the_different_prompts_that_each_encoder_cuts():
    prompts = ["a b", "a b c d", "a b c d e f", "a b c d", ""]
    readers = [(Words(), 3, "CLIP"), (Words(), 8, "T5")]
    assert describe_truncation(prompts, readers) == (
        "2 of 3 prompts are longer than CLIP reads (3 tokens); T5 reads all of them. "
        "The longest has 6 tokens for CLIP: 'a b c d e f'."
    )
    readers = [(Words(), 3, "CLIP"), (Words(), 5, "T5")]
    assert describe_truncation(prompts, readers) == (
        "2 of 3 prompts are longer than CLIP reads (3 tokens), 1 longer than T5 reads (5 tokens); the rest "
        "is ignored. The longest has 6 tokens for CLIP, 6 for T5: 'a b c d e f'. Put the important words "
        "into that length."
    )
    assert describe_truncation(["a b c d"], readers) == (
        "The prompt 'a b c d' is longer than CLIP reads (3 tokens); T5 reads all of it. "
        "It has 4 tokens for CLIP."
    )
    assert describe_truncation(["a b c", ""], readers) == describe_truncation([], readers) == ""


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_embedding_many_prompts_warns_once_whatever_the_batch(tmp_path: Path, batch: int):
    prompts = [f"{LONG}{i}" for i in range(3)] + [f"{MIDDLE} {i}" for i in range(2)] + [SHORT]
    model = tiny()
    told = said(
        lambda: PromptCache.build(lambda: model, prompts, tmp_path / "p", fingerprint="f", batch=batch)
    )
    assert len(told) == 1
    assert told[0].startswith(
        "5 of 6 prompts are longer than CLIP reads (24 tokens), 3 longer than T5 reads (64 tokens)"
    )
    assert said(lambda: model.encode_prompts([SHORT])) == []
    assert len(said(lambda: model.encode_prompts([LONG]))) == 1  # outside a run each call warns by itself


def test_generating_a_set_warns_once_and_counts_the_tokens_that_the_teacher_reads(tmp_path: Path):
    recipe = find_recipe("mini").override(
        ["schedule.scales=[4, 6, 6, 8]", "teacher.steps=1", "teacher.max_sequence_length=128",
         "train.precision=float32"]
    )  # fmt: skip
    model = tiny()
    prompts = [MIDDLE, "a cat " * 15, SHORT]
    told = said(lambda: list(generate(model, recipe, prompts, tmp_path / "s", count=3, batch=1)))
    assert len(told) == 1
    assert told[0].startswith("2 of 3 prompts are longer than CLIP reads (24 tokens); T5 reads all of them.")
    assert model.max_sequence_length == 64


def test_a_comparison_warns_once_for_each_sampler_that_reads_otherwise():
    recipe = find_recipe("mini").override(["schedule.scales=[4, 6, 6, 8]", "teacher.max_sequence_length=128"])
    samplers = [parse_sampler(text, recipe) for text in ("teacher:1", "undistilled")]
    prompts = Prompts.of([MIDDLE, "a cat " * 15, SHORT, SHORT + " 2"])

    class Scorers:
        def score_images(self, images, captions):
            return {"x": torch.zeros(len(images), 1)}

        def combine(self, rows, prompts):
            raise StopIteration

    def work() -> None:
        for sampler in samplers:
            with pytest.raises((StopIteration, RuntimeError)):
                list(evaluate(tiny(), [sampler], prompts, Scorers(), batch=1))

    told = said(work)
    assert len(told) == 2
    assert told[0].startswith("2 of 4 prompts are longer than CLIP reads (24 tokens); T5 reads all of them.")
    assert told[1].startswith(
        "2 of 4 prompts are longer than CLIP reads (24 tokens), 1 longer than T5 reads (64 tokens)"
    )


def test_a_family_without_t5_does_not_speak_of_it():
    (told,) = said(lambda: SDXL.tiny().encode_prompts([LONG, SHORT, MIDDLE]))
    assert told.startswith("2 of 3 prompts are longer than CLIP reads (") and "T5" not in told
    assert "the rest is ignored" in told

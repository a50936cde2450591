"""Arguments of `scalewise.load` and of a pipeline that cannot be meant: one sentence with the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import scalewise
from scalewise.models import ModelError


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = scalewise.load("mini", student=None, schedule="1000@8 602@16")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


IMAGE = torch.zeros(1, 3, 128, 128)


@pytest.mark.parametrize(("given", "said"), [
    ({"num_images_per_prompt": "2"}, "num_images_per_prompt must be an integer, as in "
                                     "num_images_per_prompt=2; got '2'."),
    ({"height": "128"}, "height must be an integer, as in height=1024; got '128'."),
    ({"height": 0}, "height must be at least 1; got 0."),
    ({"width": -16}, "width must be at least 1; got -16."),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1; got 0."),
    ({"num_frames": 0}, "num_frames must be at least 1; got 0."),
    ({"image": IMAGE, "strength": math.nan}, "strength must be a number in (0, 1]; got nan."),
    ({"image": IMAGE, "strength": 0}, "strength must be a number in (0, 1]; got 0."),
    ({"image": IMAGE, "strength": -0.5}, "strength must be a number in (0, 1]; got -0.5."),
    ({"image": IMAGE, "strength": "0.5"}, "strength must be a number in (0, 1]; got '0.5'."),
    ({"callback_on_step_end": 3}, "callback_on_step_end must be a function of pipe, i, t and "
                                  "{'latents': x0}, or None; got 3."),
    ({"callback_on_step_end": lambda *_: {"latents": None}}, "callback_on_step_end returned latents of "
     "NoneType after step 1; return the shape of x0, [1, 16, 8, 8]."),
])  # fmt: skip
def test_a_pipeline_says_what_is_wrong_with_an_argument(pipe, given, said):
    with pytest.raises(ValueError) as raised:
        pipe("a dog", seed=0, output_type="latent", **given)
    assert str(raised.value) == said


def test_a_callback_may_return_nothing_or_no_latents(pipe):
    plain = pipe("a dog", seed=0, output_type="latent").images
    for told in (None, {}):
        again = pipe("a dog", seed=0, output_type="latent", callback_on_step_end=lambda *_, t=told: t).images
        assert torch.equal(again, plain)


@pytest.mark.parametrize("dtype", ["float8", torch.float64, torch.float8_e4m3fn, None, 16])
def test_a_type_in_which_no_model_samples_is_refused_with_those_that_do(dtype, capsys):
    with pytest.raises(
        ValueError, match=r"^dtype must be one of torch\.float32, torch\.bfloat16, torch\.float16; got "
    ) as raised:
        scalewise.load("mini", dtype=dtype)
    assert f"got {dtype!r}." in str(raised.value) and capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_type_may_be_given_by_name(dtype):
    pipeline = scalewise.load("mini", student=None, schedule="1000@8 602@16", dtype=dtype)
    assert pipeline.transformer.dtype == torch.bfloat16


def test_an_option_that_load_does_not_take_is_named_with_the_right_one():
    with pytest.raises(TypeError, match=r"takes dtype, not torch_dtype; use load\(\.\.\., dtype=torch"):
        scalewise.load("mini", torch_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"load has no argument 'varient'; .*variant"):
        scalewise.load("mini", varient="fp16")


@pytest.mark.parametrize(("base", "said"), [
    ("nothere", "Cannot find the model 'nothere': there is no such folder"),
    ("./nothere", "nothere is not a model folder"),
])  # fmt: skip
def test_a_base_that_does_not_exist_is_named_before_the_student_that_would_not_fit(base, said):
    with pytest.raises(ModelError, match=said):
        scalewise.load(base)

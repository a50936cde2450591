"""Samplers: the teacher's equals diffusers' pipeline, the student's equals its components called by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from scalewise.method.noise import FlowMatching
from scalewise.method.rng import SampleNoise
from scalewise.method.sampling import sample_scale_wise, sample_student, sample_teacher, sample_with_scheduler
from scalewise.method.scales import Scale, ScaleSchedule, upscale_latents

PROMPTS = ["a red apple", "a dog"]
PROCESS = FlowMatching()


class Recorder:
    """A model of known answers that keeps what it was asked; x0 = 0.5 x_t + 0.1 unless told otherwise."""

    def __init__(self, answer=lambda x_t: 0.5 * x_t + 0.1) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.asked.append((x_t, t.tolist()))
        return self.answer(x_t)


def silence(shape, device="cpu") -> torch.Tensor:
    return torch.zeros(2, *shape)


def follow():
    """A list, and an `on_step` that puts x0 of every step into it."""
    found = []

    def on_step(i: int, x0: torch.Tensor) -> None:
        assert i == len(found)
        found.append(x0)

    return found, on_step


def run(predict, schedule: ScaleSchedule, noise, **options) -> list[torch.Tensor]:
    """x0 of every step."""
    found, on_step = follow()
    sample = sample_scale_wise(predict, schedule, PROCESS, noise, channels=3, on_step=on_step, **options)
    assert sample is found[-1]
    return found


def test_the_teachers_sampler_follows_the_straight_path_of_a_known_x0():
    truth, shape = SampleNoise([8, 9])((3, 4, 6)), (3, 4, 6)
    recorder = Recorder(lambda x_t: truth)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    steps, on_step = follow()
    sample = sample_with_scheduler(
        recorder, scheduler, PROCESS, SampleNoise([0, 1]), shape=shape, on_step=on_step
    )
    assert len(steps) == 3 and all(x0 is truth for x0 in steps)
    torch.testing.assert_close(sample, truth, rtol=1e-5, atol=1e-5)
    eps = SampleNoise([0, 1])(shape)
    for (x_t, t), sigma in zip(recorder.asked, [1.0, 0.7, 0.2], strict=True):
        assert t == pytest.approx([1000 * sigma] * 2)
        torch.testing.assert_close(x_t, (1 - sigma) * truth + sigma * eps, rtol=1e-5, atol=1e-5)


def test_one_step_is_one_prediction_from_pure_noise(make_backbone):
    backbone, schedule = make_backbone("student"), ScaleSchedule.build([1000], ["8x12"])
    cond = backbone.model.encode_prompts(PROMPTS)
    steps, on_step = follow()
    sample = sample_student(backbone, schedule, cond, [3, 4], on_step=on_step)
    with torch.no_grad():
        x0 = backbone.predict_x0(
            SampleNoise([3, 4])((4, 8, 12)), torch.full((2,), 1000.0), cond, role="student"
        )
    assert len(steps) == 1
    assert torch.equal(steps[0], x0) and torch.equal(sample, x0)


def test_a_constant_schedule_is_plain_multistep_sampling(make_backbone):
    backbone = make_backbone("student", "fake")
    schedule = ScaleSchedule.build([1000, 895.9, 602.1], [8, 8, 8])
    cond, noise = backbone.model.encode_prompts(PROMPTS), SampleNoise([3, 4])
    x = noise((4, 8, 8))
    found = {}
    for role in ("student", "fake"):
        found[role], on_step = follow()
        sample_student(backbone, schedule, cond, [3, 4], role=role, on_step=on_step)
    with torch.no_grad():
        for i, t in enumerate([1000.0, 895.9, 602.1]):
            x0 = backbone.predict_x0(x, torch.full((2,), t), cond, role="student")
            assert torch.equal(found["student"][i], x0)
            sigma = torch.tensor([895.9, 602.1, 0.0])[i] / 1000
            x = (1 - sigma) * x0 + sigma * noise((4, 8, 8))
    assert not torch.allclose(found["student"][-1], found["fake"][-1], atol=1e-2)


def test_every_step_works_at_its_own_scale_and_level():
    schedule, predict = ScaleSchedule.build([1000, 800, 600], ["4x6", "6x6", "8x12"]), Recorder()
    outputs = run(predict, schedule, SampleNoise([0, 1]))
    shapes = [(2, 3, 4, 6), (2, 3, 6, 6), (2, 3, 8, 12)]
    assert [tuple(x0.shape) for x0 in outputs] == shapes
    assert [tuple(x_t.shape) for x_t, _ in predict.asked] == shapes
    assert [t for _, t in predict.asked] == [[1000.0] * 2, [800.0] * 2, [600.0] * 2]


def test_x0_is_upscaled_and_not_the_noisy_latent():
    # Without noise, what the next step sees is the upscaled x0, weighted for its level, and nothing of x_t.
    answers = iter([SampleNoise([5, 6])((3, 4, 6)), SampleNoise([7, 8])((3, 6, 8)), torch.zeros(2, 3, 8, 12)])
    predict = Recorder(lambda x_t: next(answers))
    outputs = run(predict, ScaleSchedule.build([1000, 800, 600], ["4x6", "6x8", "8x12"]), silence)
    for i, (sigma, scale) in enumerate([(0.8, Scale(1, 6, 8)), (0.6, Scale(1, 8, 12))]):
        x_t, _ = predict.asked[i + 1]
        torch.testing.assert_close(x_t, (1 - sigma) * upscale_latents(outputs[i], scale))


@pytest.mark.parametrize("scales", [["4x6", "4x6", "4x6"], ["4x6", "6x8", "8x12"]])
def test_fresh_noise_is_added_after_every_step_also_when_the_scale_stays(scales):
    predict, noise = Recorder(torch.zeros_like), SampleNoise([0, 1])
    run(predict, ScaleSchedule.build([1000, 800, 600], scales), noise)
    expected = SampleNoise([0, 1])
    for (x_t, _), scale, sigma in zip(predict.asked, scales, [1.0, 0.8, 0.6], strict=True):
        eps = expected((3, *Scale.parse(scale).size))
        torch.testing.assert_close(
            x_t, sigma * eps
        )  # noised after upscaling: unsmoothed, and new at each step


def test_video_grows_in_time_too():
    schedule, predict = ScaleSchedule.build([1000, 800], ["2x4x6", "3x8x8"]), Recorder()
    outputs = run(predict, schedule, silence, video=True)
    assert [tuple(x0.shape) for x0 in outputs] == [(2, 3, 2, 4, 6), (2, 3, 3, 8, 8)]
    torch.testing.assert_close(predict.asked[1][0], 0.2 * upscale_latents(outputs[0], Scale(3, 8, 8)))


@pytest.mark.parametrize("asked", [True, False])
def test_samplers_keep_no_graph_and_leave_the_callers_gradient_mode_alone(make_backbone, asked):
    backbone = make_backbone("student")
    cond, schedule = backbone.model.encode_prompts(PROMPTS), ScaleSchedule.build([1000, 800], [4, 8])
    found, on_step = follow()
    with torch.set_grad_enabled(asked):
        student = sample_student(backbone, schedule, cond, [0, 1], on_step=on_step)
        teacher = sample_teacher(backbone, Scale(1, 4, 4), cond, [0, 1], steps=2, guidance=1.0)
        assert torch.is_grad_enabled() == asked
    assert not any(x.requires_grad for x in (*found, student, teacher))
    assert backbone.roles.current == "teacher"


def test_what_on_step_returns_takes_the_place_of_x0_for_the_student():
    schedule, other = ScaleSchedule.build([1000, 800], ["4x6", "8x12"]), torch.full((2, 3, 4, 6), 7.0)
    predict = Recorder()
    sample = sample_scale_wise(
        predict, schedule, PROCESS, silence, channels=3, on_step=lambda i, x0: other if i == 0 else None
    )
    expected = 0.2 * upscale_latents(other, Scale(1, 8, 12))
    torch.testing.assert_close(predict.asked[1][0], expected)
    torch.testing.assert_close(sample, 0.5 * expected + 0.1)  # a step for which it returns None keeps its x0


def test_what_on_step_returns_takes_the_place_of_x0_for_the_teacher():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    other = torch.full((2, 3, 4, 6), 7.0)
    sample = sample_with_scheduler(
        Recorder(), scheduler, PROCESS, SampleNoise([0, 1]), shape=(3, 4, 6), on_step=lambda i, x0: other
    )
    torch.testing.assert_close(sample, other, rtol=1e-5, atol=1e-5)

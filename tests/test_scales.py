"""Scales, schedules and resizing."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F

from scalewise.method.scales import (
    Scale,
    ScaleSchedule,
    blend_frames,
    downscale_area,
    shifted_sigmas,
    upscale_latents,
)


def says(*parts: str) -> str:
    """A pattern for `match` that wants all parts, in order."""
    return ".*".join(re.escape(part) for part in parts)


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("16", Scale(1, 16, 16)),
        (16, Scale(1, 16, 16)),
        ("16x24", Scale(1, 16, 24)),
        ("1x16x24", Scale(1, 16, 24)),
        ("21x60x104", Scale(21, 60, 104)),
        (Scale(2, 3, 4), Scale(2, 3, 4)),
    ],
)
def test_scales_are_read_as_they_are_written(text, scale):
    assert Scale.parse(text) == scale
    assert Scale.parse(str(scale)) == scale


def test_a_scale_is_written_without_the_frame_of_an_image():
    assert [str(Scale.parse(text)) for text in ("16", "1x8x12", "6x20x34")] == ["16x16", "8x12", "6x20x34"]


@pytest.mark.parametrize("text", ["", "x", "16x", "x16", "1.5", "-4", "16 x 24", "2x3x4x5", "16X24"])
def test_a_scale_that_cannot_be_read_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=says(repr(text), "write 16, 16x24 or 21x60x104")):
        Scale.parse(text)


def test_a_scale_without_cells_is_refused():
    with pytest.raises(ValueError, match=says("at least 1", "1x0x4")):
        Scale.parse("0x4")


def test_a_scale_covers_another_only_when_no_axis_is_smaller():
    assert Scale(2, 4, 6).covers(Scale(2, 4, 6))
    assert Scale(2, 4, 6).covers(Scale(1, 4, 5))
    for larger in (Scale(3, 4, 6), Scale(2, 5, 6), Scale(2, 4, 7)):
        assert not Scale(2, 4, 6).covers(larger)


def test_shapes_have_a_frame_axis_only_for_video():
    assert Scale(1, 4, 6).shape(2, 16) == (2, 16, 4, 6)
    assert Scale(5, 4, 6).shape(2, 16, video=True) == (2, 16, 5, 4, 6)


def test_a_step_takes_its_source_from_the_scale_before_and_the_first_from_itself():
    schedule = ScaleSchedule.build([1000, 800, 600], ["4", "6x8", "8x12"])
    assert [str(schedule.source(i)) for i in range(3)] == ["4x4", "4x4", "6x8"]
    assert [str(schedule.target(i)) for i in range(3)] == ["4x4", "6x8", "8x12"]
    assert schedule.full == Scale(1, 8, 12)
    assert schedule.timesteps == (1000.0, 800.0, 600.0)
    assert str(schedule) == "1000@4x4 800@6x8 600@8x12"


def test_the_full_scale_baseline_keeps_the_timesteps():
    schedule = ScaleSchedule.build([1000, 800.5], [4, 8]).at_full_scale()
    assert schedule.timesteps == (1000, 800.5)
    assert schedule.scales == (Scale(1, 8, 8), Scale(1, 8, 8))


@pytest.mark.parametrize(
    ("timesteps", "scales", "parts"),
    [
        ([], [], ("at least one step", "give timesteps and scales")),
        ([1000, 800, 600], [4, 8], ("3 timesteps", "2 scales", "the lengths must match")),
        ([1000, 800, 801], [4, 6, 8], ("801 follows 800", "must decrease")),
        ([1000, 800, 800], [4, 6, 8], ("800 follows 800", "must decrease")),
        ([1001, 800], [4, 8], ("1001", "(0, 1000]", "1000 x sigma")),
        ([1000, 0], [4, 8], ("Timestep 0", "(0, 1000]", "1000 x sigma")),
        ([1000, float("nan")], [4, 8], ("Timestep nan", "(0, 1000]")),
        ([1000, 800], [8, 6], ("6x6 follows 8x8", "must not shrink", "at least 8x8")),
        ([1000, 800], ["8x4", "6x12"], ("6x12 follows 8x4", "must not shrink", "at least 8x12")),
        ([1000, 800], ["3x4x4", "2x8x8"], ("2x8x8 follows 3x4x4", "at least 3x8x8")),
    ],
)
def test_a_schedule_that_cannot_be_right_is_refused_with_the_value_and_a_remedy(timesteps, scales, parts):
    with pytest.raises(ValueError, match=says(*parts)):
        ScaleSchedule.build(timesteps, scales)


def test_a_scale_that_the_patch_does_not_divide_is_refused_with_one_that_it_does():
    schedule = ScaleSchedule.build([1000, 800], ["8", "8x11"])
    with pytest.raises(ValueError, match=says("8x11", "patch size 2", "nearest valid side is 12")):
        schedule.check(patch=2)
    schedule.check(patch=1)


def test_a_last_scale_that_is_not_the_full_size_is_refused():
    schedule = ScaleSchedule.build([1000, 800], [8, 12])
    with pytest.raises(ValueError, match=says("12x12", "16x16", "end the schedule with 16x16")):
        schedule.check(patch=1, full=Scale(1, 16, 16))
    schedule.check(patch=2, full=Scale(1, 12, 12))


def test_a_scale_beyond_the_position_table_is_refused():
    schedule = ScaleSchedule.build([1000, 800], ["8", "8x16"])
    with pytest.raises(ValueError, match=says("8x16", "12x12", "position embeddings")):
        schedule.check(patch=2, largest=Scale(1, 12, 12))
    schedule.check(patch=2, largest=Scale(1, 8, 16))


def test_a_schedule_is_carried_over_to_a_non_square_size_axis_by_axis():
    schedule = ScaleSchedule.build([1000, 900, 800, 700], [8, 10, 12, 16])
    wide = schedule.for_size(Scale(1, 16, 24))
    assert [str(s) for s in wide.scales] == ["8x12", "10x15", "12x18", "16x24"]
    assert wide.timesteps == schedule.timesteps
    assert [str(s) for s in schedule.for_size(Scale(1, 24, 8), patch=2).scales] == [
        "12x4",
        "16x4",
        "18x6",
        "24x8",
    ]
    assert schedule.for_size(schedule.full) == schedule


def test_a_schedule_for_another_size_fits_the_patch_and_never_shrinks():
    # The constructor itself refuses shrinking scales; check() refuses what the patch does not divide.
    schedule = ScaleSchedule.build([1000, 900, 800, 700], ["6x20x34", "11x30x52", "16x40x70", "21x60x104"])
    draw = random.Random(0)
    for _ in range(200):
        patch = draw.choice([1, 2, 4])
        full = Scale(draw.randint(1, 30), patch * draw.randint(1, 40), patch * draw.randint(1, 40))
        other = schedule.for_size(full, patch)
        other.check(patch=patch, full=full)
        for mine, theirs in zip(other.scales, schedule.scales, strict=True):
            assert abs(mine.height - theirs.height * full.height / 60) <= patch
            assert abs(mine.width - theirs.width * full.width / 104) <= patch
            assert abs(mine.frames - theirs.frames * full.frames / 21) <= 1


@pytest.mark.parametrize(
    ("timesteps", "scales", "tokens", "full"),
    [
        ((1000, 945, 896, 790, 737, 602), (32, 48, 64, 80, 96, 128), 9856, 24576),  # SD3.5 Medium
        ((1000, 896, 737, 602), (64, 80, 96, 128), 9024, 16384),  # SD3.5 Large
        ((1000, 945, 790, 602), (32, 64, 96, 128), 7680, 16384),  # FLUX.1-dev
        (
            (1000, 896, 737, 602),
            ("6x20x34", "11x30x52", "16x40x70", "21x60x104"),
            49270,
            131040,
        ),  # Wan2.1-1.3B
    ],
)
def test_token_counts_of_the_papers_set_ups(timesteps, scales, tokens, full):
    schedule = ScaleSchedule.build(timesteps, scales)
    schedule.check(patch=2)
    assert schedule.tokens(2) == tokens
    assert schedule.at_full_scale().tokens(2) == full


def test_upscaling_to_the_same_size_returns_the_very_same_latents():
    image, video = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 4, 6)
    assert upscale_latents(image, Scale(1, 4, 6)) is image
    assert upscale_latents(video, Scale(5, 4, 6)) is video


def test_upscaling_is_bicubic_without_aligned_corners_and_keeps_height_and_width_apart():
    x0 = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    up = upscale_latents(x0, Scale(1, 6, 12))
    assert up.shape == (2, 3, 6, 12)
    assert torch.equal(
        up, F.interpolate(x0, size=(6, 12), mode="bicubic", align_corners=False, antialias=False)
    )
    assert not torch.allclose(up, F.interpolate(x0, size=(6, 12), mode="bicubic", align_corners=True))


def test_video_is_upscaled_frame_by_frame_then_blended_in_time():
    x0 = torch.randn(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    up = upscale_latents(x0, Scale(5, 6, 9))
    assert up.shape == (2, 3, 5, 6, 9)
    frames = [upscale_latents(x0[:, :, i], Scale(1, 6, 9)) for i in range(3)]
    # Five frames over three: the ends and the middle are old frames, the others halves of their neighbours.
    torch.testing.assert_close(up[:, :, 0::2], torch.stack(frames, 2))
    torch.testing.assert_close(up[:, :, 1], (frames[0] + frames[1]) / 2)
    torch.testing.assert_close(up[:, :, 3], (frames[1] + frames[2]) / 2)


@pytest.mark.parametrize(("have", "frames"), [(6, 11), (11, 16), (16, 21), (2, 7), (21, 11)])
def test_blending_keeps_the_end_frames_and_a_linear_ramp_linear(have, frames):
    ramp = torch.arange(have, dtype=torch.float32).view(1, 1, have, 1, 1).expand(2, 3, have, 4, 5)
    blended = blend_frames(ramp, frames)
    assert blended.shape == (2, 3, frames, 4, 5)
    assert torch.equal(blended[:, :, 0], ramp[:, :, 0])
    assert torch.equal(blended[:, :, -1], ramp[:, :, -1])
    torch.testing.assert_close(blended[1, 2, :, 3, 4], torch.linspace(0, have - 1, frames))


def test_a_single_frame_is_repeated():
    frame = torch.randn(2, 3, 1, 4, 5)
    assert torch.equal(blend_frames(frame, 4), frame.expand(2, 3, 4, 4, 5))


def test_latents_without_batch_are_refused():
    with pytest.raises(ValueError, match=says("[N, C, H, W]", "[N, C, T, H, W]", "[3, 4, 4]")):
        upscale_latents(torch.zeros(3, 4, 4), Scale(1, 8, 8))


def test_area_downscaling_averages_blocks_and_keeps_the_mean():
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    down = downscale_area(x, (4, 6))
    torch.testing.assert_close(down, x.reshape(2, 3, 4, 2, 6, 2).mean((3, 5)))
    assert downscale_area(x, (8, 12)) is x


@pytest.mark.parametrize("size", [(9, 4), (4, 13)])
def test_area_downscaling_refuses_to_enlarge(size):
    with pytest.raises(ValueError, match=says("cannot enlarge [8, 12] to", str(list(size)))):
        downscale_area(torch.zeros(1, 1, 8, 12), size)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 1.0), (4, 3.0), (50, 0.5)])
def test_shifted_schedules_fall_from_1_to_0(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert all(before > after for before, after in itertools.pairwise(sigmas))


def test_a_schedule_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="number of steps must be at least 1; got 0"):
        shifted_sigmas(0, 3.0)


def test_a_schedule_is_read_from_what_it_prints():
    schedule = ScaleSchedule.build([1000, 800.5, 600], ["2x4x6", "3x4x6", "3x8x12"])
    assert ScaleSchedule.parse(str(schedule)) == schedule
    assert ScaleSchedule.parse("1000@8 600@16x24") == ScaleSchedule.build([1000, 600], [8, "16x24"])


@pytest.mark.parametrize("text", ["1000", "1000@8 600", "t@8", ""])
def test_a_schedule_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"Cannot parse the schedule.*1000@64 896@80"):
        ScaleSchedule.parse(text)


def test_a_schedule_that_makes_no_sense_says_why_also_when_it_was_read():
    with pytest.raises(ValueError, match="timesteps must decrease"):
        ScaleSchedule.parse("600@8 1000@16")

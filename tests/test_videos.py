"""The video mini: captions and descriptions, deterministic videos, and the rules of its judge."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scalewise.metrics import EXTRAS, METRICS, ImageFeatures, measure
from scalewise.metrics.clip import from_bytes
from scalewise.metrics.motion import (
    KINDS,
    MotionJudge,
    follows,
    link,
    motion_matches,
    things_match,
    track_fidelity,
)
from scalewise.mini.grammar import BACKGROUNDS, THINGS, CaptionError
from scalewise.mini.motions import (
    CROSS,
    GROUNDS,
    LEFT,
    MOTIONS,
    MOVING,
    RIGHT,
    TURN,
    Motion,
    all_captions,
    all_descriptions,
    motion_captions,
    motion_vocabulary,
    parse_motion,
)
from scalewise.mini.scenes import drawing
from scalewise.mini.video_detector import (
    CLEAN,
    Frame,
    Seen,
    VideoDetector,
    center_cell,
    decode_pose,
    encode_pose,
    load_video_detector,
    read_frames,
)
from scalewise.mini.videos import (
    FRAMES,
    SIDE,
    SIZE,
    Pose,
    course,
    draw_thing,
    layouts,
    random_video,
    render_video,
    render_videos,
    video_of,
)

SINGLE = [motion for motion in MOTIONS if motion != CROSS]


def seen_frames(video):
    """What a detector without errors reads from a video."""
    ground = video.description.background
    return [Frame(ground, tuple(Seen(t.thing, t.poses[i], 0.9) for t in video.tracks)) for i in range(FRAMES)]


def test_every_caption_is_parsed_back_and_names_one_description():
    seen = {}
    for described in all_descriptions():
        for caption in all_captions(described):
            assert parse_motion(caption) == described
            assert seen.setdefault(caption, described) == described
    assert len(seen) == sum(len(all_captions(described)) for described in all_descriptions())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A rocket moving to the left on a white background.", (("rocket",), "left", "white")),
        ("an umbrella getting larger, pink background", (("umbrella",), "grow", "pink")),
        ("a crab and a cat passing each other, gray background", (("cat", "crab"), "cross", "gray")),
    ],
)
def test_captions_are_parsed(caption, expected):
    assert parse_motion(caption) == Motion(*expected)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dragon flying on a white background", "does not know: dragon, flying"),
        ("a cat on a white background", "does not have the form"),
        ("a cat and a cat crossing on a white background", "does not have the form"),
        ("a cat and a crab turning on a white background", "does not have the form"),
        ("", "does not have the form"),
    ],
)
def test_other_texts_are_refused_with_the_reason(caption, message):
    with pytest.raises(CaptionError, match=message):
        parse_motion(caption)
    with pytest.raises(CaptionError, match=message):
        EXTRAS["motion"].check([caption])


def test_one_combination_in_five_is_held_out_and_every_thing_is_trained_in_every_motion():
    described = list(all_descriptions())
    assert 0.15 < sum(one.held_out for one in described) / len(described) < 0.25
    trained = Counter((one.things, one.motion) for one in described if not one.held_out)
    assert len(trained) == len({(one.things, one.motion) for one in described})
    held_out = Counter(one.motion for one in described if one.held_out)
    assert min(held_out[motion] for motion in MOTIONS) >= 5


def test_lists_of_captions_are_separate_and_take_the_motions_in_turn():
    test, train = motion_captions(held_out=True), motion_captions(held_out=False)
    assert {parse_motion(c).held_out for c in test} == {True}
    assert {parse_motion(c).held_out for c in train} == {False}
    assert len(set(test) | set(train)) == sum(len(all_captions(d)) for d in all_descriptions())
    assert [parse_motion(c).motion for c in test[:16]] == [*MOTIONS, *MOTIONS]
    first = [parse_motion(c) for c in test[: 8 * 5]]
    assert len(set(first)) == len(first), "a combination comes twice before others come once"


def test_the_words_are_few_and_the_things_are_those_of_the_images():
    assert 40 <= len(motion_vocabulary()) <= 50
    assert set(MOVING) <= set(THINGS) and set(GROUNDS) <= set(BACKGROUNDS)


def test_courses_are_what_their_names_say():
    first, last = ({motion: course(motion)[i] for motion in SINGLE} for i in (0, -1))
    assert (last["left"].x - first["left"].x, last["right"].x - first["right"].x) == (-32, 32)
    assert (last["up"].y - first["up"].y, last["down"].y - first["down"].y) == (-32, 32)
    assert (first["grow"].size, last["grow"].size) == (24, 48)
    assert (first["shrink"].size, last["shrink"].size) == (48, 24)
    assert (first["turn"].angle, last["turn"].angle) == (0, 90)


def test_things_stay_in_the_frame_and_two_things_do_not_overlap():
    for described in all_descriptions():
        if described.background != "white":
            continue
        for tracks in layouts(described):
            for poses in zip(*(track.poses for track in tracks), strict=True):
                for pose in poses:
                    edges = (pose.x - pose.size / 2, pose.y - pose.size / 2)
                    assert min(edges) >= 0 and max(edges) + pose.size <= SIDE
                if len(poses) == 2:
                    assert abs(poses[0].y - poses[1].y) >= SIZE
        assert len(set(layouts(described))) == {CROSS: 4}.get(
            described.motion, 9 if described.motion in ("turn", "grow", "shrink") else 5
        )


def test_movements_repeat_exactly_every_two_frames_shifted_by_a_latent_cell():
    video = video_of("a car moving to the right on a pink background", random.Random(0))
    frames = render_video(video).astype(int)
    for i in range(1, FRAMES - 2):
        assert (frames[i + 2][:, 8:] == frames[i][:, :-8]).all()


def test_a_frame_shows_the_drawing_at_its_pose_and_the_background_elsewhere():
    video = video_of("a frog falling on a purple background", random.Random(1))
    frames, [track] = render_video(video), video.tracks
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8
    for frame, pose in zip(frames, track.poses, strict=True):
        left, top = int(pose.x) - SIZE // 2, int(pose.y) - SIZE // 2
        outside = np.ones((SIDE, SIDE), bool)
        outside[max(top - 1, 0) : top + SIZE + 1, max(left - 1, 0) : left + SIZE + 1] = False
        assert (frame[outside] == BACKGROUNDS["purple"]).all()
        page = np.full((SIZE, SIZE, 3), BACKGROUNDS["purple"], np.float64)
        sprite = np.asarray(drawing("noto", "frog", None, SIZE), np.float64)
        alpha = sprite[..., 3:] / 255
        page = page * (1 - alpha) + sprite[..., :3] * alpha
        found = frame[top : top + SIZE, left : left + SIZE]
        assert np.abs(found - page).mean() < 3  # another filter, the same drawing


def test_a_turn_by_ninety_degrees_is_clockwise():
    frames = np.full((2, SIDE, SIDE, 3), 255, np.float32)
    draw_thing(frames[0], "rocket", Pose(32, 32))
    draw_thing(frames[1], "rocket", Pose(32, 32, angle=90))
    assert np.abs(frames[1] - np.rot90(frames[0], -1)).mean() < 0.01


def test_parts_outside_the_frame_are_left_out():
    page = np.full((SIDE, SIDE, 3), 255, np.float32)
    draw_thing(page, "cat", Pose(0, 0))
    assert (page[SIZE:] == 255).all() and (page[:8, :8] != 255).any()
    before = page.copy()
    draw_thing(page, "cat", Pose(-100, 200))
    assert (page == before).all()


def test_videos_are_deterministic_and_differ_by_seed():
    captions = motion_captions(held_out=True)[:16]
    first, again, other = (render_videos(captions, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    with pytest.raises(CaptionError, match="dragon"):
        render_videos(["a dragon"])


def test_random_videos_are_trained_or_held_out_as_asked():
    rng = random.Random(0)
    for held_out in (False, True):
        videos = [random_video(rng, held_out=held_out) for _ in range(100)]
        assert {video.description.held_out for video in videos} == {held_out}
        assert all(parse_motion(video.caption) == video.description for video in videos)
    assert random_video(rng, motion=TURN).description.motion == TURN


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_true_video_has_its_own_motion_and_no_other(motion):
    rng = random.Random(motion)
    for _ in range(5):
        video = random_video(rng, motion=motion)
        frames = seen_frames(video)
        assert things_match(frames, video.description)
        tracks = link(frames, len(video.description.things))
        assert [other for other in SINGLE if follows([s.pose for s in tracks[0]], other)] == (
            [motion] if motion != CROSS else [LEFT if tracks[0][0].pose.x > 32 else RIGHT]
        )
        assert motion_matches(tracks, motion)


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (lambda i, p: replace(p, x=p.x + 3 * (-1) ** i), True),
        (lambda i, p: replace(p, x=p.x + 9), True),  # elsewhere, the same motion
        (lambda i, p: replace(p, size=p.size + 5, angle=p.angle + 20), True),
        (lambda i, p: replace(p, x=32), False),
        (lambda i, p: replace(p, x=64 - p.x), False),
        (lambda i, p: replace(p, y=p.y + 4 * i), False),
        (lambda i, p: replace(p, size=p.size + 7), False),
        (lambda i, p: replace(p, angle=p.angle + 30), False),
        (lambda i, p: replace(p, x=p.x + 20 * (i == 4)), False),  # one frame jumps
    ],
)
def test_a_track_that_leaves_the_course_does_not_match(change, still):
    video = video_of("a car moving to the left on a white background", random.Random(2))
    poses = [change(i, pose) for i, pose in enumerate(video.tracks[0].poses)]
    assert follows(poses, LEFT) == still


def test_angles_are_compared_on_the_circle():
    poses = [replace(p, x=32, y=32, angle=p.angle - 360) for p in course(TURN)]
    assert follows(poses, TURN)


def test_two_things_are_followed_when_the_order_of_detections_changes():
    video = video_of("a cat and a rocket crossing on a white background", random.Random(3))
    frames = seen_frames(video)
    mixed = [replace(f, found=f.found[::-1]) if i % 2 else f for i, f in enumerate(frames)]
    tracks = link(mixed, 2)
    assert [[seen.thing for seen in track] for track in tracks] in (
        [["cat"] * 9, ["rocket"] * 9], [["rocket"] * 9, ["cat"] * 9]
    )  # fmt: skip
    assert motion_matches(tracks, CROSS)
    same_way = [tracks[0], [replace(s, pose=replace(s.pose, y=64 - s.pose.y)) for s in tracks[0]]]
    assert not motion_matches(same_way, CROSS)


def test_a_lost_added_or_changed_thing_does_not_match():
    video = video_of("a cat falling on a white background", random.Random(4))
    frames, wanted = seen_frames(video), video.description
    lost = [*frames[:4], replace(frames[4], found=()), *frames[5:]]
    assert not things_match(lost, wanted) and link(lost, 1) == [] and not motion_matches([], "down")
    more = replace(frames[4], found=(*frames[4].found, Seen("crab", Pose(8, 8), 0.4)))
    assert not things_match([*frames[:4], more, *frames[5:]], wanted)
    other = replace(frames[4], found=(replace(frames[4].found[0], thing="crab"),))
    changed = [*frames[:4], other, *frames[5:]]
    assert not things_match(changed, wanted) and motion_matches(link(changed, 1), "down")


def test_fidelity_is_one_for_renders_and_finds_the_frame_that_is_wrong():
    for motion in MOTIONS:
        video = random_video(random.Random(5), motion=motion)
        pixels, frames = from_bytes(render_video(video)), seen_frames(video)
        grounds = [frame.background for frame in frames]
        tracks = link(frames, len(video.description.things))
        values = track_fidelity(pixels, tracks, grounds)
        assert float(values.min()) > 0.99, motion
        assert float(track_fidelity(torch.roll(pixels, (2, -1), (2, 3)), tracks, grounds).mean()) > 0.95
        broken = pixels.clone()
        broken[6] = torch.nn.functional.avg_pool2d(pixels[6], 7, 1, 3)
        worse = track_fidelity(broken, tracks, grounds)
        assert float(worse[6]) < 0.9 and torch.equal(worse[:6], values[:6])
        assert track_fidelity(pixels, [], grounds).tolist() == [0] * FRAMES


def test_fidelity_compares_with_the_thing_that_is_seen_most_often():
    video = video_of("a cat falling on a white background", random.Random(6))
    pixels, frames = from_bytes(render_video(video)), seen_frames(video)
    frames[3] = replace(frames[3], found=(replace(frames[3].found[0], thing="crab"),))
    assert float(track_fidelity(pixels, link(frames, 1), ["white"] * FRAMES).min()) > 0.99
    crab = render_videos(["a crab falling on a white background"])
    pixels[3] = from_bytes(crab[0])[3]
    assert float(track_fidelity(pixels, link(frames, 1), ["white"] * FRAMES)[3]) < 0.8


def test_poses_are_encoded_and_decoded():
    rng = random.Random(7)
    for _ in range(100):
        pose = Pose(rng.uniform(0, 63.9), rng.uniform(0, 63.9), rng.uniform(20, 52), rng.uniform(-170, 170))
        found = decode_pose(*center_cell(pose), encode_pose(pose))
        for name in ("x", "y", "size", "angle"):
            assert getattr(found, name) == pytest.approx(getattr(pose, name), abs=1e-3)
    assert center_cell(Pose(-5, 70)) == (15, 0)


class PerfectDetector(VideoDetector):
    """Returns the given content as the network's output."""

    def __init__(self, frames):
        super().__init__()
        self.frames = list(frames)

    def forward(self, x):
        found = super().forward(x)
        for maps in (found.things, found.offsets, found.sizes, found.angles, found.background):
            maps.zero_()
        found.things.sub_(9)
        for n, frame in enumerate(self.frames[: len(x)]):
            found.background[n, GROUNDS.index(frame.background)] = 9
            for seen in frame.found:
                row, column = center_cell(seen.pose)
                values = torch.tensor(encode_pose(seen.pose))
                found.things[n, MOVING.index(seen.thing), row, column] = 4
                found.offsets[n, :, row, column] = values[:2]
                found.sizes[n, :, row, column] = values[2:3]
                found.angles[n, :, row, column] = values[3:]
        del self.frames[: len(x)]
        return found


def test_the_output_of_the_network_is_read_as_poses():
    video = video_of("a cat and a rocket crossing on a pink background", random.Random(8))
    frames = seen_frames(video)
    found = read_frames(PerfectDetector(frames), torch.zeros(FRAMES, 3, SIDE, SIDE))
    for one, other in zip(found, frames, strict=True):
        assert one.background == "pink" and len(one.found) == 2
        by_name = {seen.thing: seen.pose for seen in one.found}
        for seen in other.found:
            assert by_name[seen.thing].x == pytest.approx(seen.pose.x, abs=1e-3)
            assert by_name[seen.thing].y == pytest.approx(seen.pose.y, abs=1e-3)


def judged(videos, captions, *, images=None, clean=0.5):
    """Outputs of the judge on videos whose frames are read without error."""
    judge = MotionJudge(PerfectDetector(f for video in videos for f in seen_frames(video)), clean)
    images = np.stack([render_video(video) for video in videos]) if images is None else images
    return judge.extract(images, captions)


def test_true_videos_have_full_scores_and_each_counts_for_its_kind():
    videos = [random_video(random.Random(9), held_out=True, motion=motion) for motion in MOTIONS]
    scores = judged(videos, [video.caption for video in videos])
    for name in ("match", "things", "motion", "clean"):
        assert scores[f"video_{name}"].tolist() == [1.0] * len(MOTIONS)
    assert float(scores["video_steadiness"].min()) > 0.99
    for kind, motions in KINDS.items():
        assert [not v for v in scores[f"video_{kind}"].isnan().tolist()] == [m in motions for m in MOTIONS]
    metrics = measure(ImageFeatures(None, torch.arange(len(videos)), None, outputs=scores))
    assert set(metrics) == {metric.name for metric in EXTRAS["motion"].metrics} <= set(METRICS)
    assert metrics["video_match"].value == 1 and metrics["video_turning"].value == 1


@pytest.mark.parametrize(
    ("drawn", "asked", "things", "motion"),
    [
        ("a cat rising on a white background", "a crab rising on a white background", 0, 1),
        ("a cat rising on a white background", "a cat falling on a white background", 1, 0),
        ("a cat rising on a white background", "a cat growing on a white background", 1, 0),
        ("a cat rising on a white background", "a cat rising on a pink background", 1, 1),
        (
            "a cat and a crab crossing on a white background",
            "a cat and a car crossing on a white background",
            0,
            1,
        ),
    ],
)
def test_a_video_of_something_else_does_not_match(drawn, asked, things, motion):
    scores = judged([video_of(drawn, random.Random(10))], [asked])
    assert (float(scores["video_things"]), float(scores["video_motion"])) == (things, motion)
    assert float(scores["video_match"]) == 0


def test_an_unclean_frame_makes_a_video_unclean():
    video = video_of("a cat rising on a white background", random.Random(11))
    images = render_video(video)[None].copy()
    images[0, 5] = np.random.default_rng(0).integers(0, 255, images[0, 5].shape)
    scores = judged([video], [video.caption], images=images)
    assert float(scores["video_clean"]) == 0 and float(scores["video_fidelity"]) > 0.8
    assert float(scores["video_steadiness"]) < 0.2


def test_images_and_other_lengths_are_refused():
    judge = MotionJudge(VideoDetector().eval(), 0.5)
    for shape in ((1, 64, 64, 3), (1, 5, 64, 64, 3)):
        with pytest.raises(ValueError, match="videos of 9 frames"):
            judge.extract(np.zeros(shape, np.uint8), ["a cat rising on a white background"])


def test_a_detector_is_loaded_from_its_file_and_other_files_are_refused(tmp_path):
    model = VideoDetector()
    path = tmp_path / "detector.safetensors"
    save_file({k: v.half() for k, v in model.state_dict().items()}, path, metadata={CLEAN: "0.75"})
    loaded, clean = load_video_detector(path)
    assert clean == 0.75 and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="use the file that scripts"):
        load_video_detector(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="use the file that scripts"):
        load_video_detector(path)

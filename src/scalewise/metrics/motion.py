"""Metrics of the video mini: whether the things of the caption are in every frame, move as it says, and keep
their drawing.

Videos of the video mini are drawn by a program, so the truth is known: `mini.video_detector` reads every
frame, detections are linked to tracks, and tracks are compared with the true course of the caption's motion
and with the true drawing of the thing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalewise.metrics.base import Metric, share_metric
from scalewise.metrics.clip import from_bytes
from scalewise.metrics.extras import Device, Extra
from scalewise.metrics.ssim import clip_box, shifted_ssim
from scalewise.mini.grammar import BACKGROUNDS
from scalewise.mini.motions import CROSS, DOWN, GROW, LEFT, RIGHT, SHRINK, TURN, UP, Motion, parse_motion
from scalewise.mini.video_detector import Frame, Seen, VideoDetector, load_video_detector, read_frames
from scalewise.mini.videos import FRAMES, SIDE, Pose, course, draw_thing

TOLERANCE = Pose(8, 8, 6, 22.5)
"""Largest deviation of a frame from the true course: a quarter of the way of each motion."""
SHIFT = 2
"""Largest shift in pixels, along each axis, between a detected thing and its true drawing."""
KINDS = {
    "moving": (LEFT, RIGHT, UP, DOWN), "turning": (TURN,), "sizing": (GROW, SHRINK), "crossing": (CROSS,),
}  # fmt: skip
"""Motions by the kind that has its own metric."""


class MotionJudge:
    """Checks videos of 9 frames against captions of the video mini's grammar."""

    def __init__(self, detector: VideoDetector, clean: float) -> None:
        self.detector, self.clean = detector, clean

    @classmethod
    def load(cls, source: str, device: Device) -> MotionJudge:
        """Load the detector from a file of scripts/mini/video_detector.py."""
        return cls(*load_video_detector(Path(source), device))

    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return values [N] by metric for uint8 videos [N, 9, H, W, 3]; NaN for the kinds of other captions.

        Raises ValueError for another number of frames, CaptionError for captions outside the grammar.
        """
        wanted = [parse_motion(caption) for caption in captions]
        if images.ndim != 5 or images.shape[1] != FRAMES:
            raise ValueError(
                f"The metric motion needs videos of {FRAMES} frames, [N, {FRAMES}, H, W, 3]; got shape "
                f"{images.shape}."
            )
        pixels = from_bytes(images.reshape(-1, *images.shape[2:]))
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        frames = read_frames(self.detector, pixels)
        names = ["match", "things", "motion", *KINDS, "fidelity", "steadiness", "clean"]
        outputs = {f"video_{name}": torch.full((len(images),), torch.nan) for name in names}
        for i, described in enumerate(wanted):
            part = slice(i * FRAMES, (i + 1) * FRAMES)
            for name, value in self._scores(pixels[part], frames[part], described).items():
                outputs[f"video_{name}"][i] = value
        return outputs

    def _scores(self, pixels: Tensor, frames: Sequence[Frame], wanted: Motion) -> dict[str, float]:
        """Return the outputs of one video [9, 3, 64, 64]."""
        tracks = link(frames, len(wanted.things))
        things, motion = things_match(frames, wanted), motion_matches(tracks, wanted.motion)
        background = all(frame.background == wanted.background for frame in frames)
        passes = float(things and motion and background)
        kind = next(kind for kind, motions in KINDS.items() if wanted.motion in motions)
        fidelity = track_fidelity(pixels, tracks, [frame.background for frame in frames])
        steady = float(fidelity.min())
        return {
            "match": passes, kind: passes, "things": float(things), "motion": float(motion),
            "fidelity": float(fidelity.mean()), "steadiness": steady, "clean": float(steady >= self.clean),
        }  # fmt: skip


def things_match(frames: Sequence[Frame], wanted: Motion) -> bool:
    """Return whether every frame shows the caption's things, each once, and no other."""
    names = sorted(wanted.things)
    return all(sorted(seen.thing for seen in frame.found) == names for frame in frames)


def link(frames: Sequence[Frame], count: int) -> list[list[Seen]]:
    """Follow the `count` (1 or 2) detections with the highest scores through all frames, whatever they show.

    Two detections are linked to those of the previous frame so that the sum of distances is the smallest.
    Returns [] if a frame has fewer.
    """
    if any(len(frame.found) < count for frame in frames):
        return []
    tracks: list[list[Seen]] = [[] for _ in range(count)]
    for frame in frames:
        found = list(frame.found[:count])
        if count == 2 and tracks[0]:
            last = [track[-1] for track in tracks]
            if _distance(last, found[::-1]) < _distance(last, found):
                found.reverse()
        for track, seen in zip(tracks, found, strict=True):
            track.append(seen)
    return tracks


def _distance(one: Sequence[Seen], other: Sequence[Seen]) -> float:
    pairs = [(a.pose, b.pose) for a, b in zip(one, other, strict=True)]
    return sum(((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 for a, b in pairs)


def follows(poses: Sequence[Pose], motion: str) -> bool:
    """Return whether the poses of all frames are within `TOLERANCE` of the course of a motion of one thing.

    The course may be anywhere in the image: centers are compared relative to their means.
    """
    middle_x, middle_y = (sum(p.x for p in poses) / len(poses), sum(p.y for p in poses) / len(poses))
    for pose, true in zip(poses, course(motion), strict=True):
        turned = (pose.angle - true.angle + 180) % 360 - 180
        if (
            abs(pose.x - middle_x - true.x) > TOLERANCE.x
            or abs(pose.y - middle_y - true.y) > TOLERANCE.y
            or abs(pose.size - true.size) > TOLERANCE.size
            or abs(turned) > TOLERANCE.angle
        ):
            return False
    return True


def motion_matches(tracks: Sequence[Sequence[Seen]], motion: str) -> bool:
    """Return whether the tracks of a video have the motion of a caption.

    In a crossing, one track moves to the left and the other one to the right, and they pass each other.
    """
    poses = [[seen.pose for seen in track] for track in tracks]
    if not poses:
        return False
    if motion != CROSS:
        return follows(poses[0], motion)
    to_left = next((one for one in poses if follows(one, LEFT)), None)
    to_right = next((one for one in poses if follows(one, RIGHT)), None)
    if to_left is None or to_right is None:
        return False
    return to_left[0].x > to_right[0].x and to_left[-1].x < to_right[-1].x


def track_fidelity(pixels: Tensor, tracks: Sequence[Sequence[Seen]], backgrounds: Sequence[str]) -> Tensor:
    """Return the SSIM [T] of the things in each frame with their true drawings; 0 without tracks.

    The true drawing is that of the thing which the track shows most often, at the pose detected in the frame,
    shifted by up to SHIFT pixels to the least squared error. Of two things the lower value counts. `pixels`:
    [T, 3, 64, 64].
    """
    values = torch.zeros(len(pixels))
    if not tracks:
        return values
    names = [Counter(seen.thing for seen in track).most_common(1)[0][0] for track in tracks]
    for i, (image, background) in enumerate(zip(pixels, backgrounds, strict=True)):
        poses = [track[i].pose for track in tracks]
        true = _true_frame(names, poses, background)
        values[i] = min(_best_ssim(image, true, pose) for pose in poses)
    return values


def _true_frame(things: Sequence[str], poses: Sequence[Pose], background: str) -> Tensor:
    """Draw things at their poses: pixels [3, 64, 64] in [-1, 1]."""
    frame = np.empty((SIDE, SIDE, 3), np.float32)
    frame[:] = BACKGROUNDS[background]
    for thing, pose in zip(things, poses, strict=True):
        draw_thing(frame, thing, pose)
    return torch.from_numpy(frame / 127.5 - 1).permute(2, 0, 1)


def _best_ssim(image: Tensor, true: Tensor, pose: Pose) -> float:
    """Return the SSIM of two frames [3, 64, 64] around a pose, for the shift of the least squared error."""
    cos, sin = abs(math.cos(math.radians(pose.angle))), abs(math.sin(math.radians(pose.angle)))
    reach = min(pose.size * (cos + sin) / 2, SIDE)
    box = clip_box((pose.x - reach, pose.y - reach, pose.x + reach, pose.y + reach), SIDE, margin=SHIFT)
    if box is None:
        return 0.0
    left, top, right, bottom = box
    return shifted_ssim(image, true[:, top:bottom, left:right], (left, top), shift=SHIFT)


def _check(captions: Sequence[str]) -> None:
    for caption in captions:
        parse_motion(caption)


def _similarity(name: str, title: str, about: str) -> Metric:
    return Metric(
        name=name, title=title, better="higher", bounds=(-1, 1),
        statistic=lambda features: features.mean_output(name), about=about,
    )  # fmt: skip


EXTRA = Extra(
    name="motion", load=MotionJudge.load, videos=True, check=_check,
    metrics=(
        share_metric(
            "video_match", "Video match",
            about="share of videos of the video mini with the things, motion and background of the caption",
        ),
        share_metric(
            "video_things", "Thing match",
            about="share of videos with exactly the caption's things in every frame",
        ),
        share_metric(
            "video_motion", "Motion match",
            about="share of videos in which what is seen moves as the caption says",
        ),
        *(
            share_metric(f"video_{kind}", f"Video {kind}", about=f"video match of captions of {about}")
            for kind, about in (
                ("moving", "a thing that moves"), ("turning", "a thing that turns"),
                ("sizing", "a thing that grows or shrinks"), ("crossing", "two things that cross"),
            )
        ),
        _similarity(
            "video_fidelity", "Video fidelity",
            "mean SSIM over frames of the things with their true drawing; 0 if a frame has too few things",
        ),
        _similarity(
            "video_steadiness", "Steadiness",
            "mean SSIM with the true drawing in the frame of each video where it is the lowest",
        ),
        share_metric(
            "video_clean", "Clean video",
            about="share of videos of which every frame is as close to the true drawing as in 99% of VAE "
            "reconstructions",
        ),
    ),
)  # fmt: skip

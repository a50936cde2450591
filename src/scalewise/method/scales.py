"""Latent scales, schedules of (timestep, scale) steps, and resizing of latents between scales."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, order=True)
class Scale:
    """Size of a latent in latent cells; images have one frame."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(
                f"Sizes of a scale must be at least 1; got {self.frames}x{self.height}x{self.width}."
            )

    @classmethod
    def parse(cls, text: str | int | Scale) -> Scale:
        """Parse "16" (square), "16x24" (height x width) or "21x60x104" (frames x height x width)."""
        if isinstance(text, Scale):
            return text
        sizes = [int(part) for part in re.findall(r"\d+", str(text))]
        if not re.fullmatch(r"\d+(x\d+){0,2}", str(text)):
            raise ValueError(f"Cannot parse the scale {text!r}; write 16, 16x24 or 21x60x104.")
        if len(sizes) == 1:
            sizes = [sizes[0], sizes[0]]
        return cls(*([1] * (3 - len(sizes)) + sizes))

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return size if self.frames == 1 else f"{self.frames}x{size}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def cells(self) -> int:
        """Number of latent cells: frames x height x width."""
        return self.frames * self.height * self.width

    def covers(self, other: Scale) -> bool:
        """Return whether every axis is at least as long as that of `other`."""
        return self.frames >= other.frames and self.height >= other.height and self.width >= other.width

    def shape(self, count: int, channels: int, *, video: bool = False) -> tuple[int, ...]:
        """Return [N, C, H, W], or [N, C, T, H, W] for video."""
        if video:
            return count, channels, self.frames, self.height, self.width
        return count, channels, self.height, self.width


@dataclass(frozen=True)
class Step:
    """One step of a schedule: timestep t in (0, 1000] and the scale of its latent."""

    t: float
    scale: Scale


@dataclass(frozen=True)
class ScaleSchedule:
    """Steps (t_i, s_i) with decreasing t and non-decreasing scales; the last is full size (section 4.1)."""

    steps: tuple[Step, ...]

    @classmethod
    def build(cls, timesteps: Sequence[float], scales: Sequence[str | int | Scale]) -> ScaleSchedule:
        """Pair timesteps with scales; ValueError if their lengths differ."""
        if len(timesteps) != len(scales):
            raise ValueError(
                f"Got {len(timesteps)} timesteps and {len(scales)} scales; the lengths must match."
            )
        return cls(tuple(Step(float(t), Scale.parse(s)) for t, s in zip(timesteps, scales, strict=True)))

    @classmethod
    def parse(cls, text: str) -> ScaleSchedule:
        """Parse the output of `str`, such as "1000@64x64 896@80x80 737@96x96 602@128x128"."""
        if not re.fullmatch(r"(\d+(\.\d+)?@\d+(x\d+){0,2}(\s+|$))+", text.strip()):
            raise ValueError(
                f"Cannot parse the schedule {text!r}; write timestep@scale for every step, as in "
                '"1000@64 896@80 737@96 602@128".'
            )
        pairs = [part.split("@") for part in text.split()]
        return cls.build([float(t) for t, _ in pairs], [scale for _, scale in pairs])

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("A schedule needs at least one step; give timesteps and scales.")
        for step in self.steps:
            if not 0 < step.t <= 1000:
                raise ValueError(f"Timestep {step.t:g} is outside (0, 1000]; timesteps are 1000 x sigma.")
        for before, after in itertools.pairwise(self.steps):
            if after.t >= before.t:
                raise ValueError(
                    f"Timestep {after.t:g} follows {before.t:g}; timesteps must decrease from step to step."
                )
            if not after.scale.covers(before.scale):
                raise ValueError(
                    f"Scale {after.scale} follows {before.scale}; scales must not shrink, "
                    f"so use at least {_cover(before.scale, after.scale)}."
                )

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    @property
    def full(self) -> Scale:
        """The last scale: the size of the finished latent."""
        return self.steps[-1].scale

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales of all steps, in order."""
        return tuple(step.scale for step in self.steps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps of all steps, in order."""
        return tuple(step.t for step in self.steps)

    def source(self, index: int) -> Scale:
        """Return the scale of the training input of step `index`: s_{i-1}, or s_1 for the first step."""
        return self.steps[max(index - 1, 0)].scale

    def target(self, index: int) -> Scale:
        """Return the scale s_i of the prediction of step `index`."""
        return self.steps[index].scale

    def at_full_scale(self) -> ScaleSchedule:
        """Return the full-scale baseline: the same timesteps, all at the last scale."""
        return ScaleSchedule(tuple(Step(step.t, self.full) for step in self.steps))

    def for_size(self, full: Scale, patch: int = 1) -> ScaleSchedule:
        """Return the schedule for another full size: each axis scaled by its ratio, rounded to the patch."""
        if full == self.full:
            return self

        def fit(part: int, whole: int, goal: int, step: int) -> int:
            return min(goal, max(step, step * round(part * goal / whole / step)))

        def scaled(scale: Scale) -> Scale:
            # Frames have their own ratio and no patch.
            return Scale(
                fit(scale.frames, self.full.frames, full.frames, 1),
                fit(scale.height, self.full.height, full.height, patch),
                fit(scale.width, self.full.width, full.width, patch),
            )

        return ScaleSchedule(tuple(Step(step.t, scaled(step.scale)) for step in self.steps))

    def check(self, *, patch: int, full: Scale | None = None, largest: Scale | None = None) -> None:
        """Raise ValueError for scales that the model does not support: not divisible by `patch`, larger than
        `largest`, or not ending in `full`.
        """
        for scale in self.scales:
            for axis in scale.size:
                if axis % patch:
                    near = patch * max(1, round(axis / patch))
                    raise ValueError(
                        f"Scale {scale} is not divisible by the patch size {patch}; the nearest valid side "
                        f"is {near}."
                    )
            if largest and not largest.covers(scale):
                raise ValueError(
                    f"Scale {scale} is larger than {largest}, the largest scale with position embeddings in "
                    "this model."
                )
        if full and self.full != full:
            raise ValueError(
                f"The last scale is {self.full}, but the full size of the data is {full}; end the schedule "
                f"with {full}."
            )

    def tokens(self, patch: int) -> int:
        """Return the image tokens of one sample, summed over all steps."""
        return sum(scale.cells // patch**2 for scale in self.scales)

    def __str__(self) -> str:
        return " ".join(f"{step.t:g}@{step.scale}" for step in self.steps)


def _cover(one: Scale, other: Scale) -> Scale:
    return Scale(
        *(max(a, b) for a, b in zip((one.frames, *one.size), (other.frames, *other.size), strict=True))
    )


def upscale_latents(x0: Tensor, scale: Scale) -> Tensor:
    """Upscale clean latents [N, C, H, W] or [N, C, T, H, W]: bicubic in space, frame blending in time.

    align_corners=False and no antialiasing, as in the paper (section 4.1). Returns x0 itself if the size is
    unchanged. ValueError for other shapes.
    """
    if x0.ndim == 4:
        if tuple(x0.shape[-2:]) == scale.size:
            return x0
        return F.interpolate(x0, size=scale.size, mode="bicubic", align_corners=False)
    if x0.ndim != 5:
        raise ValueError(f"Latents must be [N, C, H, W] or [N, C, T, H, W]; got {list(x0.shape)}.")
    count, channels, frames, height, width = x0.shape
    if (height, width) != scale.size:
        flat = x0.transpose(1, 2).reshape(count * frames, channels, height, width)
        flat = F.interpolate(flat, size=scale.size, mode="bicubic", align_corners=False)
        x0 = flat.reshape(count, frames, channels, *scale.size).transpose(1, 2)
    return blend_frames(x0, scale.frames)


def blend_frames(x0: Tensor, frames: int) -> Tensor:
    """Change the number of latent frames of [N, C, T, H, W] by linear interpolation; the first and last frame
    are kept.
    """
    have = x0.shape[2]
    if have == frames:
        return x0
    position = torch.linspace(0, have - 1, frames, device=x0.device, dtype=torch.float32)
    left = position.floor().long().clamp(max=max(have - 2, 0))
    weight = (position - left).to(x0.dtype).view(1, 1, -1, 1, 1)
    right = (left + 1).clamp(max=have - 1)
    return x0[:, :, left] * (1 - weight) + x0[:, :, right] * weight


def downscale_area(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Downscale images or latents [N, C, H, W] to (H, W) by area averaging (adaptive average pooling).

    ValueError if `size` is larger.
    """
    if tuple(x.shape[-2:]) == size:
        return x
    if size[0] > x.shape[-2] or size[1] > x.shape[-1]:
        raise ValueError(f"Area downscaling cannot enlarge {list(x.shape[-2:])} to {list(size)}.")
    return F.interpolate(x, size=size, mode="area")


def downscale_video(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Downscale images [N, 3, H, W] or videos [N, 3, F, H, W] to (H, W) or (F, H, W) pixels: area averaging
    in space, linear interpolation between frames in time.
    """
    if pixels.ndim == 4:
        return downscale_area(pixels, (size[-2], size[-1]))
    count, frames = pixels.shape[0], pixels.shape[2]
    flat = pixels.transpose(1, 2).flatten(0, 1)
    flat = downscale_area(flat, (size[-2], size[-1]))
    return blend_frames(flat.unflatten(0, (count, frames)).transpose(1, 2), size[0])


def shifted_sigmas(steps: int, shift: float, *, train_steps: int = 1000) -> list[float]:
    """Return the `steps` sigmas of a flow-matching schedule with `shift`, followed by 0.

    sigma' = shift sigma / (1 + (shift - 1) sigma), with sigma equally spaced from 1 to the (shifted) smallest
    training sigma. 28 steps and shift 3 give the schedule of SD3.5, whose entries 0 4 7 12 14 18 are the
    timesteps 1000 945 896 790 737 602.
    """
    if steps < 1:
        raise ValueError(f"The number of steps must be at least 1; got {steps}.")

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    low = shifted(1 / train_steps)
    sigmas = [1.0] if steps == 1 else [1 - (1 - low) * i / (steps - 1) for i in range(steps)]
    return [shifted(sigma) for sigma in sigmas] + [0.0]

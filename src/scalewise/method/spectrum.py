"""Power spectra of latents, the scales that are safe at each timestep, and schedules from them (section 3).

Noise of variance 1 has power 1 at every frequency, so the expected power of x_t = alpha x0 + sigma eps is
alpha^2 P + sigma^2, where P is the power of x0. A scale cannot represent frequencies above its limit. It is
*safe* at t if the noise at those frequencies is at least `margin` times as strong as the signal:

    sigma(t)^2 >= margin * alpha(t)^2 * max P over the frequencies that the scale cannot represent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalewise.method.noise import NoiseProcess
from scalewise.method.scales import Scale, ScaleSchedule

CHUNK = 64  # latents transformed at a time


@dataclass(frozen=True)
class Spectrum:
    """Mean power [K] at increasing frequencies [K] in cycles per cell, at most 0.5; white noise has power
    1.
    """

    frequency: Tensor
    power: Tensor

    def above(self, limit: float) -> float:
        """Return the largest power at frequencies above `limit`; 0 for a limit of 0.5 or more.

        Includes the power at the limit itself, interpolated between bins as a power law.
        """
        if limit >= 0.5:
            return 0.0  # the Nyquist frequency
        if limit >= float(self.frequency[-1]):  # within the last bin, whose mean frequency this is
            return float(self.power[-1])
        right = int(torch.searchsorted(self.frequency, limit, right=True))
        found = float(self.power[right:].max())
        if right == 0:
            return found
        (x0, x1), (y0, y1) = (v[right - 1 : right + 1].log().tolist() for v in (self.frequency, self.power))
        return max(found, math.exp(y0 + (math.log(limit) - x0) * (y1 - y0) / (x1 - x0)))

    def at_most(self, power: float) -> float:
        """Return the lowest frequency in [0, 0.5] above which the power never exceeds `power`."""
        low, high = 0.0, 0.5
        if float(self.power.max()) <= power:
            return low
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.above(middle) <= power else (middle, high)
        return high

    def exponent(self) -> float:
        """Return p of the best power law P ~ f^-p (least squares of the logarithms)."""
        x, y = self.frequency.log(), self.power.log()
        x = x - x.mean()
        return -float((x * y).sum() / x.square().sum())


def radial_spectrum(latents: Tensor) -> Spectrum:
    """Return the radially averaged power spectrum (RAPSD) of latents [N, C, H, W] or [N, C, T, H, W].

    Bins are rings one cycle per shorter side wide, up to half a cycle per cell. Power is averaged over
    frames,
    channels and samples; the constant component (frequency 0) is excluded. ValueError below 4x4 cells.
    """
    height, width = latents.shape[-2:]
    side = min(height, width)
    if side < 4:
        raise ValueError(f"A spectrum needs latents of at least 4x4 cells; got {height}x{width}.")
    planes = latents if latents.ndim == 4 else latents.transpose(1, 2).flatten(0, 1)
    power = torch.zeros(height, width, dtype=torch.float64)
    for part in planes.split(CHUNK):
        power += torch.fft.fft2(part.double(), norm="ortho").abs().square().mean(1).sum(0)
    radius = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, dtype=torch.float64)[None],
    )
    # Frequencies above half a cycle per cell (the corners) get their own ring, which is dropped.
    ring = torch.where(radius > 0.5, side, (radius * side).round().long()).flatten()
    count = torch.bincount(ring).double()
    mean_radius, mean_power = (
        torch.bincount(ring, weights=v.flatten()) / count for v in (radius, power / len(planes))
    )
    inside = slice(1, side // 2 + 1)
    return Spectrum(mean_radius[inside], mean_power[inside])


def temporal_spectrum(latents: Tensor) -> Spectrum:
    """Return the power spectrum of latents [N, C, T, H, W] along T, averaged over all other axes.

    ValueError for fewer than 3 frames.
    """
    frames = latents.shape[2]
    if frames < 3:
        raise ValueError(f"A temporal spectrum needs at least 3 latent frames; got {frames}.")
    power = torch.zeros(frames // 2 + 1, dtype=torch.float64)
    for part in latents.split(CHUNK):
        power += torch.fft.rfft(part.double(), dim=2, norm="ortho").abs().square().mean((1, 3, 4)).sum(0)
    return Spectrum(torch.fft.rfftfreq(frames, dtype=torch.float64)[1:], power[1:] / len(latents))


@dataclass(frozen=True)
class Spectra:
    """Spectra of clean latents of one size: spatial and, for video, temporal."""

    full: Scale
    space: Spectrum
    time: Spectrum | None = None

    @classmethod
    def of(cls, latents: Tensor) -> Spectra:
        """Measure latents [N, C, H, W] or [N, C, T, H, W]."""
        full = Scale(*([1] * (5 - latents.ndim)), *latents.shape[2:])
        time = temporal_spectrum(latents) if full.frames > 1 else None
        return cls(full, radial_spectrum(latents), time)

    def limits(self, scale: Scale) -> tuple[float, float]:
        """Return the highest frequencies that a scale can represent in space and time, in cycles per
        full-size
        cell.

        Interpolation keeps the first and last frame, so T frames are (full - 1) / (T - 1) apart.
        """
        space = min(scale.height / self.full.height, scale.width / self.full.width) / 2
        time = (scale.frames - 1) / (self.full.frames - 1) / 2 if self.full.frames > 1 else 0.5
        return space, time

    def lost(self, scale: Scale) -> float:
        """Return the largest power at a frequency that the scale cannot represent; 0 at full size."""
        space, time = self.limits(scale)
        return max(self.space.above(space), self.time.above(time) if self.time else 0.0)

    def margin(self, scale: Scale, t: float, noise: NoiseProcess) -> float:
        """Return the ratio of noise power at t to the strongest signal that the scale cannot represent."""
        alpha, sigma = weights(noise, t)
        signal = alpha**2 * self.lost(scale)
        return sigma**2 / signal if signal else math.inf

    def safe_from(self, scale: Scale, noise: NoiseProcess, *, margin: float = 1.0) -> float | None:
        """Return the lowest t in [0, 1000] at which the scale is safe; None if there is none."""
        return crossing(self.lost(scale) * margin, noise)


def weights(noise: NoiseProcess, t: float) -> tuple[float, float]:
    """Return alpha(t) and sigma(t)."""
    at = torch.tensor([t])
    return float(noise.alpha(at)), float(noise.sigma(at))


def crossing(power: float, noise: NoiseProcess) -> float | None:
    """Return the t in [0, 1000] at which the noise equals a signal of this power, found by bisection.

    For flow matching t = 1000 q / (1 + q) with q = sqrt(power). None if the noise is weaker even at t = 1000.
    """

    def hidden(t: float) -> bool:
        alpha, sigma = weights(noise, t)
        return sigma >= alpha * math.sqrt(power)

    low, high = 0.0, 1000.0
    if not hidden(high):
        return None
    if hidden(low):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high


def candidates(full: Scale, patch: int, *, smallest: float = 0.25) -> list[Scale]:
    """Return the single-frame scales that a schedule up to `full` may use, in increasing order.

    The shorter side grows in steps of the patch from `smallest` times its full length; the aspect ratio is
    kept as far as the patch allows.
    """
    short, found = min(full.size), []
    for side in range(patch, short + 1, patch):
        if side >= smallest * short:
            height, width = (min(axis, patch * round(axis * side / short / patch)) for axis in full.size)
            found.append(Scale(1, height, width))
    if not found or found[-1].size != full.size:
        found.append(Scale(1, *full.size))
    return found


def propose(
    spectra: Spectra, noise: NoiseProcess, timesteps: Sequence[float], *, patch: int, margin: float = 1.0,
    smallest: float = 0.25,
) -> ScaleSchedule:  # fmt: skip
    """Return the cheapest schedule at these timesteps in which every scale is safe at the following timestep.

    Step i + 1 starts from the output of step i, upscaled and noised to t_{i+1}. The frequencies that scale
    s_i
    cannot represent are missing from it, so s_i must be safe at t_{i+1}. The last step runs at full size, and
    no step more than doubles a side or the frames, as in the paper. Frames are chosen independently of sides.
    """
    full = spectra.full
    sides = [s.size for s in candidates(full, patch, smallest=smallest)]
    counts = [n for n in range(1, full.frames + 1) if n >= smallest * full.frames]

    def safe(scale: Scale, t: float) -> bool:
        return scale == full or spectra.margin(scale, t, noise) >= margin

    scales = [full]
    for t in reversed(timesteps[1:]):
        after = scales[0]
        height, width = next(
            size
            for size in sides
            if 2 * size[0] >= after.height
            and 2 * size[1] >= after.width
            and safe(Scale(full.frames, *size), t)
        )
        frames = next(n for n in counts if 2 * n >= after.frames and safe(Scale(n, *full.size), t))
        scales.insert(0, Scale(frames, height, width))
    return ScaleSchedule.build(timesteps, scales)


def within_budget(
    schedule_at: Callable[[float], ScaleSchedule], cost: Callable[[Scale], float], *, budget: float,
    least: float = 1.0,
) -> ScaleSchedule:  # fmt: skip
    """Return the schedule with the largest margin whose cost is at most `budget` times that at full scale.

    `schedule_at(margin)` returns a schedule, `cost(scale)` the cost of a step. ValueError if the schedule of
    the smallest margin, `least`, exceeds the budget.
    """

    def part(margin: float) -> float:
        schedule = schedule_at(margin)
        return sum(map(cost, schedule.scales)) / (len(schedule) * cost(schedule.full))

    if part(least) > budget:
        raise ValueError(
            f"The budget of {budget:.2g} times the full-scale cost is too small: the cheapest schedule with "
            "a "
            f"margin of {least:g} needs {part(least):.2f}. Raise the budget or use higher timesteps."
        )
    low, high = math.log(least), 40.0  # logarithms; with the upper one only full size is safe
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if part(math.exp(middle)) <= budget else (low, middle)
    return schedule_at(math.exp(low))


def margins(spectra: Spectra, noise: NoiseProcess, schedule: ScaleSchedule) -> list[float]:
    """Return the margin of s_{i-1} at t_i for every step after the first."""
    return [
        spectra.margin(before.scale, after.t, noise) for before, after in itertools.pairwise(schedule.steps)
    ]


def spaced(dense: Sequence[float], steps: int, last: float) -> list[float]:
    """Return `steps` timesteps from 1000 to about `last`, evenly spaced in a `dense` decreasing schedule.

    The paper chooses its timesteps likewise: entries of the 28-step schedule of SD3.5, from 1000 to 602
    (appendix A). ValueError if fewer than `steps` timesteps of `dense` lie in that range.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least one step, not {steps}.")
    if steps == 1:
        return [1000.0]
    end = min(range(len(dense)), key=lambda i: abs(dense[i] - last))
    if end < steps - 1:
        raise ValueError(
            f"{steps} timesteps down to {last:g} do not fit into the {end + 1} timesteps of the model's "
            "schedule "
            "in that range; use fewer steps."
        )
    return [1000.0, *(float(dense[round(i * end / (steps - 1))]) for i in range(1, steps))]


def advice(schedule: ScaleSchedule, default: Sequence[float]) -> list[str]:
    """Return a sentence for each way in which a schedule deviates from the paper's advice (section 4.1, table
    9).

    `default` are the timesteps of the model's own schedule with the same number of steps.
    """
    found = []
    low = [f"{s.t:.0f} < {d:.0f}" for s, d in zip(schedule, default, strict=True) if s.t < d - 1]
    if low:
        found.append(
            f"Timesteps below the model's default for {len(schedule)} steps ({', '.join(low)}): the paper "
            "uses higher ones, because noise masks upscaling artifacts."
        )
    for before, after in itertools.pairwise(schedule.scales):
        if max(after.height / before.height, after.width / before.width) > 2:
            found.append(f"{before} to {after} more than doubles a side; the paper at most doubles.")
        if after.frames > 2 * before.frames:
            found.append(f"{before} to {after} more than doubles the frames; the paper at most doubles.")
    if len(schedule) > 2 and len(set(schedule.scales[:-1])) == 1 and schedule.scales[0] != schedule.full:
        found.append(
            f"All steps but the last run at {schedule.scales[0]}; growing at every step is better (table 9)."
        )
    return found

"""Spectra of fields with known spectra, crossings with a closed form, and schedules proposed from them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalewise.method.noise import FlowMatching, VariancePreserving
from scalewise.method.scales import Scale, ScaleSchedule, shifted_sigmas
from scalewise.method.spectrum import (
    Spectra,
    Spectrum,
    advice,
    candidates,
    crossing,
    margins,
    propose,
    radial_spectrum,
    spaced,
    temporal_spectrum,
    within_budget,
)

FM = FlowMatching()
VP = VariancePreserving((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power_law(*shape: int, exponent: float, amplitude: float = 1.0) -> Tensor:
    """Gaussian fields [..., H, W] whose power at frequency f is amplitude f^-exponent."""
    radius = torch.hypot(*torch.meshgrid(*(torch.fft.fftfreq(n).double() for n in shape[-2:]), indexing="ij"))
    radius[0, 0] = math.inf
    gain = (amplitude * radius**-exponent).sqrt()
    return torch.fft.ifft2(torch.fft.fft2(white(*shape)) * gain).real


def law(side: int, amplitude: float, exponent: float, frames: int = 1) -> Spectra:
    frequency = torch.arange(1, side // 2 + 1).double() / side
    space = Spectrum(frequency, amplitude * frequency**-exponent)
    along = torch.arange(1, frames // 2 + 1).double() / frames
    time = Spectrum(along, amplitude * along**-exponent) if frames > 1 else None
    return Spectra(Scale(frames, side, side), space, time)


@pytest.mark.parametrize("shape", [(64, 4, 32, 32), (32, 4, 24, 40), (32, 2, 5, 16, 16)])
def test_white_noise_has_power_one_at_every_frequency(shape):
    found = radial_spectrum(white(*shape))
    assert len(found.power) == min(shape[-2:]) // 2
    assert (found.power - 1).abs().max() < 0.06
    assert abs(found.exponent()) < 0.02


def test_white_noise_is_flat_along_frames():
    found = temporal_spectrum(white(64, 4, 9, 8, 8))
    assert found.frequency.tolist() == pytest.approx([1 / 9, 2 / 9, 3 / 9, 4 / 9])
    assert (found.power - 1).abs().max() < 0.03


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_a_power_law_field_gives_its_exponent_and_amplitude(exponent):
    found = radial_spectrum(power_law(16, 4, 128, 128, exponent=exponent, amplitude=0.1))
    # The first rings are wide against their radius: a mean over them lies above the law.
    inner = Spectrum(found.frequency[7:], found.power[7:])
    assert inner.exponent() == pytest.approx(exponent, rel=0.01)
    assert inner.power[20] == pytest.approx(0.1 * float(inner.frequency[20]) ** -exponent, rel=0.03)


@pytest.mark.parametrize("side", [4, 5, 8, 9, 16])
def test_nothing_is_lost_at_full_size(side):
    spectra = Spectra.of(white(4, 2, side, side + 3))
    assert float(spectra.space.frequency[-1]) <= 0.5 and bool(spectra.space.power.isfinite().all())
    assert spectra.lost(spectra.full) == 0.0


@pytest.mark.parametrize("full", [(43, 43), (11, 14), (33, 39), (9, 9), (16, 16), (60, 104)])
def test_every_smaller_size_loses_something(full):
    spectra = Spectra.of(white(2, 2, *full))
    for scale in candidates(Scale(1, *full), 1)[:-1]:
        assert spectra.lost(scale) > 0.5


def test_a_constant_part_has_no_place_in_the_spectrum():
    x0 = white(8, 4, 16, 16)
    torch.testing.assert_close(radial_spectrum(x0 + 5).power, radial_spectrum(x0).power)


def test_the_spectrum_of_noised_latents_is_what_the_formula_says():
    x0, t = power_law(64, 4, 32, 32, exponent=2.0, amplitude=0.05), torch.full((64,), 700.0)
    clean, noisy = radial_spectrum(x0), radial_spectrum(FM.add_noise(x0, white(*x0.shape, seed=1), t))
    expected = 0.3**2 * clean.power + 0.7**2
    assert (noisy.power / expected - 1).abs().max() < 0.06


@pytest.mark.parametrize("exponent", [2.0, 3.0])
@pytest.mark.parametrize("side", [32, 48, 64, 96])
def test_the_crossing_of_a_power_law_field_is_the_analytic_one_within_one_percent(exponent, side):
    spectra = Spectra.of(power_law(16, 4, 128, 128, exponent=exponent, amplitude=0.02))
    q = math.sqrt(0.02 * (side / 256) ** -exponent)
    assert spectra.safe_from(Scale(1, side, side), FM) == pytest.approx(1000 * q / (1 + q), rel=0.01)


def test_the_crossing_of_a_variance_preserving_process_is_where_its_table_says():
    # Safe when 1 - abar >= abar P, that is abar <= 1 / (1 + P).
    power = 1 / float(VP.abar[613]) - 1
    assert crossing(power, VP) == pytest.approx(613, abs=0.01)
    assert crossing(1e6, VP) is None  # its last level still holds some signal
    assert crossing(1e6, FM) == pytest.approx(1000 * 1000 / 1001)
    assert crossing(0.0, FM) == 0.0


def test_a_scale_loses_what_lies_above_its_own_limit():
    spectra = law(16, amplitude=1.0, exponent=2.0)
    assert spectra.lost(Scale(1, 16, 16)) == 0.0
    assert spectra.lost(Scale(1, 8, 8)) == pytest.approx(0.25**-2)
    assert spectra.lost(Scale(1, 8, 12)) == pytest.approx(0.25**-2)  # the shorter of the two decides
    assert spectra.lost(Scale(1, 10, 10)) == pytest.approx((10 / 32) ** -2)  # between two bins
    assert spectra.safe_from(Scale(1, 16, 16), FM) == 0.0


def test_a_rise_at_the_end_of_the_spectrum_counts():
    # Latents' highest frequencies are stronger than their power law (section 3).
    spectrum = Spectrum(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([9.0, 2.0, 1.0, 0.5, 3.0]))
    assert spectrum.above(0.25) == 3.0
    assert spectrum.above(0.05) == 9.0
    assert spectrum.above(0.5) == 0.0


def test_frames_and_sides_are_safe_each_on_their_own():
    spectra = law(16, amplitude=0.5, exponent=2.0, frames=9)
    # 5 of 9 frames stand two apart: a quarter of a cycle per frame.
    assert spectra.limits(Scale(5, 8, 8)) == (0.25, 0.25)
    assert spectra.lost(Scale(5, 16, 16)) == pytest.approx(0.5 * 0.25**-2)
    assert spectra.lost(Scale(9, 8, 16)) == pytest.approx(0.5 * 0.25**-2)
    assert spectra.lost(Scale(9, 16, 16)) == 0.0


def test_candidates_keep_the_shape_and_the_patch():
    assert [s.size for s in candidates(Scale(1, 16, 16), 4)] == [(4, 4), (8, 8), (12, 12), (16, 16)]
    found = candidates(Scale(1, 60, 104), 2, smallest=0.3)
    assert found[0].size == (18, 32) and found[-1].size == (60, 104)
    assert all(s.height % 2 == 0 and s.width % 2 == 0 for s in found)


def test_a_proposal_upscales_only_what_the_noise_hides_and_no_cheaper_one_does():
    spectra, timesteps = law(64, amplitude=0.02, exponent=2.0), [1000.0, 900.0, 750.0, 600.0]
    schedule = propose(spectra, FM, timesteps, patch=2, smallest=0.1)
    assert schedule.timesteps == tuple(timesteps) and schedule.full == Scale(1, 64, 64)
    assert all(m >= 1 for m in margins(spectra, FM, schedule))
    for i, t in enumerate(timesteps[1:]):
        side = schedule[i].scale.height
        # P(side / 128) = 0.02 (side / 128)^-2 <= (t / (1000 - t))^2
        least = 128 * math.sqrt(0.02) * (1000 - t) / t
        assert side == max(2 * math.ceil(least / 2), schedule[i + 1].scale.height / 2)
    careful = propose(spectra, FM, timesteps, patch=2, smallest=0.1, margin=4.0)
    assert all(m >= 4 for m in margins(spectra, FM, careful))
    assert all(c.covers(s) for c, s in zip(careful.scales, schedule.scales, strict=True))


def test_a_proposal_for_video_grows_frames_too():
    spectra = law(16, amplitude=0.05, exponent=2.0, frames=9)
    schedule = propose(spectra, FM, [1000.0, 800.0, 500.0, 300.0], patch=2)
    frames = [scale.frames for scale in schedule.scales]
    assert frames == sorted(frames) and frames[0] < frames[-1] == 9
    assert all(m >= 1 for m in margins(spectra, FM, schedule))


def test_a_budget_is_kept_and_spent_on_the_margin():
    spectra, timesteps = law(64, amplitude=0.02, exponent=2.0), [1000.0, 900.0, 750.0, 600.0]

    def schedule_at(margin: float) -> ScaleSchedule:
        return propose(spectra, FM, timesteps, patch=2, smallest=0.1, margin=margin)

    def cost(scale: Scale) -> float:
        return float(scale.cells)

    cheapest = sum(map(cost, schedule_at(1.0).scales)) / (4 * 64 * 64)
    for budget in (cheapest, 0.5, 0.8):
        found = within_budget(schedule_at, cost, budget=budget)
        assert sum(map(cost, found.scales)) <= budget * 4 * 64 * 64
        reached = min(margins(spectra, FM, found))
        dearer = schedule_at(reached * 1.001)  # a little more margin costs more than the budget
        assert sum(map(cost, dearer.scales)) > budget * 4 * 64 * 64
    assert within_budget(schedule_at, cost, budget=1.0).scales == (Scale(1, 64, 64),) * 4
    with pytest.raises(ValueError, match=r"budget of 0.01 .* margin of 1 needs 0\.\d\d"):
        within_budget(schedule_at, cost, budget=0.01)
    with pytest.raises(ValueError, match=r"margin of 100 needs"):
        within_budget(schedule_at, cost, budget=cheapest, least=100)


def test_the_papers_timesteps_are_entries_of_the_teachers_schedule():
    levels = [1000 * s for s in shifted_sigmas(28, 3)[:-1]]
    assert spaced(levels, 4, 602) == pytest.approx([1000, 913.3, 790.4, 602.2], abs=0.1)
    assert spaced(levels, 1, 602) == [1000.0]
    assert len(set(spaced(levels, 8, 602))) == 8
    with pytest.raises(ValueError, match="20 timesteps down to 602 do not fit into the 19 timesteps"):
        spaced(levels, 20, 602)
    with pytest.raises(ValueError, match="at least one step, not 0"):
        spaced(levels, 0, 602)


def test_advice_names_what_the_paper_would_not_do():
    default = [1000.0, 857.0, 601.0, 9.0]
    good = ScaleSchedule.build([1000, 896, 737, 602], [64, 80, 96, 128])
    assert advice(good, default) == []
    low = advice(ScaleSchedule.build([1000, 800, 700, 602], [64, 80, 96, 128]), default)
    assert len(low) == 1 and "800 < 857" in low[0]
    constant = advice(ScaleSchedule.build([1000, 896, 737, 602], [32, 32, 32, 128]), default)
    assert [("more than doubles" in a, "table 9" in a) for a in constant] == [(True, False), (False, True)]
    assert advice(good.at_full_scale(), default) == []


@pytest.mark.parametrize(("shape", "message"), [
    ((2, 4, 3, 8), "at least 4x4 cells; got 3x8"), ((2, 4, 2, 8, 8), "at least 3 latent frames; got 2"),
])  # fmt: skip
def test_latents_too_small_for_a_spectrum_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Spectra.of(white(*shape))

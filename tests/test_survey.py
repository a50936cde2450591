"""The `spectrum` command: what it measures, judges, proposes, writes and refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from scalewise import mini
from scalewise.cli import main
from scalewise.common import console
from scalewise.config.presets import find_recipe
from scalewise.data import LatentSet
from scalewise.data.synthetic import generate
from scalewise.method.noise import FlowMatching
from scalewise.method.scales import Scale
from scalewise.method.spectrum import Spectrum, radial_spectrum
from scalewise.models import SDXL, Wan
from scalewise.models.meta import build_meta_model
from scalewise.planning.schedule_search import (
    SearchOptions,
    load_latents,
    measure_spectrum,
    parse_timesteps,
    proposal_timesteps,
)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["spectrum", *map(str, arguments)])
    return int(end.value.code or 0)


def test_the_mini_is_surveyed_out_of_the_box(tmp_path, capsys):
    assert run("mini", "--count", "128", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "spectrum.json").read_text())
    recipe, proposal = found["schedules"]
    schedule = find_recipe("mini").schedule.build()
    assert recipe["scales"] == [str(s) for s in schedule.scales]
    assert recipe["tokens"] == schedule.tokens(1) and recipe["token_part"] == recipe["tokens"] / 1024
    # The shipped schedule is careful: noise exceeds what upscaling misses by far.
    assert min(recipe["margins"]) > 2 and recipe["advice"] == []
    assert proposal["tokens"] < recipe["tokens"] and proposal["flops"] < recipe["flops"]
    assert all(m >= 1 for m in proposal["margins"]) and proposal["advice"] == []
    space = found["axes"]["space"]
    assert 1.5 < space["exponent"] < 3
    # Levels and scales say the same: the smallest safe scale at t is the first whose threshold t reaches.
    for level in space["levels"]:
        first = next(s["scale"] for s in space["scales"] if s["safe_from"] <= level["t"])
        assert level["smallest_safe"] == first
        power = level["alpha"] ** 2 * torch.tensor(space["clean"]) + level["sigma"] ** 2
        torch.testing.assert_close(torch.tensor(level["noisy"]), power)
    assert str(found["latents"]) in said and "To train with the proposal" in said
    with Image.open(tmp_path / "spectrum.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(10**6)) > 50


def test_what_it_proposes_can_be_trained(tmp_path, capsys):
    assert run("mini-mmd", "--steps", "3", "--count", "64", "--out", tmp_path) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "To train" in x)
    schedule = find_recipe("mini-mmd").override(line.split("'")[1::2]).schedule.build()
    assert len(schedule) == 3 and schedule.full == Scale(1, 16, 16)
    build_meta_model(mini.TEACHER).check_schedule(schedule)


def test_a_full_scale_recipes_proposal_is_not_trained_at_full_scale(tmp_path, capsys):
    assert run("mini-full-scale", "--count", "64", "--out", tmp_path) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "To train" in x)
    changes = [*line.split("'")[1::2], line.rsplit(" ", 1)[1]]
    schedule = find_recipe("mini-full-scale").override(changes).schedule.build()
    proposal = json.loads((tmp_path / "spectrum.json").read_text())["schedules"][1]
    assert [str(s) for s in schedule.scales] == proposal["scales"] and schedule.scales[0] != schedule.full


def test_few_latents_are_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match="1 latents are too few for a reliable spectrum; measure at least 64"
    ):
        measure_spectrum(find_recipe("mini"), SearchOptions(), count=1, progress=console.progress)


def test_noise_hides_from_where_it_exceeds_the_signal_on():
    """P = f^-2 and flow matching: (1 - s)^2 / f^2 = s^2 / margin at f = sqrt(margin) (1 - s) / s."""
    frequency = torch.linspace(1 / 64, 0.5, 32, dtype=torch.float64)
    spectrum = Spectrum(frequency, frequency**-2)
    for t in (800.0, 900.0):
        signal, noise = 1 - t / 1000, t / 1000
        for margin in (1.0, 3.0):
            at = spectrum.at_most(noise**2 / (margin * signal**2))
            assert at == pytest.approx(margin**0.5 * signal / noise, rel=1e-3)
    assert spectrum.at_most(math.inf) == 0 and spectrum.at_most(1e-9) == 0.5


def test_a_budget_is_kept_by_the_command(tmp_path, capsys):
    assert run("mini", "--budget", "0.5", "--count", "64", "--out", tmp_path) == 0
    proposal = json.loads((tmp_path / "spectrum.json").read_text())["schedules"][1]
    assert 0.4 < proposal["token_part"] <= 0.5
    capsys.readouterr()
    assert run("mini", "--budget", "0.1", "--out", tmp_path) != 0
    assert "budget of 0.1" in capsys.readouterr().err


def test_timesteps_are_the_recipes_or_those_asked_for():
    model, own = build_meta_model(mini.TEACHER), find_recipe("mini").schedule.build()
    assert proposal_timesteps(model, own, SearchOptions()) == list(own.timesteps)
    six = proposal_timesteps(model, own, SearchOptions(steps=6))
    assert len(six) == 6 and six[0] == 1000 and six[-1] == pytest.approx(own.timesteps[-1], abs=8)
    assert proposal_timesteps(model, own, SearchOptions(timesteps=(1000.0, 500.0))) == [1000.0, 500.0]


def test_pictures_are_encoded_and_small_ones_left_out(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i, side in enumerate((128, 160, 128, 64)):
        pixels = torch.randint(0, 255, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    recipe = find_recipe("mini").override([f"data.path={tmp_path}"])
    with pytest.warns(UserWarning, match="1 of 4 images are smaller than 128x128 pixels"):
        latents = load_latents(recipe, build_meta_model(mini.TEACHER), count=100, progress=console.progress)
    assert latents.shape == (3, 16, 16, 16)
    for path in tmp_path.glob("[012].png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"None of the 1 images has at least 128x128"):
        load_latents(recipe, build_meta_model(mini.TEACHER), count=100, progress=console.progress)


def test_pictures_need_no_captions_and_what_is_skipped_is_named(tmp_path):
    Image.new("RGB", (128, 128), "red").save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    recipe = find_recipe("mini").override([f"data.path={tmp_path}"])
    with pytest.warns(UserWarning, match=r"1 image used, 1 skipped: 1 unreadable \(broken.png\)"):
        latents = load_latents(recipe, build_meta_model(mini.TEACHER), count=100, progress=console.progress)
    assert len(latents) == 1
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="No usable image") as error:
        load_latents(recipe, build_meta_model(mini.TEACHER), count=100, progress=console.progress)
    assert "Each needs a caption" not in str(error.value)


def test_the_margin_decides_what_is_called_safe(tmp_path):
    recipe, found = find_recipe("mini"), []
    for margin in (1.0, 9.0):
        found.append(
            measure_spectrum(recipe, SearchOptions(margin=margin), count=32, progress=console.progress)
        )
    q = [one.safe_from(Scale(1, 8, 8)) / (1000 - one.safe_from(Scale(1, 8, 8))) for one in found]
    assert q[1] == pytest.approx(3 * q[0], rel=1e-3)  # sigma / alpha grows with the margin's root
    assert found[1].to_dict()["wish"]["margin"] == 9.0 and found[1].to_dict()["recipe"] == "mini"


def test_a_set_is_read_at_full_size():
    recipe = find_recipe("mini")
    latents = load_latents(recipe, build_meta_model(mini.TEACHER), count=10, progress=console.progress)
    everything = LatentSet.open(mini.DATA).latents(range(1024), Scale(1, 16, 16))
    assert latents.shape == (10, 16, 16, 16)
    assert all((everything == row).flatten(1).all(1).any() for row in latents)


@pytest.mark.parametrize(("family", "scales"), [(SDXL, ["4", "8"]), (Wan, ["3x4x4", "5x8x8"])])
def test_other_noise_processes_and_video_are_surveyed(family, scales, tmp_path):
    model = family.tiny()
    model.save(tmp_path / "model")
    changes = [
        f"model.base={tmp_path / 'model'}", "schedule.timesteps=[1000,500]", f"schedule.scales={scales}",
        f"data.path={tmp_path / 'set'}", "teacher.steps=2", "loss.feature_block=0",
        f"model.family={family.family}",
    ]  # fmt: skip
    recipe = find_recipe("mini-mmd").override(changes)
    from scalewise.training import setup

    list(generate(setup.teacher(recipe), recipe, ["a cat"], tmp_path / "set", count=4, batch=4, seed=0))
    found = measure_spectrum(recipe, SearchOptions(), count=8, progress=console.progress)
    assert isinstance(found.noise, FlowMatching) is (family is Wan)
    assert list(found.axes) == (["space", "time"] if family is Wan else ["space"])
    latents = LatentSet.open(tmp_path / "set").latents(range(4), Scale.parse(scales[-1]))
    torch.testing.assert_close(found.axes["space"].power, radial_spectrum(latents).power)
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("arguments", "message"), [
    (["mini", "--margin", "0.5"], "finite number of at least 1; got 0.5"),
    (["mini", "--margin", "nan"], "--margin must be a finite number; got nan"),
    (["mini", "--margin", "inf"], "--margin must be a finite number; got inf"),
    (["mini", "--steps", "3", "--timesteps", "1000 500"], "not both"),
    (["mini", "--timesteps", "1000 5x"], "Cannot parse the timesteps"),
    (["mini", "--timesteps", "1200 500"], "1200 is outside"),
    (["mini", "--timesteps", "500 1000"], "timesteps must decrease"),
    (["mini", "--budget", "1.5"], "fraction of the full-scale cost"),
    (["mini", "--smallest", "2"], "fraction of the full side"),
    (["mini", "--data", "nowhere"], "No latents or images in nowhere"),
    (["minni"], "mini"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(arguments, message, tmp_path, capsys):
    assert run(*arguments, "--out", tmp_path / "out") != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_levels_are_read_with_commas_or_blanks():
    assert parse_timesteps("1000, 896 737") == (1000.0, 896.0, 737.0)
    assert parse_timesteps(None) == ()

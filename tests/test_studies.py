"""Studies: how verdicts fall, that every arm can be trained, and one study from end to end."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open

from scalewise import console, mini
from scalewise.cli import main
from scalewise.metrics import Interval
from scalewise.models import load_model
from scalewise.noise import FlowMatching
from scalewise.pictures import to_bytes
from scalewise.recipe import RecipeError
from scalewise.rng import SampleNoise
from scalewise.scales import Scale, upscale_latents
from scalewise.studies import STUDIES, Arm, Claim, Effort, Study, run_study, write_page
from scalewise.studies import run as running
from scalewise.studies.base import Start, find, overall
from scalewise.studies.run import key_of, recipe_of

BETTER = Claim("a beats b", "a", "b")
AS_GOOD = Claim("a is as good as b", "a", "b", ("b", "c"), tolerance=0.1)
FIGURES = {"a": 0.0, "b": 100.0, "c": 30.0}


@pytest.mark.parametrize(("claim", "metric", "difference", "seeds", "verdict"), [
    # CLIP score: higher is better, so a positive difference is a gain.
    (BETTER, "clip_score", (3, 1, 5), [2, 4], "reproduced"),
    (BETTER, "clip_score", (3, -1, 7), [2, 4], "undecided"),
    (BETTER, "clip_score", (3, 1, 5), [7, -1], "undecided"),  # one seed says otherwise
    (BETTER, "clip_score", (-3, -5, -1), [-2, -4], "not reproduced"),
    # Frechet distance: lower is better.
    (BETTER, "frechet", (-0.03, -0.05, -0.01), [-0.02, -0.04], "reproduced"),
    (BETTER, "frechet", (0.03, 0.01, 0.05), [0.02, 0.04], "not reproduced"),
    # As good: up to a tenth of the 70 between b and c may be lost.
    (AS_GOOD, "clip_score", (-3, -6, 0), [-2, -4], "reproduced"),
    (AS_GOOD, "clip_score", (-6, -9, -3), [-5, -6], "undecided"),
    (AS_GOOD, "clip_score", (-12, -15, -9), [-11, -13], "not reproduced"),
    (AS_GOOD, "clip_score", (5, 3, 7), [5, 5], "reproduced"),
])  # fmt: skip
def test_a_verdict_needs_the_whole_interval_and_every_seed(claim, metric, difference, seeds, verdict):
    finding = find(claim, metric, Interval(*difference), seeds, figures=FIGURES)
    assert finding.verdict == verdict
    assert finding.gain.low <= finding.gain.value <= finding.gain.high
    assert finding.allowed == (7.0 if claim is AS_GOOD else 0.0)


def test_figures_that_contradict_each_other_leave_a_claim_undecided():
    def finding(value: float):
        return find(BETTER, "clip_score", Interval(value, value - 1, value + 1), [value], figures=FIGURES)

    good, bad, unclear = finding(3.0), finding(-3.0), finding(0.0)
    assert overall([good, unclear]) == "reproduced"
    assert overall([bad, unclear, bad]) == "not reproduced"
    assert overall([good, bad]) == overall([unclear]) == "undecided"


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_recipe_of_equal_training(name):
    recipes = [recipe_of(arm, 1, None) for arm in STUDIES[name].arms]
    assert len({(r.train.iterations, r.train.batch, r.train.seed) for r in recipes}) == 1
    for arm, recipe in zip(STUDIES[name].arms, recipes, strict=True):
        drawn = recipe.override(list(arm.drawn)).schedule.build()
        assert drawn.full == recipe.schedule.build().full
    trained = [not arm.contender and not arm.start for arm in STUDIES[name].arms]
    students = [key_of(r) for is_trained, r in zip(trained, recipes, strict=True) if is_trained]
    # Two arms share a student only where they differ in how it draws.
    expected = len(
        {a.overrides for is_trained, a in zip(trained, STUDIES[name].arms, strict=True) if is_trained}
    )
    assert len(set(students)) == expected


def test_studies_share_what_they_have_in_common():
    main_arms = [STUDIES["scale-vs-full"].arms[1], STUDIES["losses"].arms[0], STUDIES["schedules"].arms[0]]
    assert len({key_of(recipe_of(arm, 0, None)) for arm in main_arms}) == 1
    assert key_of(recipe_of(main_arms[0], 1, None)) != key_of(recipe_of(main_arms[0], 0, None))


def test_a_study_runs_goes_on_and_writes_its_page(tmp_path, monkeypatch):
    study = Study(
        "tiny", "A tiny one", "nowhere",
        (
            Arm("untrained", contender="undistilled"),
            Arm("trained", ("loss.mmd_only=true", "train.batch=2", "train.sample_prompts=[]")),
            Arm("drawn at full scale", ("loss.mmd_only=true", "train.batch=2", "train.sample_prompts=[]"),
                ("schedule.full_scale=true",)),
        ),
        (Claim("training helps", "trained", "untrained"), Claim("scales do no harm", "trained",
                                                                "drawn at full scale",
                                                                ("trained", "untrained"))),
        "everything",
    )  # fmt: skip
    effort = Effort(seeds=(0, 1), count=6, iterations=2)
    found = run_study(study, tmp_path, effort, progress=console.progress)
    assert len(list((tmp_path / "students").iterdir())) == 2  # the third arm draws with the second's student
    assert len(list((tmp_path / "drawn").glob("*.safetensors"))) == 6
    stored = json.loads((tmp_path / "tiny.json").read_text())
    assert set(stored["figures"]) == {"untrained", "trained", "drawn at full scale"}
    assert len(stored["findings"]) == 4 and set(stored["verdicts"]) == {"training helps", "scales do no harm"}
    for finding in found.findings:
        mean = sum(finding.by_seed) / 2
        if finding.metric == "clip_score":  # a mean over pictures, so the seeds' mean is the whole
            assert finding.gain.value == pytest.approx(mean, abs=1e-6)
    monkeypatch.setattr(running, "draw", lambda *_, **__: pytest.fail("drawn again"))
    again = run_study(study, tmp_path, effort, progress=console.progress)
    assert again.to_dict() == found.to_dict()
    assert found.tokens == {"untrained": 564, "trained": 564, "drawn at full scale": 1024}
    page = write_page(found, tmp_path / "pages").read_text()
    for word in (
        "training helps",
        "everything",
        "tiny.png",
        "--seed 0 --seed 1",
        found.verdict("training helps"),
        "1,024 |",
    ):
        assert word in page
    assert (tmp_path / "pages" / "tiny.png").stat().st_size > 5000


def test_a_start_is_noised_before_or_after_it_is_enlarged():
    small, full = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 16, 16)
    make = partial(running.noised, small=small, full=full, seeds=[3, 4], process=FlowMatching(), t=400.0)
    eps, small_eps = (SampleNoise([3, 4])((4, side, side)) for side in (16, 8))
    torch.testing.assert_close(make("noised"), 0.6 * full + 0.4 * eps)
    enlarged = upscale_latents(small, Scale(1, 16, 16))
    torch.testing.assert_close(make("enlarged, noised"), 0.6 * enlarged + 0.4 * eps)
    late = upscale_latents(0.6 * small + 0.4 * small_eps, Scale(1, 16, 16))
    torch.testing.assert_close(make("noised, enlarged"), late)


def test_the_teacher_goes_on_from_samples_of_its_set(tmp_path):
    """From little noise the pictures stay what they were; noise enlarged too is no noise to the teacher."""
    starts = {"A": Start("noised", 200), "C": Start("noised, enlarged", 600)}
    study = Study(
        "starts", "Starts", "nowhere", tuple(Arm(name, start=start) for name, start in starts.items()),
        (Claim("noise comes last", "A", "C"),), "everything",
    )  # fmt: skip
    found = run_study(study, tmp_path, Effort(seeds=(0,), count=6), progress=console.progress)
    material = running.continued(6)
    full = list(material.latents.values())[-1]
    clean = material.judge.scorer.pictures(to_bytes(load_model(mini.TEACHER).decode(full)))
    stored = {}
    for path in (tmp_path / "drawn").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored[file.metadata()["arm"]] = file.get_tensor("features")
    near, far = ((clean * stored[name]).sum(-1).mean() for name in ("A", "C"))
    assert 1 - near < 0.01 and 1 - far > 5 * (1 - near)
    assert [f.claim.text for f in found.findings] == ["noise comes last"] * 2
    with pytest.raises(RecipeError, match="too few for 900 prompts"):
        running.continued(900)


def test_the_command_lists_studies_and_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study"])
    assert not end.value.code
    listed = capsys.readouterr().out
    assert all(name in listed for name in STUDIES)
    with pytest.raises(SystemExit) as end:
        main(["study", "loses"])
    assert (
        end.value.code and "no study 'loses'; there are upscaling, scale-vs-full" in capsys.readouterr().err
    )


def test_seeds_have_to_differ():
    with pytest.raises(RecipeError, match="different seeds"):
        Effort(seeds=(1, 1))
    with pytest.raises(RecipeError, match="different seeds"):
        Effort(seeds=())


def test_an_arms_tokens_are_those_of_its_passes():
    arms = {arm.name: running.tokens_of(arm) for arm in STUDIES["scale-vs-full"].arms}
    assert arms["scale-wise, 4 steps"] == 8 * 8 + 10 * 10 + 12 * 12 + 16 * 16 == arms["undistilled"]
    assert (arms["full-scale, 4 steps"], arms["full-scale, 2 steps"]) == (4 * 256, 2 * 256)
    assert arms["teacher"] == 28 * 2 * 256
    drawn = {arm.name: running.tokens_of(arm) for arm in STUDIES["untrained-scales"].arms}
    assert drawn["trained at full scale, drawn scale-wise"] == 564


def test_what_another_version_of_the_mini_made_is_not_gone_on_with(monkeypatch):
    recipe = recipe_of(STUDIES["losses"].arms[0], 0, None)
    before = key_of(recipe)
    assert key_of(recipe) == before
    monkeypatch.setattr(mini, "fingerprint", lambda: "another")
    assert key_of(recipe) != before


def test_a_damaged_file_of_pictures_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "0123.safetensors"
    path.write_bytes(b"\x10\x00")
    with pytest.raises(RecipeError, match=r"0123.safetensors is damaged .*delete it, and the study draws"):
        running.read_features(path)

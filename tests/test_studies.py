"""Studies: how verdicts fall, that every arm can be trained, and one study from end to end."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open

from scalewise import mini
from scalewise.cli import main
from scalewise.common import console
from scalewise.common.errors import TrainingInterrupted, TrainingStopped
from scalewise.common.images import to_bytes
from scalewise.config.recipe import RecipeError
from scalewise.evaluation.samplers import Prompts
from scalewise.method.noise import FlowMatching
from scalewise.method.rng import SampleNoise
from scalewise.method.scales import Scale, upscale_latents
from scalewise.metrics import measure
from scalewise.models import load_model
from scalewise.studies import STUDIES, Arm, Claim, Effort, Study, run_study, write_page
from scalewise.studies import run as running
from scalewise.studies.base import Start
from scalewise.studies.run import key_of, recipe_of


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
    effort = Effort(seeds=(0, 1), count=20, iterations=2)
    found = run_study(study, tmp_path, effort, progress=console.progress)
    assert len(list((tmp_path / "students").iterdir())) == 2  # the third arm draws with the second's student
    assert len(list((tmp_path / "drawn").glob("*.safetensors"))) == 6
    write_page(found, tmp_path)
    stored = json.loads((tmp_path / "tiny.json").read_text())
    assert set(stored["figures"]) == {"untrained", "trained", "drawn at full scale"}
    assert len(stored["findings"]) == 4 and set(stored["verdicts"]) == {"training helps", "scales do no harm"}
    for finding in found.findings:
        mean = sum(finding.gain.by_seed) / 2
        if finding.metric == "clip_score":  # a mean over pictures, so the seeds' mean is the whole
            assert finding.gain.value == pytest.approx(mean, abs=1e-6)
    monkeypatch.setattr(running, "generate_images", lambda *_, **__: pytest.fail("drawn again"))
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
    found = run_study(study, tmp_path, Effort(seeds=(0,), count=20), progress=console.progress)
    material = running.continued(20)
    full = list(material.latents.values())[-1]
    clean = material.judge.scorer.pictures(to_bytes(load_model(mini.TEACHER).decode(full)))
    stored = {}
    for path in (tmp_path / "drawn").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored[file.metadata()["arm"]] = file.get_tensor("scorer")
    near, far = ((clean * stored[name]).sum(-1).mean() for name in ("A", "C"))
    assert 1 - near < 0.01 and 1 - far > 5 * (1 - near)
    assert [f.claim.text for f in found.findings] == ["noise comes last"] * 2
    # Nothing is trained, so that one seed is enough for an interval.
    assert all(f.gain.interval.known and not f.gain.trained for f in found.findings)
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
    with pytest.raises(RecipeError, match=r"from 0 on, not \[-1\]"):
        Effort(seeds=(-1,))


@pytest.mark.parametrize(("arguments", "message"), [
    (["losses", "--count", "0"], "0 prompts have no intervals"),
    (["losses", "--count", "49"], "49 prompts tell students too badly apart; give --count 50 or more"),
    (["losses", "--count", "300"], "There are 299 held-out captions, not 300"),
    (["scale-vs-full", "upscaling", "--count", "299", "--iterations", "0"], "1 iteration or more, not 0"),
    (["losses", "--out", "{file}/sub"], "cannot be made"),
])  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_computed(arguments, message, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [word.format(file=tmp_path / "file") for word in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as end:
        main(["study", *arguments])
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code and message in said and "Traceback" not in said
    assert not (tmp_path / "new").exists()


def test_every_study_is_checked_before_the_first_begins(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "captions", lambda split: ["a"] * 1000)
    with pytest.raises(SystemExit) as end:
        main(["study", "losses", "upscaling", "--count", "900", "--out", str(tmp_path / "new")])
    assert end.value.code and "too few for 900 prompts" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_study_takes_a_difference_as_evaluation_does(tmp_path):
    """The same halves of the prompts: the interval is that of `scalewise evaluate`."""
    material, torch_rows = running.held_out(40), torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, material.judge.reference.shape[1], generator=torch_rows) for _ in "ab")
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (a, b))
    prompts = Prompts.of(material.texts)
    seen = [material.judge.combine({"scorer": rows}, prompts) for rows in (a, b)]
    expected = measure(seen[0], against=seen[1])["frechet"]
    one, two = (running.figure_of("frechet", s) for s in seen)
    assert (one - two).interval().to_list() == pytest.approx(expected.to_list(), abs=1e-12)


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
    monkeypatch.setattr(mini, "fingerprint", lambda *_: "another")
    assert key_of(recipe) != before


def test_a_damaged_file_of_pictures_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "0123.safetensors"
    path.write_bytes(b"\x10\x00")
    with pytest.raises(RecipeError, match=r"0123.safetensors is damaged .*delete it, and the study draws"):
        running.read_looks(path)


def test_a_stopped_study_says_that_the_same_command_goes_on(tmp_path, monkeypatch):
    def stopped(*_, **__):
        yield {"iteration": 1}
        raise TrainingInterrupted("SIGTERM", 1)

    monkeypatch.setattr(running, "distill", stopped)
    arm, recipe = STUDIES["losses"].arms[0], recipe_of(STUDIES["losses"].arms[0], 0, 2)
    with pytest.raises(
        TrainingStopped, match=r"SIGTERM after iteration 1; saved\. Run the same command again"
    ):
        running.contender_of(arm, recipe, tmp_path, console.progress)

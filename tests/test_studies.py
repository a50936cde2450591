"""Studies: every variant can be trained; a study from start to end; errors before anything is computed."""

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
from scalewise.studies import STUDIES, Claim, Study, StudySettings, Variant, run_study, write_page
from scalewise.studies import run as running
from scalewise.studies.base import Start
from scalewise.studies.run import cache_key, variant_recipe


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_has_a_recipe_with_the_same_training(name):
    recipes = [variant_recipe(variant, 1, None) for variant in STUDIES[name].variants]
    assert len({(r.train.iterations, r.train.batch, r.train.seed) for r in recipes}) == 1
    for variant, recipe in zip(STUDIES[name].variants, recipes, strict=True):
        sampled = recipe.override(list(variant.sampling_overrides)).schedule.build()
        assert sampled.full == recipe.schedule.build().full
    trained = [not variant.sampler and not variant.start for variant in STUDIES[name].variants]
    students = [cache_key(r) for is_trained, r in zip(trained, recipes, strict=True) if is_trained]
    # Two variants share a student only if they differ in sampling.
    expected = len(
        {a.overrides for is_trained, a in zip(trained, STUDIES[name].variants, strict=True) if is_trained}
    )
    assert len(set(students)) == expected


def test_studies_share_students():
    shared = [
        STUDIES["scale-vs-full"].variants[1],
        STUDIES["losses"].variants[0],
        STUDIES["schedules"].variants[0],
    ]
    assert len({cache_key(variant_recipe(variant, 0, None)) for variant in shared}) == 1
    assert cache_key(variant_recipe(shared[0], 1, None)) != cache_key(variant_recipe(shared[0], 0, None))


def test_a_study_runs_resumes_and_writes_its_page(tmp_path, monkeypatch):
    study = Study(
        "tiny", "A tiny one", "nowhere",
        (
            Variant("untrained", sampler="undistilled"),
            Variant("trained", ("loss.mmd_only=true", "train.batch=2", "train.sample_prompts=[]")),
            Variant("drawn at full scale", ("loss.mmd_only=true", "train.batch=2", "train.sample_prompts=[]"),
                ("schedule.full_scale=true",)),
        ),
        (Claim("training helps", "trained", "untrained"), Claim("scales do no harm", "trained",
                                                                "drawn at full scale",
                                                                ("trained", "untrained"))),
        "everything",
    )  # fmt: skip
    settings = StudySettings(seeds=(0, 1), count=20, iterations=2)
    outcome = run_study(study, tmp_path, settings, progress=console.progress)
    assert (
        len(list((tmp_path / "students").iterdir())) == 2
    )  # the third variant uses the student of the second
    assert len(list((tmp_path / "drawn").glob("*.safetensors"))) == 6
    write_page(outcome, tmp_path)
    stored = json.loads((tmp_path / "tiny.json").read_text())
    assert set(stored["figures"]) == {"untrained", "trained", "drawn at full scale"}
    assert len(stored["findings"]) == 4 and set(stored["verdicts"]) == {"training helps", "scales do no harm"}
    for finding in outcome.findings:
        mean = sum(finding.gain.by_seed) / 2
        if finding.metric == "clip_score":  # a mean over images, so the mean of the seeds is that of all
            assert finding.gain.value == pytest.approx(mean, abs=1e-6)
    monkeypatch.setattr(running, "generate_images", lambda *_, **__: pytest.fail("sampled again"))
    again = run_study(study, tmp_path, settings, progress=console.progress)
    assert again.to_dict() == outcome.to_dict()
    assert outcome.tokens == {"untrained": 564, "trained": 564, "drawn at full scale": 1024}
    page = write_page(outcome, tmp_path / "pages").read_text()
    for word in (
        "training helps",
        "everything",
        "tiny.png",
        "--seed 0 --seed 1",
        outcome.verdict("training helps"),
        "1,024 |",
    ):
        assert word in page
    assert (tmp_path / "pages" / "tiny.png").stat().st_size > 5000


def test_a_start_is_noised_before_or_after_upscaling():
    small, full = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 16, 16)
    make = partial(
        running.noise_latents, small=small, full=full, seeds=[3, 4], process=FlowMatching(), t=400.0
    )
    eps, small_eps = (SampleNoise([3, 4])((4, side, side)) for side in (16, 8))
    torch.testing.assert_close(make("noised"), 0.6 * full + 0.4 * eps)
    enlarged = upscale_latents(small, Scale(1, 16, 16))
    torch.testing.assert_close(make("enlarged, noised"), 0.6 * enlarged + 0.4 * eps)
    late = upscale_latents(0.6 * small + 0.4 * small_eps, Scale(1, 16, 16))
    torch.testing.assert_close(make("noised, enlarged"), late)


def test_the_teacher_continues_from_samples_of_its_dataset(tmp_path):
    """With little noise the images hardly change; upscaled noise is not removed by the teacher."""
    starts = {"A": Start("noised", 200), "C": Start("noised, enlarged", 600)}
    study = Study(
        "starts", "Starts", "nowhere", tuple(Variant(name, start=start) for name, start in starts.items()),
        (Claim("noise comes last", "A", "C"),), "everything",
    )  # fmt: skip
    outcome = run_study(study, tmp_path, StudySettings(seeds=(0,), count=20), progress=console.progress)
    data = running.load_starts(20)
    full = list(data.latents.values())[-1]
    clean = data.scoring.scorer.embed_images(to_bytes(load_model(mini.TEACHER).decode(full)))
    stored = {}
    for path in (tmp_path / "drawn").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored[file.metadata()["arm"]] = file.get_tensor("scorer")
    near, far = ((clean * stored[name]).sum(-1).mean() for name in ("A", "C"))
    assert 1 - near < 0.01 and 1 - far > 5 * (1 - near)
    assert [f.claim.text for f in outcome.findings] == ["noise comes last"] * 2
    # Nothing is trained, so one seed is enough for an interval.
    assert all(f.gain.interval.known and not f.gain.trained for f in outcome.findings)
    with pytest.raises(RecipeError, match="too few for 900 prompts"):
        running.load_starts(900)


def test_the_command_lists_studies_and_rejects_unknown_ones(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study"])
    assert not end.value.code
    listed = capsys.readouterr().out
    assert all(name in listed for name in STUDIES)
    with pytest.raises(SystemExit) as end:
        main(["study", "loses"])
    assert (
        end.value.code
        and "Unknown study 'loses'; available: upscaling, scale-vs-full" in capsys.readouterr().err
    )


def test_seeds_have_to_differ():
    with pytest.raises(RecipeError, match="one or more different integers"):
        StudySettings(seeds=(1, 1))
    with pytest.raises(RecipeError, match="one or more different integers"):
        StudySettings(seeds=())
    with pytest.raises(RecipeError, match=r">= 0; got \[-1\]"):
        StudySettings(seeds=(-1,))


@pytest.mark.parametrize(("arguments", "message"), [
    (["losses", "--count", "0"], "0 prompts are too few for intervals; use 20 or more"),
    (["losses", "--count", "49"], "49 prompts are too few to compare students; use --count 50 or more"),
    (["losses", "--count", "300"], "There are only 299 held-out captions, not 300; reduce --count"),
    (["scale-vs-full", "upscaling", "--count", "299", "--iterations", "0"], "must be 1 or more; got 0"),
    (["losses", "--out", "{file}/sub"], "cannot be created"),
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


def test_every_study_is_checked_before_the_first_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "captions", lambda split: ["a"] * 1000)
    with pytest.raises(SystemExit) as end:
        main(["study", "losses", "upscaling", "--count", "900", "--out", str(tmp_path / "new")])
    assert end.value.code and "too few for 900 prompts" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_study_computes_a_difference_like_evaluate(tmp_path):
    """The halves of the prompts are the same, so the interval is that of `scalewise evaluate`."""
    data, torch_rows = running.load_held_out(40), torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, data.scoring.reference.shape[1], generator=torch_rows) for _ in "ab")
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (a, b))
    prompts = Prompts.of(data.captions)
    seen = [data.scoring.combine({"scorer": rows}, prompts) for rows in (a, b)]
    expected = measure(seen[0], against=seen[1])["frechet"]
    one, two = (running.compute_metric("frechet", s) for s in seen)
    assert (one - two).interval().to_list() == pytest.approx(expected.to_list(), abs=1e-12)


def test_tokens_of_a_variant_are_summed_over_its_passes():
    tokens = {variant.name: running.count_tokens(variant) for variant in STUDIES["scale-vs-full"].variants}
    assert tokens["scale-wise, 4 steps"] == 8 * 8 + 10 * 10 + 12 * 12 + 16 * 16 == tokens["undistilled"]
    assert (tokens["full-scale, 4 steps"], tokens["full-scale, 2 steps"]) == (4 * 256, 2 * 256)
    assert tokens["teacher"] == 28 * 2 * 256
    sampled = {
        variant.name: running.count_tokens(variant) for variant in STUDIES["untrained-scales"].variants
    }
    assert sampled["trained at full scale, drawn scale-wise"] == 564


def test_results_of_another_version_of_the_mini_are_not_reused(monkeypatch):
    recipe = variant_recipe(STUDIES["losses"].variants[0], 0, None)
    before = cache_key(recipe)
    assert cache_key(recipe) == before
    monkeypatch.setattr(mini, "fingerprint", lambda *_: "another")
    assert cache_key(recipe) != before


def test_a_damaged_feature_file_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "0123.safetensors"
    path.write_bytes(b"\x10\x00")
    with pytest.raises(RecipeError, match=r"0123.safetensors is damaged .*delete it and run the study again"):
        running.load_features(path)


def test_an_interrupted_study_says_that_the_same_command_resumes(tmp_path, monkeypatch):
    def stopped(*_, **__):
        yield {"iteration": 1}
        raise TrainingInterrupted("SIGTERM", 1)

    monkeypatch.setattr(running, "distill", stopped)
    variant, recipe = STUDIES["losses"].variants[0], variant_recipe(STUDIES["losses"].variants[0], 0, 2)
    with pytest.raises(
        TrainingStopped, match=r"SIGTERM after iteration 1; saved\. Run the same command again"
    ):
        running.prepare_sampler(variant, recipe, tmp_path, console.progress)

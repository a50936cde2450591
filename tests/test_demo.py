"""A shortened demo writes a self-contained report; the plan fits into the time limit."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest

from scalewise.cli import demo, main
from scalewise.config.presets import find_recipe


@pytest.mark.timeout(900)  # a minute on a quiet machine
def test_the_demo_ends_in_a_self_contained_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fit_plan", lambda *_, **__: demo.Plan(4, 8, 10.0, 10.0, 10.0))
    monkeypatch.setattr(demo, "GALLERY_PROMPTS", 6)
    monkeypatch.setattr(demo, "TIMING_ROUNDS", 1)
    report = demo.run_demo(tmp_path / "demo", minutes=1)
    text = report.read_text()
    assert text.count("data:image/") > 4 * 6 and "<script" not in text
    assert not re.search(r"(?:src|href)=\"https?://[^\"]+\.(?:css|js|png|svg)", text)
    for words in ("Fréchet", "Prompt match", "CLIP score", "1000", "8x8", "batch"):
        assert words in text, words
    run = tmp_path / "demo" / "run"
    sample, longer, own = demo.next_steps(find_recipe("mini-demo"), run)
    assert all(step.command.splitlines()[0] in html.unescape(text) for step in (sample, own))
    shorter = [*shlex.split(longer.command.splitlines()[0])[1:], "--dry-run"]
    for words in ([*shlex.split(sample.command)[1:], "--out", str(tmp_path / "drawn")], shorter):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, words
    again = demo.run_demo(tmp_path / "demo", minutes=1)  # a finished training is not repeated
    assert again == report


def test_the_plan_stays_within_the_time_on_fast_and_slow_machines() -> None:
    for iteration, image in [(0.05, 0.05), (0.6, 0.4), (1.5, 0.8), (4.0, 2.0)]:
        plan = demo.fit_plan(300, iteration, image, minutes=14)
        assert plan.iterations == demo.MIN_ITERATIONS or plan.minutes <= 14.01
        assert demo.MIN_ITERATIONS <= plan.iterations <= 300 and 24 <= plan.prompts <= 100
    assert demo.fit_plan(300, 0.6, 0.4, minutes=14).iterations == 300

"""The report: one file that needs nothing else, escapes what it is given, and says honestly what is worse."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scalewise.evaluation.evaluate import Row
from scalewise.evaluation.report import Column, ReportContent, Stage, StepSequence, write_report
from scalewise.evaluation.report.charts import lines_of, smooth, training_charts
from scalewise.evaluation.report.findings import duration, findings, first_and_last, milliseconds
from scalewise.evaluation.report.images import embed, zoom
from scalewise.evaluation.timing import Timing
from scalewise.metrics import Interval


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def row(name: str, kind: str, frechet: list[float], match: list[float], **more: Any) -> Row:
    values = {"frechet": Interval(*frechet), "prompt_match": Interval(*match)}
    return Row(name, kind, "4 steps", 300, values, **more)


def timing(name: str, batch: int, total: float, speedup: float | None) -> Timing:
    parts = {"text": 1.0, "denoiser": total - 3, "vae": 2.0, "total": total}
    ratios = {} if speedup is None else {"total": same(speedup), "denoiser": same(2 * speedup)}
    return Timing(name, batch, 7, {part: same(value) for part, value in parts.items()}, ratios, "teacher")


def same(value: float) -> Interval:
    return Interval(value, value, value)


def training_log(count: int = 80) -> list[dict[str, float]]:
    return [
        {"iteration": i + 1, "step": i % 4, "mmd": 0.2 - 0.002 * i, "x0/mean": 0.0, "x0/std": 1.0,
         "x0/beyond_4_sigma": 0.0, "student/gradient_norm": 1.0}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def content() -> ReportContent:
    worse = {"frechet": Interval(0.05, 0.02, 0.08), "prompt_match": Interval(-0.01, -0.04, 0.02)}
    noise = pictures(4, 32)
    return ReportContent(
        title="A <four-step> student",
        summary="It samples in 4 steps & is fast.",
        stages=[Stage("training", "300 iterations", 90.0), Stage("timing", "7 rounds", 30.0)],
        prompts=["a red apple", "a <b>bold</b> cat"],
        columns=[Column("teacher", "28 steps", noise[:2]), Column("student", "4 steps", noise[2:])],
        step_sequences=[
            StepSequence("a red apple", ["t 1000, 2x2", "t 602, 4x4"], [noise[0, :16, :16], noise[1]])
        ],
        log=training_log(),
        schedule=["t 1000, 2x2", "t 896, 3x3", "t 737, 3x3", "t 602, 4x4"],
        rows=[row("teacher", "teacher", [0.14, 0.13, 0.15], [0.78, 0.73, 0.82]),
                 row("student", "student", [0.19, 0.17, 0.21], [0.77, 0.72, 0.81],
                     compared_with="teacher", differences=worse),
                 row("held-out pictures", "real", [0.05, 0.04, 0.06], [0.86, 0.82, 0.9])],
        timings=[timing("teacher", 1, 1450, None), timing("student", 1, 90, 16.1),
                 timing("teacher", 8, 990, None), timing("student", 8, 55, 18.0)],
        command="scalewise demo --out 'my run'",
        recipe="name: mini\nabout: <x>\n",
        versions={"scalewise-diffusion": "0.1.0", "torch": "2.13.0"},
        machine={"processor": "2 cores"},
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects tags and checks that they close in the order in which they open."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def text(content: ReportContent, tmp_path: Path) -> str:
    return write_report(tmp_path / "deep" / "report.html", content).read_text(encoding="utf-8")


def test_a_report_is_well_formed_and_fetches_nothing(text: str) -> None:
    reader = Reader(text)
    assert reader.open == []
    for tag, attributes in reader.seen:
        assert tag not in {"script", "link", "iframe", "object", "embed", "audio", "video"}
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "background"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\((?!#|data:)", text)
    assert "default-src 'none'" in text


def test_every_picture_has_words_for_those_who_do_not_see_it(text: str) -> None:
    images = [attributes for tag, attributes in Reader(text).seen if tag == "img"]
    assert len(images) == 2 * 2 + 2
    assert images[0]["alt"] == "a red apple, generated by teacher"
    assert images[-1]["alt"] == "a red apple, 32 by 32 pixels, t 602, 4x4"
    charts = [
        attributes for tag, attributes in Reader(text).seen if "chart" in (attributes.get("class") or "")
    ]
    assert "from 0.193 in the first tenth" in str([chart.get("aria-label") for chart in charts])


def test_what_comes_from_outside_is_escaped(text: str) -> None:
    assert "<h1>A &lt;four-step&gt; student</h1>" in text
    assert "a &lt;b&gt;bold&lt;/b&gt; cat" in text
    assert "<b>bold" not in text
    assert "about: &lt;x&gt;" in text


def test_no_text_from_outside_leaves_its_attribute_or_element(content: ReportContent, tmp_path: Path) -> None:
    odd = 'x" onerror="1\'><script>'
    columns = [Column(odd, odd, column.images) for column in content.columns]
    changed = replace(
        content, title=odd, prompts=[odd, odd], columns=columns, rows=[replace(r, name=odd, about=odd) for
        r in content.rows], timings=[replace(t, name=odd) for t in content.timings], command=odd,
        step_sequences=[replace(content.step_sequences[0], prompt=odd, labels=[odd, odd])],
        schedule=[odd] * 4, stages=[Stage(odd, odd, 1.0)], notes=[odd], machine={odd: odd},
        versions={"scalewise-diffusion": odd},
    )  # fmt: skip
    reader = Reader(write_report(tmp_path / "report.html", changed).read_text())
    assert reader.open == [] and not any(tag == "script" for tag, _ in reader.seen)
    assert not any(name.startswith("on") for _, attributes in reader.seen for name in attributes)
    assert f"{odd}, generated by {odd}" in [attributes.get("alt") for _, attributes in reader.seen]


def test_small_pictures_keep_every_pixel_and_are_shown_at_whole_multiples() -> None:
    picture = pictures(1, 40)[0]
    tag = embed(picture, alt="noise")
    code = re.search(r"base64,([^\"]+)", tag)
    assert code is not None
    with Image.open(io.BytesIO(base64.b64decode(code[1]))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), picture)
    assert 'width="120" height="120"' in tag
    assert zoom(pictures(1, 128)[0]) == (128, 128)
    assert zoom(np.zeros((512, 1024, 3), np.uint8)) == (256, 128)


def test_large_pictures_are_stored_no_larger_than_sharp_displays_need() -> None:
    tag = embed(np.zeros((1024, 1024, 3), np.uint8), alt="")
    code = re.search(r"base64,([^\"]+)", tag)
    assert code is not None
    with Image.open(io.BytesIO(base64.b64decode(code[1]))) as image:
        assert image.size == (512, 512)


def test_the_words_say_where_the_student_is_worse_and_where_nothing_can_be_said(
    content: ReportContent,
) -> None:
    sentences = findings(content)
    assert "Student: worse than teacher in Fréchet distance +0.050 [+0.020, +0.080]." in sentences
    assert (
        "Student: no measurable difference to teacher in Prompt match −1.0 points [−4.0, +2.0]." in sentences
    )
    assert any(
        "real images: held-out pictures (300), Fréchet distance 0.050, Prompt match 86.0%" in s
        for s in sentences
    )
    assert any(
        "batch size 1: student 90\u00a0ms per image, teacher 1.45\u00a0s; a speed-up of 16.1x" in s
        for s in sentences
    )
    assert "MMD fell from 0.193 in the first tenth of training to 0.049 in the last (75%)." in sentences


def test_the_words_warn_of_drift_of_few_rounds_and_of_unequal_counts(content: ReportContent) -> None:
    log = [entry | {"x0/beyond_4_sigma": 0.0001 * i} for i, entry in enumerate(content.log)]
    few = [replace(found, rounds=3) for found in content.timings]
    uneven = [*content.rows[:1], replace(content.rows[1], images=150)]
    said = " ".join(findings(replace(content, log=log, timings=few, rows=uneven)))
    assert "latents have drifted" in said
    assert "Times were measured in 3 rounds" in said
    assert "different numbers of images (150, 300)" in said


def test_the_pages_table_carries_figures_intervals_verdicts_and_ratios(text: str) -> None:
    assert '<strong>0.190</strong> <em class="worse">worse</em><small>[0.170, 0.210]</small>' in text
    assert "<strong>77.0%</strong><small>[72.0%, 81.0%]</small>" in text
    assert "<strong>16.1×</strong>" in text
    assert "1 min 30 s" in text


def test_the_students_terms_have_a_line_for_each_step_of_the_schedule(content: ReportContent) -> None:
    lines = lines_of(content.log, "mmd", content.schedule)
    assert [line.label for line in lines] == list(content.schedule)
    assert lines[1].x.tolist()[:3] == [2, 6, 10]
    assert lines[1].y[0] == pytest.approx(0.198)
    assert [chart.title for chart in training_charts(content.log, content.schedule)] == [
        "MMD", "Mean and std of x0", "Share of x0 beyond 4 sigma", "Gradient norms",
    ]  # fmt: skip


def test_curves_are_drawn_with_the_pages_colours_and_the_same_way_every_time(content: ReportContent) -> None:
    first, again = (training_charts(content.log, content.schedule)[0].svg for _ in range(2))
    assert first == again
    assert "var(--series-4)" in first
    assert "currentColor" in first
    assert not re.search(r"#0000[0-9]", first)
    assert "<metadata" not in first


def test_smoothing_keeps_a_straight_line_straight_and_an_average_in_place() -> None:
    line = np.linspace(0, 1, 200)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    assert smooth(np.array([3.0, 3.0])).tolist() == [3.0, 3.0]
    assert first_and_last([{"a": 1}] * 10, "a") is None


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    text = write_report(tmp_path / "report.html", ReportContent("Bare", "Nothing yet.")).read_text()
    assert "<h1>Bare</h1>" in text
    assert "<section>" not in text
    assert Reader(text).open == []


def test_prompts_are_split_into_rows_of_about_equal_length(content: ReportContent, tmp_path: Path) -> None:
    nine = replace(content, prompts=["a cat"] * 9, columns=[Column("teacher", "", pictures(9, 128))])
    text = write_report(tmp_path / "report.html", nine).read_text()
    bands = text.split('<div class="band"')[1:]
    assert [band.count("<figure>") for band in bands] == [5, 4]


def test_a_column_that_lacks_a_picture_is_refused(content: ReportContent) -> None:
    with pytest.raises(ValueError, match="'student' has 1 images for 2 prompts; the numbers must match"):
        replace(content, columns=[Column("student", "", pictures(1, 8))])


def test_times_are_told_in_the_unit_that_reads_best() -> None:
    assert [milliseconds(t) for t in (4.21, 91.3, 1450)] == ["4.21\u00a0ms", "91.3\u00a0ms", "1.45\u00a0s"]
    assert [duration(t) for t in (0.4, 42, 250, 11100)] == ["0.4 s", "42 s", "4 min 10 s", "3 h 5 min"]

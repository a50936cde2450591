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
from scalewise.evaluation.report import (
    Column,
    NextStep,
    ReportContent,
    Stage,
    StepSequence,
    write_report,
)
from scalewise.evaluation.report.charts import lines_of, smooth, training_charts
from scalewise.evaluation.report.findings import duration, findings, first_and_last, milliseconds
from scalewise.evaluation.report.images import embed
from scalewise.evaluation.report.page import tiles
from scalewise.evaluation.timing import Timing
from scalewise.metrics import METRICS, Interval


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
        next_steps=[NextStep("Draw & look:", "scalewise sample 'a <cat>'")],
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
        versions={"scalewise-diffusion": odd}, next_steps=[NextStep(odd, odd)],
    )  # fmt: skip
    reader = Reader(write_report(tmp_path / "report.html", changed).read_text())
    assert reader.open == [] and not any(tag == "script" for tag, _ in reader.seen)
    assert not any(name.startswith("on") for _, attributes in reader.seen for name in attributes)
    assert f"{odd}, generated by {odd}" in [attributes.get("alt") for _, attributes in reader.seen]


def stored(tag: str) -> np.ndarray:
    """Return the pixels of an <img> with a data URL."""
    code = re.search(r"base64,([^\"]+)", tag)
    assert code is not None
    with Image.open(io.BytesIO(base64.b64decode(code[1]))) as image:
        return np.asarray(image.convert("RGB"))


def test_small_pictures_keep_every_pixel_and_are_shown_at_the_size_asked_for() -> None:
    picture = pictures(1, 40)[0]
    tag = embed(picture, alt="noise")
    assert np.array_equal(stored(tag), picture)
    assert 'width="192" height="192"' in tag
    assert 'width="100" height="50"' in embed(np.zeros((64, 128, 3), np.uint8), alt="", width=100)


def test_large_pictures_are_stored_no_larger_than_sharp_displays_need() -> None:
    tag = embed(np.zeros((1024, 1024, 3), np.uint8), alt="")
    assert stored(tag).shape == (512, 512, 3)


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


def test_a_click_enlarges_a_row_without_a_script_and_without_a_second_copy(text: str) -> None:
    seen = Reader(text).seen
    figures = [attributes for tag, attributes in seen if tag == "figure" and "popover" in attributes]
    assert [figure["id"] for figure in figures] == ["row-1", "row-2", "steps-1"]
    buttons = [attributes for tag, attributes in seen if tag == "button"]
    openers = {b["popovertarget"]: b["aria-label"] for b in buttons if b["class"] == "open"}
    closers = [b["popovertarget"] for b in buttons if b.get("popovertargetaction") == "hide"]
    assert openers == {
        "row-1": "Enlarge: a red apple",
        "row-2": "Enlarge: a <b>bold</b> cat",
        "steps-1": "Enlarge: a red apple, all steps",
    }
    assert closers == list(openers)
    sources = [attributes["src"] for tag, attributes in seen if tag == "img"]
    assert len(sources) == 2 * 2 + 2  # noise[1] is in a row and the last step
    assert len(set(sources)) == 5


def test_the_file_is_not_much_larger_than_its_images(content: ReportContent, tmp_path: Path) -> None:
    columns = [Column(name, "", pictures(6, 128)) for name in ("teacher", "student")]
    bare = replace(content, log=[], prompts=["a cat"] * 6, step_sequences=[], columns=columns)
    size = write_report(tmp_path / "report.html", bare).stat().st_size
    image = len(embed(bare.columns[0].images[0], alt=""))
    assert 12 * image < size < 12 * image + 40_000


def test_a_render_stands_before_the_samplers_and_says_what_it_is(
    content: ReportContent, tmp_path: Path
) -> None:
    truth = Column("render", "the ground truth", pictures(2, 32, seed=1), "render")
    text = write_report(
        tmp_path / "report.html", replace(content, columns=[*content.columns, truth])
    ).read_text()
    alts = [attributes["alt"] for tag, attributes in Reader(text).seen if tag == "img"]
    assert alts[:3] == [
        "a red apple, drawn by a program", "a red apple, generated by teacher",
        "a red apple, generated by student",
    ]  # fmt: skip
    assert text.count('<div class="render">') == 3  # the heading and one in each row
    assert text.count('<div class="sampler">') == 2 * 3


def test_steps_are_drawn_in_proportion_to_their_scale_with_arrows_between(text: str) -> None:
    steps = text[text.index('id="steps-1"') :].split("</figure>")[0]
    assert re.findall(r"--side:(\d+)", steps) == ["128", "256"]
    assert re.findall(r'width="(\d+)" height="(\d+)"', steps) == [("128", "128"), ("256", "256")]
    assert steps.count('class="arrow"') == 1
    assert "<b>step 1</b><span>t 1000</span><span>2x2</span><span>16 px</span></small>" in steps
    assert "<span>32 px</span><span>final image</span></small>" in steps


def test_tiles_carry_intervals_and_prefer_scene_match(
    content: ReportContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = tiles(content)
    assert [tile.value for tile in shown] == ["16.1×", "18.0×", "77.0%", "0.190"]
    assert shown[2].interval == "95% interval 72.0% to 81.0%"
    assert shown[2].about == ("Prompt match of student, higher is better (teacher: 78.0% [73.0%, 82.0%])")
    monkeypatch.setitem(METRICS, "scene_match", replace(METRICS["prompt_match"], title="Scene match"))
    rows = [replace(r, values=r.values | {"scene_match": Interval(0.5, 0.4, 0.6)}) for r in content.rows]
    assert [tile.about.split(" of ")[0] for tile in tiles(replace(content, rows=rows))[2:]] == [
        "Scene match", "Fréchet distance",
    ]  # fmt: skip
    unknown = replace(content.rows[1], values={"frechet": Interval(0.2, float("nan"), float("nan"))})
    assert tiles(replace(content, rows=[content.rows[0], unknown]))[-1].interval == ""


def test_metrics_of_a_group_have_their_own_table(content: ReportContent, tmp_path: Path) -> None:
    values = {"geneval": Interval(0.6, 0.5, 0.7), "geneval_counting": Interval(0.4, 0.3, 0.5)}
    rows = [replace(content.rows[0], values=content.rows[0].values | values), *content.rows[1:]]
    text = write_report(tmp_path / "report.html", replace(content, rows=rows)).read_text()
    overall, tasks = (
        text[text.index(f'aria-label="{label}"') :].split("</table>")[0]
        for label in ("Quality", "GenEval by task")
    )
    assert ">GenEval<" in overall and "GenEval counting" not in overall
    assert "<h3>GenEval by task</h3>" in text
    assert tasks.count("<tr") == 2  # the heading, and only the row that has these metrics
    assert "<strong>40.0%</strong>" in tasks and "Prompt match" not in tasks


def test_what_to_do_next_is_said_in_commands(text: str) -> None:
    section = text[text.index("What to do next") :].split("</section>")[0]
    assert "Draw &amp; look:<pre><code>scalewise sample &#39;a &lt;cat&gt;&#39;</code></pre>" in section


def test_a_column_that_lacks_a_picture_is_refused(content: ReportContent) -> None:
    with pytest.raises(ValueError, match="'student' has 1 images for 2 prompts; the numbers must match"):
        replace(content, columns=[Column("student", "", pictures(1, 8))])


def test_times_are_told_in_the_unit_that_reads_best() -> None:
    assert [milliseconds(t) for t in (4.21, 91.3, 1450)] == ["4.21\u00a0ms", "91.3\u00a0ms", "1.45\u00a0s"]
    assert [duration(t) for t in (0.4, 42, 250, 11100)] == ["0.4 s", "42 s", "4 min 10 s", "3 h 5 min"]

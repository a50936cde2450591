"""Intervals of shares and of few prompts: known values, and how often they hold the true value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalewise.evaluation.evaluate import Row, load_rows, save_rows, table
from scalewise.evaluation.report import ReportContent
from scalewise.evaluation.report.findings import quality
from scalewise.evaluation.report.page import render
from scalewise.metrics import ImageFeatures, Interval, measure, shares
from scalewise.metrics.base import Mean
from scalewise.metrics.intervals import Resampled, t_quantile


def passes(values: Tensor, *, each: int = 1) -> Mean:
    """A share of images, `each` of them a prompt."""
    return Mean(ImageFeatures(None, torch.arange(len(values)) // each, None), values[None])


def bernoulli(share: float, *size: int, seed: int = 0) -> Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share).double()


def test_wilsons_interval_has_its_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        found = shares.wilson(hits / count, count)
        assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)


def test_the_difference_of_unrelated_shares_has_newcombes_published_interval() -> None:
    # Newcombe 1998, table II (a): 56/70 - 48/80, method 10.
    ours, theirs = torch.full((150,), torch.nan), torch.full((150,), torch.nan)
    ours[:70], theirs[70:] = 0.0, 0.0
    ours[:56], theirs[70:118] = 1.0, 1.0
    found = shares.interval(passes(ours), passes(theirs))
    assert found.to_list() == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)


@pytest.mark.parametrize("count", [8, 40])
def test_shares_hold_the_true_one_about_as_often_as_promised(count: int) -> None:
    """Alone, and as paired differences of contenders that pass the same prompts more often than not."""
    alone = paired = 0
    for trial in range(300):
        hard = bernoulli(0.5, count, seed=trial).bool()
        ours = torch.where(
            hard, bernoulli(0.2, count, seed=1000 + trial), bernoulli(0.9, count, seed=trial + 2000)
        )
        theirs = torch.where(
            hard, bernoulli(0.2, count, seed=3000 + trial), bernoulli(0.7, count, seed=trial + 4000)
        )
        one, two = (shares.interval(passes(x)) for x in (ours, theirs))
        difference = shares.interval(passes(ours), passes(theirs))
        alone += one.low <= 0.55 <= one.high
        paired += difference.low <= 0.1 <= difference.high
        assert difference.value == pytest.approx(one.value - two.value)
    assert alone >= 0.92 * 300 and paired >= 0.92 * 300


def test_images_of_one_prompt_count_as_much_as_they_differ() -> None:
    """Four images a prompt: as one where they pass or fail together, as four where each does by itself."""
    together = bernoulli(0.5, 100).repeat_interleave(4)
    by_itself = bernoulli(0.5, 400, seed=1)
    for values, count in ((together, 100), (by_itself, 400)):
        tab = shares._by_prompt(values, passes(values, each=4).features)
        assert shares.effective_count(tab) == pytest.approx(count, rel=0.12)
    few = shares.interval(passes(by_itself[:40], each=4))  # 10 prompts: how alike they are cannot be measured
    share = float(by_itself[:40].mean())
    assert few == shares.wilson(share, 10)


def test_the_mean_of_tasks_adds_their_errors() -> None:
    parts = [shares.wilson(0.5, 30), shares.wilson(0.1, 20)]
    found = shares.mean_of_parts(parts)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - math.hypot(*(p.value - p.low for p in parts)) / 2)
    assert found.high == pytest.approx(0.3 + math.hypot(*(p.high - p.value for p in parts)) / 2)


def test_students_quantiles_are_the_tabled_ones() -> None:
    tabled = {1: 12.7062, 2: 4.3027, 10: 2.2281, 11: 2.2010, 19: 2.0930, 30: 2.0423, 298: 1.9680}
    for freedom, value in tabled.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=1.5e-4)


def test_a_mean_over_twenty_prompts_holds_the_true_one_about_as_often_as_promised() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1000, 20, generator=draw, dtype=torch.float64)
    halves = torch.rand(300, 20, generator=draw).argsort(1)[:, :10]
    found = [Resampled(float(x.mean()), x[halves].mean(1), 20).interval() for x in values]
    assert (
        sum(f.low <= 0 <= f.high for f in found) >= 930
    )  # 950 are expected; by normal quantiles it were 926


def few_prompts(count: int) -> tuple[Row, Row]:
    rows = torch.nn.functional.normalize(
        torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    one, two = (ImageFeatures(rows[i : i + count], torch.arange(count), rows, rows) for i in (0, 20))
    first = Row("a", "folder", "", count, measure(one, rounds=20))
    return first, Row(
        "b", "folder", "", count, measure(two, rounds=20), "a", measure(two, against=one, rounds=20)
    )


def test_fewer_than_twenty_prompts_have_no_interval_of_a_mean_or_distance_and_no_verdict(
    tmp_path: Path,
) -> None:
    _, enough = few_prompts(20)
    assert all(found.known for found in (*enough.values.values(), *enough.differences.values()))
    first, row = few_prompts(19)
    assert {name for name, found in row.values.items() if found.known} == {"prompt_match"}
    assert row.verdict("clip_score") == row.verdict("frechet") == ""
    save_rows([first, row], tmp_path)
    stored = json.loads(
        (tmp_path / "figures.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert stored[1]["values"]["clip_score"][1:] == [None, None]
    assert load_rows(tmp_path) == [first, row]
    assert f"| {row.values['clip_score'].value:.1f} |" in table([first, row])
    assert "Values without an interval have too few prompts" in table([first, row])


def test_a_report_says_of_too_few_prompts_that_they_are() -> None:
    first, row = few_prompts(19)
    shown = render(ReportContent("Few", "", rows=[first, row]))
    assert f"<td><strong>{row.values['clip_score'].value:.1f}</strong></td>" in shown
    said = " ".join(quality(row))
    assert "too few prompts for a comparison with a in" in said and "inf" not in said and "None" not in said


def test_an_unknown_interval_excludes_nothing_and_stays_unknown_within_bounds() -> None:
    unknown = Interval.unknown(0.5)
    assert not unknown.within(0, 1).known and not unknown.excludes(7)
    assert unknown.show(lambda value: f"{value:.1f}") == "0.5"
    assert Interval.from_list(unknown.to_list()) == unknown

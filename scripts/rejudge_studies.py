"""Judge stored studies anew by today's rule, from the numbers in their JSON alone.

    python scripts/rejudge_studies.py docs/studies

For pages that were written before 2026-11-26, whose JSON has a gain as [value, low, high] over prompts. The
standard error over prompts is taken from such an interval's width, the trainings' spread from the gains by
seed. How a yardstick differs by seed is not stored: that of two arms which another claim compares is taken
from there, that of arms without training counts as equal for all seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scalewise.common.results import write_json
from scalewise.metrics import Interval
from scalewise.metrics.intervals import t_quantile
from scalewise.studies import STUDIES, Effort, Outcome
from scalewise.studies.base import Claim, Effect, Finding
from scalewise.studies.page import page

NOTE = """## Judged again on 2026-11-26
The figures and the gains by seed are those measured before; intervals of gains and verdicts are by the rule
above, from the stored numbers (`python scripts/rejudge_studies.py docs/studies`), which have two seeds.
"""


def effect(stored: list[float], by_seed: list[float], *, count: int, trained: bool) -> Effect:
    value, low, high = stored
    return Effect(value, (high - low) / 2 / t_quantile(count - 1), count, tuple(by_seed), trained)


def yardstick_by_seed(found: dict[str, Any], stored: dict[str, Any], seeds: int) -> list[float]:
    for other in stored["findings"]:
        if other["metric"] == found["metric"] and [other["arm"], other["other"]] == found["yardstick"]:
            return other["by_seed"]
    return [found["stake"][0]] * seeds


def finding(claim: Claim, found: dict[str, Any], stored: dict[str, Any]) -> Finding:
    study, count = STUDIES[stored["study"]], stored["prompts"]
    differs = bool({claim.arm, claim.other} & study.trained)
    gain = effect(found["gain"], found["by_seed"], count=count, trained=differs)
    if not found["stake"]:
        return Finding(claim, found["metric"], gain)
    assert claim.yardstick
    measure_differs = bool(set(claim.yardstick) & study.trained)
    stakes = yardstick_by_seed(found, stored, len(found["by_seed"]))
    leeways = [g + claim.tolerance * s for g, s in zip(found["by_seed"], stakes, strict=True)]
    stake = effect(found["stake"], stakes, count=count, trained=measure_differs)
    leeway = effect(found["leeway"], leeways, count=count, trained=differs or measure_differs)
    return Finding(claim, found["metric"], gain, stake, leeway)


def rejudge(file: Path) -> Outcome | None:
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["study"] not in STUDIES or isinstance(stored["findings"][0]["gain"], dict):
        return None
    study = STUDIES[stored["study"]]
    claims = {claim.text: claim for claim in study.claims}
    findings = [finding(claims[found["claim"]], found, stored) for found in stored["findings"]]
    figures = {
        arm: {metric: Interval.from_list(ends) for metric, ends in values.items()}
        for arm, values in stored["figures"].items()
    }
    effort = Effort(tuple(stored["seeds"]), stored["prompts"], stored["iterations"])
    return Outcome(study, effort, figures, findings, stored["tokens"])


def main(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        outcome = rejudge(file)
        if outcome is None:
            continue
        before = json.loads(file.read_text(encoding="utf-8"))["verdicts"]
        write_json(file, outcome)
        text = file.with_suffix(".md").read_text(encoding="utf-8")
        _, mark, rest = text.partition("\n## Measured before")
        kept = f"\n{NOTE}{mark}{rest}" if mark else f"\n{NOTE}"
        file.with_suffix(".md").write_text(page(outcome) + kept, encoding="utf-8")
        for claim, was in before.items():
            print(f"{outcome.study.name}: {claim}: {was} -> {outcome.verdict(claim)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

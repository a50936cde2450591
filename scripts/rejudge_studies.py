"""Write the pages of stored studies again, from the values in their JSON files; nothing is trained.

    python scripts/rejudge_studies.py docs/studies

Text of a page after its last generated section is kept. The verdicts are those of the current rule. In files
written before 2026-11-26, a gain is stored as [value, low, high] over prompts: the standard error over
prompts is computed from the width of the interval, and the spread of the trainings from the gains of each
seed. How the reference of a claim varies between seeds is not stored there: it is taken from another claim
that compares the same variants, and assumed to be constant otherwise (variants without training).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from scalewise.common.checkpoint import write_atomically
from scalewise.common.results import write_json
from scalewise.evaluation.training_cost import Mode, TrainingCost
from scalewise.metrics import Interval
from scalewise.metrics.intervals import t_quantile
from scalewise.studies import STUDIES, Outcome, StudySettings, training_cost
from scalewise.studies.base import Claim, Effect, Finding
from scalewise.studies.page import format_page

NOTE = """## Verdicts computed again on 2026-11-26
The metrics and the gains of each seed are unchanged. Intervals of gains and verdicts follow the rule above
and were computed from the stored values (`python scripts/rejudge_studies.py docs/studies`), which have two
seeds.
"""


def load_effect(stored: Any, by_seed: list[float], *, count: int, trained: bool) -> Effect:
    """Load an effect; before 2026-11-26 only its interval over prompts was stored."""
    if isinstance(stored, dict):
        error, by_seed = stored["error_over_prompts"], stored["by_seed"]
        return Effect(stored["interval"][0], error, count, tuple(by_seed), stored["trained"])
    value, low, high = stored
    return Effect(value, (high - low) / 2 / t_quantile(count - 1), count, tuple(by_seed), trained)


def reference_by_seed(found: dict[str, Any], stored: dict[str, Any], seeds: int) -> list[float]:
    """Return the difference of the reference variants for each seed of an old file."""
    for other in stored["findings"]:
        if other["metric"] == found["metric"] and [other["arm"], other["other"]] == found["yardstick"]:
            return other["by_seed"]
    return [found["stake"][0]] * seeds


def load_finding(claim: Claim, found: dict[str, Any], stored: dict[str, Any]) -> Finding:
    """Load the result of a claim in one metric."""
    study, count = STUDIES[stored["study"]], stored["prompts"]
    trained = bool({claim.variant, claim.other} & study.trained)
    gains = found.get("by_seed", [])
    gain = load_effect(found["gain"], gains, count=count, trained=trained)
    if not found["stake"]:
        return Finding(claim, found["metric"], gain)
    assert claim.reference
    reference_trained = bool(set(claim.reference) & study.trained)
    references = reference_by_seed(found, stored, len(gains)) if gains else []
    margins = [g + claim.tolerance * r for g, r in zip(gains, references, strict=True)]
    reference = load_effect(found["stake"], references, count=count, trained=reference_trained)
    margin = load_effect(found["leeway"], margins, count=count, trained=trained or reference_trained)
    return Finding(claim, found["metric"], gain, reference, margin)


def load_outcome(stored: dict[str, Any]) -> Outcome:
    """Load the results of a study."""
    study = STUDIES[stored["study"]]
    claims = {claim.text: claim for claim in study.claims}
    findings = [load_finding(claims[found["claim"]], found, stored) for found in stored["findings"]]
    values = {
        variant: {metric: Interval.from_list(ends) for metric, ends in metrics.items()}
        for variant, metrics in stored["figures"].items()
    }
    settings = StudySettings(tuple(stored["seeds"]), stored["prompts"], stored["iterations"])
    return Outcome(study, settings, values, findings, stored["tokens"])


def kept_text(page: Path) -> str:
    """Return the text of a page after its generated sections, of which the last is on differences."""
    text = page.read_text(encoding="utf-8")
    headings = ("\n## Differences from the paper\n", "\n## What differs from the paper\n")  # now and before
    heading = next(h for h in headings if h in text)
    _, mark, rest = text.partition(heading)[2].partition("\n## ")
    return mark + rest


def rewrite_study(file: Path, stored: dict[str, Any]) -> None:
    """Write the page of a study again, and its JSON if it is of the old form."""
    outcome, page = load_outcome(stored), file.with_suffix(".md")
    kept = kept_text(page)
    if isinstance(stored["findings"][0]["gain"], list):
        write_json(file, outcome)
        kept = f"\n{NOTE}{kept}"
    page.write_text(format_page(outcome) + kept, encoding="utf-8")
    for claim, before in stored["verdicts"].items():
        if outcome.verdict(claim) != before:
            print(f"{outcome.study.name}: {claim}: {before} -> {outcome.verdict(claim)}")


def rewrite_training_cost(file: Path, stored: dict[str, Any]) -> None:
    """Write page and plot of the study of training cost again."""
    modes = [Mode(m["name"], Interval.from_list(m["seconds"]), m["held"], m["peak"]) for m in stored["modes"]]
    ratios = {name: Interval.from_list(ends) for name, ends in stored["ratios"].items()}
    cost = TrainingCost(modes, ratios, stored["setting"])
    kept = kept_text(file.with_suffix(".md"))
    text = training_cost.format_page(cost, stored["verdicts"], stored["setting"]["rounds"])
    file.with_suffix(".md").write_text(text + kept, encoding="utf-8")
    write_atomically(file.with_suffix(".png"), partial(training_cost.plot, cost))


def main(folder: Path) -> None:
    """Write the pages of all studies in a folder again."""
    for file in sorted(folder.glob("*.json")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("study") in STUDIES:
            rewrite_study(file, stored)
        elif stored.get("study") == training_cost.NAME:
            rewrite_training_cost(file, stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Findings about the scores: copied from the prompt, all alike, at odds with themselves."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ..critique import DIMENSIONS
from ..example import Example, filled_example, repeats_example
from .entries import Entry
from .findings import Finding, finding, some

ROUNDING = 0.1
"""How far a stated overall score may lie from the mean of its dimensions and still be it."""
SAME_SPREAD = 0.3
"""A standard deviation below this, in points of 10, is as good as one score for all."""


def template_scores(entries: Sequence[Entry]) -> list[Finding]:
    """Score vectors equal to the filled example's of the row's own prompt, or of the service's."""
    examples: dict[str, Example | None] = {}
    found = []
    for entry in entries:
        if entry.prompt not in examples:
            examples[entry.prompt] = filled_example(entry.prompt)
        if entry.critique and repeats_example(entry.critique, examples[entry.prompt]):
            found.append(entry)
    return finding(
        "template_scores",
        "the prompt's example scores",
        found,
        f"In {some(len(found), 'row')} of {len(entries)} the scores are those of the filled "
        "example in the prompt. They say what the prompt said, and nothing about the photograph.",
        action="correct them",
        spoils=True,
    )


def repeated_scores(entries: Sequence[Entry]) -> list[Finding]:
    """One score vector for four photographs or more, and for a third of all."""
    photographs = {entry.photograph for entry in entries}
    groups = _grouped(entries, lambda entry: entry.scores or None)
    found = [
        group
        for group in groups
        if (n := len({entry.photograph for entry in group})) >= 4 and 3 * n > len(photographs)
    ]
    rows = [entry for group in found for entry in group]
    return finding(
        "repeated_scores",
        "one score vector for many photographs",
        rows,
        f"In {some(len(rows), 'row')} of {len(entries)} different photographs have one and the "
        "same scores. Whoever gave them did not tell the photographs apart.",
        spoils=True,
        groups=found,
    )


def flat_scores(entries: Sequence[Entry]) -> list[Finding]:
    """The same score in every dimension of a row."""
    found = [e for e in entries if len(e.scores) > 2 and len(set(e.scores)) == 1]
    return finding(
        "flat_scores",
        "one score in every dimension",
        found,
        f"In {some(len(found), 'row')} every dimension has the same score, so nothing can be "
        "learnt there about what sets the dimensions apart.",
    )


def overall_mismatch(entries: Sequence[Entry]) -> list[Finding]:
    """A stated overall score that is not the mean of its own dimensions."""
    found = [
        entry
        for entry in entries
        if entry.critique
        and abs(entry.critique.overall_score - statistics.fmean(entry.scores)) > ROUNDING + 1e-9
    ]
    return finding(
        "overall_mismatch",
        "overall is not the mean",
        found,
        f"In {some(len(found), 'row')} of {len(entries)} the overall score lies more than "
        f"{ROUNDING} from the mean of its own dimensions. It may be a judgement of its own; the "
        "database cannot say.",
        action="keep them and do not read much into the overall score",
    )


def dimension_drift(entries: Sequence[Entry]) -> list[Finding]:
    """Rows that judge another set of dimensions than most rows do."""
    sets = Counter(frozenset(_by_name(entry)) for entry in entries if entry.critique)
    if len(sets) < 2:
        return []
    usual = max(sets, key=lambda names: (sets[names], names == frozenset(DIMENSIONS)))
    found = [e for e in entries if e.critique and frozenset(_by_name(e)) != usual]
    counts = ", ".join(f"{n} with {len(names)}" for names, n in sets.most_common())
    return finding(
        "dimension_drift",
        "other dimensions than most rows",
        found,
        f"There are {len(sets)} sets of dimension names ({counts} names), and "
        f"another than most in {some(len(found), 'row')}. A model that learns several mixes them.",
    )


def constant_dimensions(entries: Sequence[Entry]) -> list[Finding]:
    """Dimensions whose scores hardly differ between the photographs."""
    still = [fact for fact in dimension_facts(entries) if fact["n"] >= 5 and fact["constant"]]
    names = ", ".join(fact["name"] for fact in still)
    rows = [e for e in entries if any(fact["name"] in _by_name(e) for fact in still)]
    return finding(
        "constant_dimensions",
        "dimensions that never vary",
        rows,
        f"The scores of {names} hardly vary (a standard deviation below {SAME_SPREAD} points), so "
        "a constant guess is right about them and a model cannot do better.",
        droppable=False,
        action="Do not report these dimensions as learnt; score them anew if they matter.",
    )


def dimension_facts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Per dimension: ``name, n, mean, sd, variance, min, max, constant``, scores in 0 to 10."""
    scores: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for name, score in _by_name(entry).items():
            scores[name].append(score)
    facts = []
    known = [name for name in DIMENSIONS if name in scores]
    for name in known + sorted(scores.keys() - set(known)):
        values = scores[name]
        variance = statistics.pvariance(values)
        facts.append(
            {
                "name": name,
                "n": len(values),
                "mean": round(statistics.fmean(values), 3),
                "variance": round(variance, 3),
                "sd": round(variance**0.5, 3),
                "min": min(values),
                "max": max(values),
                "constant": variance**0.5 < SAME_SPREAD,
            }
        )
    return facts


def _by_name(entry: Entry) -> dict[str, float]:
    return entry.critique.scores() if entry.critique else {}


def _grouped(entries: Sequence[Entry], key: Any) -> list[list[Entry]]:
    """Entries by a key, groups in the order of their first; None is no group."""
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        if (value := key(entry)) is not None:
            groups[value].append(entry)
    return list(groups.values())

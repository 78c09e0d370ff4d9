"""The measures of a report as charts, a table and caveats: plain values for the page's template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import wording
from .plots import ticks


def error_chart(arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """One row an arm: a dot at its score error and a line over its interval, in percent across."""
    rows = [
        {
            "label": wording.label(name),
            "note": wording.guess(name, arm),
            "css": css(name, arm),
            "value": arm["score_mae"],
            "interval": arm.get("score_mae_interval"),
            "text": wording.points(arm["score_mae"]),
        }
        for name, arm in arms.items()
    ]
    shuffled = arms.get("tuned", {}).get("score_mae_shuffled")
    if shuffled is not None:
        row = {"label": "Tuned, shown another photograph", "note": "it should do worse here"}
        row |= {"css": "shuffled", "value": shuffled, "interval": None}
        rows.insert(
            1 + next(i for i, r in enumerate(rows) if r["css"] == "tuned"),
            row | {"text": wording.points(shuffled)},
        )
    values = [v for row in rows for v in [row["value"], *(row["interval"] or [])] if v is not None]
    if not values:
        return None
    marks = ticks(0, max([*values, 0.5]), about=5)
    for row in rows:
        row["at"] = None if row["value"] is None else across(row["value"], marks[-1])
        row["span"] = [across(v, marks[-1]) for v in row["interval"]] if row["interval"] else None
    return {"rows": rows, "ticks": [(f"{mark:g}", across(mark, marks[-1])) for mark in marks]}


def css(name: str, arm: Mapping[str, Any]) -> str:
    """The class that gives an arm its colour and mark: base and tuned have their own."""
    if name in ("base", "tuned"):
        return name
    return "other" if wording.speaks(arm) else "mean_score"


def dimension_chart(arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """Score error of base, tuned and constant guess in each dimension, in percent across."""
    shown = {name: arms[name] for name in ("base", "tuned", "mean_score") if name in arms}
    names = list(dict.fromkeys(n for arm in shown.values() for n in arm["per_dimension"]))
    found = {
        (name, arm): shown[arm]["per_dimension"].get(name, {}).get("mae")
        for name in names
        for arm in shown
    }
    known = [value for value in found.values() if value is not None]
    if not known:
        return None
    marks = ticks(0, max([*known, 0.5]), about=4)
    rows = []
    for name in names:
        at = {
            arm: across(value, marks[-1])
            for arm in shown
            if (value := found[name, arm]) is not None
        }
        ends = [at[arm] for arm in ("base", "tuned") if arm in at]
        rows.append(
            {
                "name": name,
                "at": at,
                "line": (min(ends), max(ends)) if len(ends) == 2 else None,
                "text": {arm: wording.points(found[name, arm]) for arm in shown},
            }
        )
    return {
        "rows": rows,
        "arms": [(arm, wording.label(arm)) for arm in shown],
        "ticks": [(f"{mark:g}", across(mark, marks[-1])) for mark in marks],
    }


def across(value: float, end: float) -> float:
    """Where ``value`` lies between 0 and ``end``, in percent of the way."""
    return round(100 * min(max(value / end, 0.0), 1.0), 2)


@dataclass(frozen=True)
class Measure:
    """One column of the arms' tables.

    Attributes:
        name: the column's heading.
        note: what it measures; it stands under the table.
        cell: an arm's (value, interval or other small print).
        best: the key of which the lowest value is set in bold; blank for none.
        if_any: only where an arm's value of this key is more than nothing; blank for always.
    """

    name: str
    note: str
    cell: Callable[[Mapping[str, Any]], tuple[str, str]]
    best: str = ""
    if_any: str = ""


def _points(key: str) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda arm: (
        wording.points(arm.get(key)),
        wording.interval(arm.get(f"{key}_interval")),
    )


def _share(key: str) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda arm: (
        wording.percent(arm.get(key)),
        wording.interval(arm.get(f"{key}_interval"), share=True),
    )


def _signed(key: str) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda arm: (wording.points(arm.get(key), signed=True), "")


def _tally(key: str) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda arm: (str(arm[key]) if key in arm else wording.NONE, "")


def _rounded(key: str) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda arm: (wording.NONE if arm.get(key) is None else f"{arm[key]:.0f}", "")


def _latency(arm: Mapping[str, Any]) -> tuple[str, str]:
    """Median and 95th percentile; they say more than a mean that one slow answer moves."""
    late = arm.get("seconds_p95")
    told = f"p95{wording.GLUE}{wording.seconds(late)}" if late is not None else ""
    return wording.seconds(arm.get("seconds_p50")), told


def _memory(arm: Mapping[str, Any]) -> tuple[str, str]:
    peak = arm.get("peak_memory_gb")
    return (wording.NONE if peak is None else f"{peak:.1f}"), ""


MAIN = (
    Measure(
        "Score error",
        "mean absolute, in points of 10; lower is better",
        _points("score_mae"),
        best="score_mae",
    ),
    Measure("Exact format", "bare JSON, every key, no mending", _share("format_strict")),
    Measure("Readable", "a tolerant reader gets a critique", _share("readable")),
    Measure("Overall error", "of the overall score alone", _points("overall_mae"), "overall_mae"),
    Measure("Bias", "mean signed error; positive is too generous", _signed("score_bias")),
    Measure(
        "Correlation",
        "Spearman’s, of the overall scores: does it rank photographs alike",
        _points("overall_correlation"),
    ),
    Measure("Seconds", "per photograph, the median and the 95th percentile", _latency),
    Measure("Tokens", "generated per photograph", _rounded("tokens_mean")),
    Measure(
        "Tokens/s",
        "the median",
        lambda arm: (wording.seconds(arm.get("tokens_per_second_p50")), ""),
    ),
    Measure("Memory, GB", "the most at one time", _memory, if_any="peak_memory_gb"),
)
MORE = (
    Measure("Scored", "answers that the score error rests on", _tally("n_scored")),
    Measure(
        "Counting the lost",
        "score error with an unreadable answer as wrong as can be",
        _points("score_mae_worst_case"),
    ),
    Measure("Kendall", "tau-b of the overall scores", _points("overall_kendall")),
    Measure(
        "Spread",
        "of the overall scores, as a part of the references’",
        _share("overall_spread_ratio"),
    ),
    Measure(
        "Sets of scores",
        "different ones; 1 would be a template",
        _tally("distinct_score_vectors"),
    ),
    Measure(
        "Different advice",
        "of all recommendations given",
        _share("distinct_advice"),
    ),
    Measure(
        "Repeated advice",
        "answers with one advice in two dimensions",
        _tally("repeated_advice"),
        if_any="repeated_advice",
    ),
    Measure(
        "Another script",
        "answers not in the reference’s alphabet",
        _tally("foreign_script"),
        if_any="foreign_script",
    ),
    Measure("Cut off", "answers that met the token limit", _tally("unfinished"), "", "unfinished"),
    Measure(
        "First token",
        "median seconds until it is there; answers of a batch wait for one another",
        lambda arm: (wording.seconds(arm.get("first_token_seconds_p50")), ""),
        if_any="first_token_seconds_p50",
    ),
    Measure("Prompt", "tokens of it, with those of the picture", _rounded("prompt_tokens_mean")),
)


CONSTRAINT = (
    Measure("Differ", "answers that are not the same with it", lambda arm: (arm["differ"], "")),
    Measure(
        "Score error",
        "its change by photograph; positive is worse",
        lambda arm: (wording.points(arm["change"], signed=True), arm["interval"]),
    ),
    Measure("Time", "for each token, as a part of that without it", _share("ratio")),
)


def constraint_table(evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    """What answering under the schema changed and cost, a row an arm; None where none did."""
    arms = {}
    for name, found in (evidence.get("constraint") or {}).items():
        change = found["score_error_change"]
        ends = [wording.points(end, signed=True) for end in change["interval"] or ()]
        arms[name.removesuffix(wording.CONSTRAINED)] = {
            "n_readable": None,
            "differ": f"{found['changed']} of {found['n']}",
            "change": change["mean"],
            "interval": " to ".join(ends),
            "ratio": found["seconds_ratio"],
        }
    return arms_table(arms, CONSTRAINT) if arms else None


def arms_table(arms: Mapping[str, Any], measures: Sequence[Measure]) -> dict[str, Any]:
    """A row an arm, trivial arms last, and a column a measure; one that no arm has is left out."""
    order = sorted(arms, key=lambda name: not wording.speaks(arms[name]))
    shown = [
        measure
        for measure in measures
        if not measure.if_any or any(arm.get(measure.if_any) for arm in arms.values())
    ]
    least = {
        measure.best: min(
            (round(v, 9) for arm in arms.values() if (v := arm.get(measure.best)) is not None),
            default=None,
        )
        for measure in shown
        if measure.best
    }
    rows = []
    for name in order:
        arm, cells = arms[name], []
        for measure in shown:
            value = arm.get(measure.best) if measure.best else None
            strong = value is not None and round(value, 9) == least[measure.best]
            cells.append((measure.name, *measure.cell(arm), strong))
        rows.append({"css": css(name, arm), "label": wording.label(name), "cells": cells})
    return {
        "heads": [measure.name for measure in shown],
        "notes": [(measure.name, measure.note) for measure in shown],
        "rows": rows,
    }


def limits(report: Mapping[str, Any], advisor: str) -> list[str]:
    """What these numbers can and cannot show, from the numbers themselves."""
    evidence = report["evidence"]
    arms, n = evidence["arms"], evidence["n_photographs"]
    # What the labels are worth comes first: it limits everything after it.
    said = [f"{evidence['labels']} (The audit of the labels.)"] if evidence.get("labels") else []
    scored = evidence["n_references_with_scores"]
    said.append(
        f"The error is the distance from {possessive_scores(advisor)}. It says whether the model "
        "judges alike, not whether the judgement is right, and nothing about the prose: read the "
        "critiques above for that."
        if scored
        else "The references hold no scores, so nothing here says whether the model judges as "
        f"{advisor} does; read the critiques above, or link analyses that have scores."
    )
    if n < 30:
        said.append(
            f"With {wording.count(n, 'photograph')} only large differences show. Halving the "
            f"intervals would take about {4 * n}."
        )
    if found := wording.detectable(evidence):
        said.append(found)
    if evidence["n"] != n:
        said.append(
            f"{evidence['n']} rows lie on {wording.count(n, 'photograph')}; rows that share a "
            "photograph count as one."
        )
    vectors = {tuple(sorted(s["reference"]["scores"].items())) for s in report["sample_results"]}
    if scored and len(vectors) < 0.7 * evidence["n"]:
        said.append(
            f"The {evidence['n']} references use only {wording.count(len(vectors), 'set')} of "
            "scores. Where labels repeat themselves, a low error may be a habit learnt, not a "
            "picture seen."
        )
    tuned = arms.get("tuned", {})
    shuffled, own = tuned.get("score_mae_shuffled"), tuned.get("score_mae")
    fired = {d["name"]: d["sentence"] for d in evidence.get("detections", ()) if d["fired"]}
    if shuffled is not None and own and "ignores_picture" not in fired:
        share = 100 * (shuffled / own - 1)
        said.append(
            f"Shown another photograph, the tuned model’s error is {share:.0f} % higher: its "
            "scores come from the picture."
            if share >= 25
            else "Shown another photograph, the tuned model’s error is hardly different "
            f"({wording.points(shuffled)} instead of {wording.points(own)}): there is little sign "
            "that its scores come from the picture."
        )
    lost = {k: a["n"] - a["n_readable"] for k, a in arms.items() if "n_readable" in a}
    if any(lost.values()):
        which = wording.listing(
            [f"{k} of the {wording.label(name).lower()} model" for name, k in lost.items() if k]
        )
        said.append(
            f"Answers that cannot be read ({which}) are no part of the score error; they count "
            "against the format, and the table also charges them as wrong as can be."
        )
    # Those that decided the verdict stand beside it; the limit has its own sentence below.
    apart = {*(evidence.get("capped_by") or ()), "truncated"}
    said += [f"The tuned model: {text}" for name, text in fired.items() if name not in apart]
    if any(arm.get("unfinished") for arm in arms.values()):
        said.append("Some answers met the token limit; a higher eval.max_tokens lets them finish.")
    return said


def possessive_scores(advisor: str) -> str:
    """``Ansel’s own scores``."""
    return f"{wording.possessive(advisor)} own scores"

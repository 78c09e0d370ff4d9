"""The measures of a report as charts, a table and caveats: plain values for the page's template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import wording
from .plots import ticks


def error_chart(arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """One row an arm: a dot at its score error and a line over its interval, in percent across."""
    rows = [
        {
            "label": wording.label(name),
            "note": "the training answers’ mean scores" if name == "mean_score" else "",
            "css": name if name in ("base", "tuned", "mean_score") else "other",
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


def arms_table(arms: Mapping[str, Any]) -> dict[str, Any]:
    """The measures as rows and the arms as columns; a measure that says nothing new is left out."""
    spoken = {name: arm for name, arm in arms.items() if "n_readable" in arm}
    lost = any(arm["n_readable"] < arm["n"] for arm in spoken.values())
    rows: list[dict[str, Any]] = []

    def row(name: str, note: str, cell: Any, *, best: str | None = None) -> None:
        cells = [cell(arm) for arm in arms.values()]
        values = [arm.get(best) for arm in arms.values()] if best else []
        known = [value for value in values if value is not None]
        least = round(min(known), 9) if known else None
        strong = [v is not None and round(v, 9) == least for v in values] or [False] * len(cells)
        rows.append({"name": name, "note": note, "cells": list(zip(cells, strong, strict=True))})

    def share(arm: Mapping[str, Any], key: str) -> tuple[str, str]:
        return wording.percent(arm.get(key)), ""

    def spread(arm: Mapping[str, Any], key: str) -> tuple[str, str]:
        return wording.points(arm.get(key)), wording.interval(arm.get(f"{key}_interval"))

    def tally(key: str) -> Any:
        return lambda arm: (str(arm[key]) if key in arm else wording.NONE, "")

    row(
        "Exact format",
        "bare JSON, every key, no mending",
        lambda arm: (
            wording.percent(arm["format_strict"]),
            wording.interval(arm.get("format_strict_interval"), share=True),
        ),
    )
    row("Readable", "a tolerant reader gets a critique", lambda arm: share(arm, "readable"))
    row(
        "Score error",
        "mean absolute, in points of 10",
        lambda arm: spread(arm, "score_mae"),
        best="score_mae",
    )
    if lost:
        row("  answers it rests on", "those that could be read", tally("n_scored"))
        row(
            "  counting the lost",
            "an unreadable answer as wrong as can be",
            lambda arm: spread(arm, "score_mae_worst_case"),
        )
    row("Overall score error", "", lambda arm: spread(arm, "overall_mae"), best="overall_mae")
    row(
        "Generosity",
        "mean signed error",
        lambda arm: (wording.points(arm.get("score_bias"), signed=True), ""),
    )
    row(
        "Ranks alike",
        "Spearman’s correlation of overall scores",
        lambda arm: spread(arm, "overall_correlation"),
    )
    row(
        "  by pairs",
        "Kendall’s tau-b of overall scores",
        lambda arm: spread(arm, "overall_kendall"),
    )
    row(
        "Spread of scores",
        "overall scores, as a part of the references’",
        lambda arm: share(arm, "overall_spread_ratio"),
    )
    row("Different sets of scores", "1 would be a template", tally("distinct_score_vectors"))
    row(
        "Different advice",
        "of all recommendations given",
        lambda arm: share(arm, "distinct_advice"),
    )
    for key, name, note in (
        ("repeated_advice", "Repeated advice", "answers with one advice in two dimensions"),
        ("foreign_script", "Another script", "answers not in the reference’s alphabet"),
        ("unfinished", "Cut off", "answers that met the token limit"),
    ):
        if any(arm[key] for arm in spoken.values()):
            row(name, note, tally(key))
    row("Seconds", "per photograph", lambda arm: (wording.seconds(arm.get("seconds_mean")), ""))
    row("  nineteen of twenty", "", lambda arm: (wording.seconds(arm.get("seconds_p95")), ""))
    if any(arm.get("first_token_seconds_p50") is not None for arm in spoken.values()):
        row(
            "  first token",
            "median",
            lambda arm: (wording.seconds(arm.get("first_token_seconds_p50")), ""),
        )
    row(
        "Tokens per second",
        "median",
        lambda arm: (wording.seconds(arm.get("tokens_per_second_p50")), ""),
    )
    row(
        "Tokens",
        "generated per photograph",
        lambda arm: (f"{arm['tokens_mean']:.0f}" if "tokens_mean" in arm else wording.NONE, ""),
    )
    return {
        "arms": [(name, wording.label(name), arm["n"]) for name, arm in arms.items()],
        "rows": rows,
    }


def limits(report: Mapping[str, Any], advisor: str) -> list[str]:
    """What these numbers can and cannot show, from the numbers themselves."""
    evidence = report["evidence"]
    arms, n = evidence["arms"], evidence["n_photographs"]
    # What the labels are worth comes first: it limits everything after it.
    said = [f"{evidence['labels']} (The audit of the labels.)"] if evidence.get("labels") else []
    said.append(
        f"The error is the distance from {possessive_scores(advisor)}. It says whether the model "
        "judges alike, not whether the judgement is right, and nothing about the prose: read the "
        "critiques above for that."
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
    if len(vectors) < 0.7 * evidence["n"]:
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

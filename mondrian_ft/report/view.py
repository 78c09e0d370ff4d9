"""What the report page shows, as plain values for its template: no markup, no styling."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from ..data.critique import Critique
from ..evaluation.metrics import Reading, dimension_key, read
from . import measures, wording
from .measures import across
from .plots import Pair

MANY = 60
"""Photographs above which the overview strip is left out: it would be a page of its own."""
BESIDE = 3
"""Arms that stand side by side on a card; of more, base and tuned do, and the rest is folded."""
FAR = 2.0
"""Points from the reference at which a score is set in bold."""


def page(report: Mapping[str, Any], photos: Mapping[str, Any]) -> dict[str, Any]:
    """Everything above the settings. ``photos`` maps ``image_path`` to what the card shows."""
    advisor = wording.advisor_name(report)
    evidence = report["evidence"]
    arms = evidence["arms"]
    cards = [
        card(index, sample, advisor, photos.get(sample["image_path"]))
        for index, sample in enumerate(report["sample_results"], start=1)
    ]
    verdict, sentence = wording.headline(report)
    return {
        "advisor": advisor,
        "verdict": verdict,
        "sentence": sentence,
        "lede": wording.lede(report),
        "failed": wording.failed(evidence),
        "others": wording.other_verdicts(evidence),
        "arms": [name for name, arm in arms.items() if wording.speaks(arm)],
        "date": report["evaluation_date"][:10],
        "errors": measures.error_chart(arms),
        "dimensions": measures.dimension_chart(arms),
        "criteria": [
            {"met": mark["met"], "words": wording.criterion(mark)}
            for mark in evidence.get("criteria", [])
        ],
        "table": measures.arms_table(arms, measures.MAIN),
        "none_sign": wording.NONE,
        "more": measures.arms_table(arms, measures.MORE),
        "constraint": measures.constraint_table(evidence),
        "pairs": pairs(report["sample_results"]),
        "repeats": report["evidence"].get("repeats"),
        "cards": cards,
        "overview": overview(cards) if 1 < len(cards) <= MANY else None,
        "sorts": sorts(cards),
        "limits": measures.limits(report, advisor),
    }


def pairs(samples: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Base's and tuned's score error of each photograph that both scored, rows of one as a mean.

    As the verdict has them; a photograph's card is that of its first row.
    """
    found: dict[str, tuple[int, list[tuple[float, float]]]] = {}
    for index, sample in enumerate(samples, start=1):
        errors = [
            sample.get(block, {}).get("score_error") for block in ("base_model", "fine_tuned_model")
        ]
        if None not in errors:
            name = sample.get("image_sha256") or sample["image_path"]
            found.setdefault(name, (index, []))[1].append((errors[0], errors[1]))
    return [
        Pair(index, fmean(base for base, _ in both), fmean(tuned for _, tuned in both))
        for index, both in found.values()
    ]


SORTS = (
    ("index", "the order of the file"),
    ("tuned", "the tuned model’s error"),
    ("change", "the change from base to tuned"),
    ("spread", "disagreement of all voices"),
)


def sorts(cards: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The orders in which the cards can be put, (key, words); none where there is nothing to it."""
    told = {key for c in cards for key, value in c["keys"].items() if value is not None}
    return [(key, words) for key, words in SORTS if key in told] if len(cards) > 1 else []


def card(index: int, sample: Mapping[str, Any], advisor: str, photo: Any) -> dict[str, Any]:
    """One photograph: its picture, every score, and what each voice said.

    ``beside`` is the part with the voices that stand side by side, ``folded`` that with the others
    or None.
    """
    reference = read(sample["reference"]["full_output"])
    first = voice("reference", advisor, sample["reference"], reference, None)
    arms: dict[str, dict[str, Any]] = {}
    for block, answer in sample.items():
        if isinstance(answer, Mapping) and "full_output" in answer and block != "reference":
            arm = wording.BLOCKS.get(block, block)
            reading = read(answer["full_output"])
            arms[arm] = voice(arm, wording.label(arm), answer, reading, reference)
    shown = list(arms)
    if len(arms) > BESIDE:
        shown = [arm for arm in ("base", "tuned") if arm in arms] or shown[:2]
    rest = [arms[arm] for arm in arms if arm not in shown]
    judged = [arms[arm] for arm in ("base", "tuned") if arm in arms] or [arms[a] for a in shown]
    return {
        "index": index,
        "image": sample["image"],
        "photo": photo,
        "alt": reference.critique.image_description
        if reference.critique
        else f"Photograph {sample['image']}",
        "beside": part([first, *(arms[arm] for arm in shown)]),
        "folded": part([first, *rest]) if rest else None,
        "errors": [(v["css"], v["label"], v["error"]) for v in judged],
        "keys": {"index": index, **disagreement(reference, arms)},
    }


def disagreement(
    reference: Reading, arms: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """What a card can be sorted by, in points of 10; an answer without scores is as far as can be.

    ``tuned`` is the tuned model's score error, ``change`` how far it is from the base's, ``spread``
    the mean over dimensions of how far the voices, the reference among them, lie apart. None where
    the arm was not asked, or the reference has no scores.
    """
    if not reference.scores:
        return {"tuned": None, "change": None, "spread": None}
    errors = {
        arm: 10.0 if arms[arm]["error"] is None else float(arms[arm]["error"])
        for arm in ("base", "tuned")
        if arm in arms
    }
    given = [reference.scores, *(v["reading"].scores for v in arms.values())]
    apart = [
        max(values) - min(values)
        for key in reference.scores
        if len(values := [scores[key] for scores in given if key in scores]) > 1
    ]
    lost = not all(v["reading"].scores for v in arms.values())
    return {
        "tuned": errors.get("tuned"),
        "change": abs(errors["base"] - errors["tuned"]) if len(errors) == 2 else None,
        "spread": 10.0 if lost or not apart else fmean(apart),
    }


def part(voices: list[dict[str, Any]]) -> dict[str, Any]:
    """Voices side by side, the reference first: scores, comments and advice by dimension."""
    seen = dict.fromkeys(key for v in voices for key in v["reading"].scores)
    names = {key: name for v in reversed(voices) for key, name in v["reading"].names.items()}
    rows = [
        score_row(names[key], [v["reading"].scores.get(key) for v in voices], voices)
        for key in seen
    ]
    overall = score_row("Overall", [v["reading"].overall for v in voices], voices)
    return {
        "voices": voices,
        "rows": [*rows, overall] if rows else [],
        "remarks": [remarks(key, names[key], voices) for key in seen],
    }


def voice(
    arm: str, name: str, answer: Mapping[str, Any], reading: Reading, reference: Reading | None
) -> dict[str, Any]:
    """One column of a card; ``lines`` are (heading, marked texts) of the critique's parts."""
    critique = reading.critique
    other = reference.critique if reference else None
    return {
        "css": arm if arm in ("reference", "base", "tuned") else "other",
        "label": name,
        "reading": reading,
        "critique": critique,
        "raw": answer["full_output"],
        "problem": reading.problem,
        "format": None if reference is None else answer.get("validation_error"),
        "valid": answer.get("format_valid"),
        "finished": answer.get("finished", True),
        "seconds": answer.get("inference_time"),
        "tokens": answer.get("tokens"),
        "error": answer.get("score_error"),
        "lines": lines(critique, other) if critique else [],
    }


def lines(critique: Critique, other: Critique | None) -> list[tuple[str, list[Any]]]:
    """The parts of a critique that are not about one dimension, set against another's."""
    parts: list[tuple[str, list[Any]]] = [
        ("", marked(critique.image_description, other.image_description if other else None))
    ]
    for heading, mine, theirs in (
        ("Strengths", critique.key_strengths, other.key_strengths if other else None),
        ("Improve", critique.priority_improvements, other.priority_improvements if other else None),
    ):
        if mine:
            parts.append((heading, chosen(mine, theirs)))
    notes = other.technical_notes if other else None
    return [*parts, ("Technical", marked(critique.technical_notes, notes))]


def chosen(mine: list[str], theirs: list[str] | None) -> list[tuple[str, bool]]:
    """A list in a row; what the other list lacks is marked, if the two share anything."""
    known = {text.casefold() for text in theirs or []}
    shared = any(text.casefold() in known for text in mine)
    pieces: list[tuple[str, bool]] = []
    for text in mine:
        pieces += [(" · ", False)] * bool(pieces)
        pieces.append((text, shared and text.casefold() not in known))
    return pieces


def remarks(key: str, name: str, voices: list[dict[str, Any]]) -> dict[str, Any]:
    """Comment and advice of every voice on one dimension, the texts set against the reference's."""
    said = []
    for v in voices:
        found = v["critique"].dimensions if v["critique"] else []
        said.append(next((d for d in found if dimension_key(d.name) == key), None))
    first = said[0]
    return {
        "name": name,
        "said": [
            None
            if d is None
            else {
                "score": wording.score(d.score),
                "comment": marked(d.comment, first.comment if first and d is not first else None),
                "advice": marked(
                    d.recommendation, first.recommendation if first and d is not first else None
                ),
            }
            for d in said
        ],
    }


def score_row(
    name: str, scores: list[float | None], voices: list[dict[str, Any]]
) -> dict[str, Any]:
    """Scores of one dimension: numbers, and bars from the reference's score to the first two arms'.

    More bars would lie on one another.
    """
    reference = scores[0]
    bars = []
    for value, v in zip(scores[1:3], voices[1:3], strict=True):
        if value is None:
            bars.append({"css": v["css"], "at": None})
            continue
        ends = (value, value if reference is None else reference)
        left = across(min(ends), 10)
        bars.append(
            {
                "css": v["css"],
                "at": across(value, 10),
                "left": left,
                "width": round(across(max(ends), 10) - left, 2),
            }
        )
    return {
        "name": name,
        "reference": None if reference is None else across(reference, 10),
        "bars": bars,
        "cells": [
            {
                "css": v["css"],
                "text": wording.score(value),
                "gap": wording.gap(value, reference) if v is not voices[0] else "",
                "far": value is not None
                and reference is not None
                and abs(value - reference) >= FAR,
            }
            for value, v in zip(scores, voices, strict=True)
        ],
    }


def marked(text: str, reference: str | None) -> list[tuple[str, bool]]:
    """``text`` in pieces, each with whether it differs from ``reference``.

    Where the two share less than half of their words everything would be marked, which tells a
    reader nothing, so then nothing is.
    """
    if reference is None:
        return [(text, False)]
    mine, theirs = (re.findall(r"\s+|\w+|[^\w\s]", part) for part in (text, reference))
    words = [[part for part in parts if part[0].isalnum()] for parts in (theirs, mine)]
    if SequenceMatcher(None, *words, autojunk=False).ratio() < 0.5:
        return [(text, False)]
    pieces: list[tuple[str, bool]] = []
    matcher = SequenceMatcher(None, theirs, mine, autojunk=False)
    for tag, _, _, start, stop in matcher.get_opcodes():
        piece, differs = "".join(mine[start:stop]), tag != "equal"
        if not piece:
            continue
        # A space between two marked words is marked with them, one beside an unmarked word is not.
        if differs and len(pieces) > 1 and pieces[-1][0].isspace() and pieces[-2][1]:
            space, before = pieces.pop()[0], pieces.pop()[0]
            piece = before + space + piece
        pieces.append((piece, differs and not piece.isspace()))
    return pieces


def overview(cards: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The contact sheet's bars: each photograph's error by arm, in percent of the largest."""
    errors = [error for c in cards for _, _, error in c["errors"] if error is not None]
    if not errors:
        return None
    top = max([*errors, 0.5])
    return {
        "frames": [
            {
                "index": c["index"],
                "keys": c["keys"],
                "photo": c["photo"],
                "title": f"{c['image']}: "
                + ", ".join(
                    f"{name} error {wording.points(error)}" for _, name, error in c["errors"]
                ),
                "bars": [
                    (css, None if error is None else max(across(error, top), 1.5))
                    for css, _, error in c["errors"]
                ],
            }
            for c in cards
        ]
    }

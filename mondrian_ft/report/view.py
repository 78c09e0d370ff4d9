"""What the report page shows, as plain values for its template: no markup, no styling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from ..data.critique import Critique
from ..evaluation.metrics import Reading, dimension_key, read
from . import measures, wording
from .measures import across

MANY = 60
"""Photographs above which the overview strip is left out: it would be a page of its own."""


def page(report: Mapping[str, Any], photos: Mapping[str, Any]) -> dict[str, Any]:
    """Everything above the settings. ``photos`` maps ``image_path`` to what the card shows."""
    advisor = wording.advisor_name(report)
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
        "arms": [name for name in report["evidence"]["arms"] if name != "mean_score"],
        "date": report["evaluation_date"][:10],
        "errors": measures.error_chart(report["evidence"]["arms"]),
        "dimensions": measures.dimension_chart(report["evidence"]["arms"]),
        "criteria": [
            {"met": mark["met"], "words": wording.criterion(mark)}
            for mark in report["evidence"].get("criteria", [])
        ],
        "table": measures.arms_table(report["evidence"]["arms"]),
        "cards": cards,
        "overview": overview(cards) if 1 < len(cards) <= MANY else None,
        "limits": measures.limits(report, advisor),
    }


def card(index: int, sample: Mapping[str, Any], advisor: str, photo: Any) -> dict[str, Any]:
    """One photograph: its picture, every score, and what each voice said."""
    reference = read(sample["reference"]["full_output"])
    voices = [voice("reference", advisor, sample["reference"], reference, None)]
    for block, answer in sample.items():
        if isinstance(answer, Mapping) and "full_output" in answer and block != "reference":
            arm = wording.BLOCKS.get(block, block)
            reading = read(answer["full_output"])
            voices.append(voice(arm, wording.label(arm), answer, reading, reference))
    seen = dict.fromkeys(key for v in voices for key in v["reading"].scores)
    names = {key: name for v in reversed(voices) for key, name in v["reading"].names.items()}
    rows = [
        score_row(names[key], [v["reading"].scores.get(key) for v in voices], voices)
        for key in seen
    ]
    overall = score_row("Overall", [v["reading"].overall for v in voices], voices)
    return {
        "index": index,
        "image": sample["image"],
        "photo": photo,
        "alt": reference.critique.image_description
        if reference.critique
        else f"Photograph {sample['image']}",
        "voices": voices,
        "rows": rows,
        "overall": overall,
        "remarks": [remarks(key, names[key], voices) for key in seen],
        "errors": [(v["css"], v["label"], v["error"]) for v in voices[1:]],
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
    """Scores of one dimension: numbers, and bars from the reference's score to each arm's."""
    reference = scores[0]
    bars = []
    for value, v in zip(scores[1:], voices[1:], strict=True):
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

"""Dimensions as a dict or as a row's columns: scored JSONL, and ``dimensional_profiles``.

``{"dimensional_analysis": {"focus_sharpness": {"score": 8, …}}, "overall_grade": "9.4"}`` is one
line of the former. A row of the latter is handed on as an object under `PROFILE`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..critique import KEYS, CritiqueError, Flaw, find_object
from .sections import NAMES, canonical, letters

PROFILE = "dimensional_profile"
"""The key under which `profile_text` hands on a row of ``dimensional_profiles``."""

_KEY = re.compile(r'"(?:dimensional_analysis|dimensional_profile)"\s*:')


def recognise(text: str) -> bool:
    """Whether a text is an object with ``dimensional_analysis`` or a row of a profile."""
    return bool(_KEY.search(text)) and '"dimensions"' not in text


def profile_text(row: Mapping[str, Any]) -> str:
    """A row of ``dimensional_profiles`` (column to value) as a text that `read` understands."""
    kept = {name: value for name, value in row.items() if _is_told(name) and value is not None}
    return json.dumps({PROFILE: kept, "overall_score": kept.get("overall_grade")}, default=str)


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """The keys that the object states, and the mends.

    Raises:
        CritiqueError: there is no such object, or it is a placeholder (every dimension 10, and an
            overall far below).
    """
    found, mends = _object(text)
    profile = found.get(PROFILE)
    if isinstance(profile, dict):
        value = _profile(profile)
        mends.append("read from a row of dimensional_profiles")
        _refuse_placeholder(value)
    else:
        value = _analysis(found)
        mends.append("read from a dict of dimensions")
    return value, mends


def _object(text: str) -> tuple[dict[str, Any], list[str]]:
    try:
        value = json.loads(text)
    except ValueError:
        return find_object(text)
    if not isinstance(value, dict):
        return find_object(text)
    return value, []


def _is_told(name: str) -> bool:
    return name.endswith(("_score", "_comment")) or name in ("overall_grade", "image_description")


def _profile(row: Mapping[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = {"dimensions": []}
    for column, score in row.items():
        name = canonical(column.removesuffix("_score")) if column.endswith("_score") else None
        if name is None:
            continue
        dimension = {"name": name, "score": score}
        comment = row.get(column.removesuffix("_score") + "_comment")
        if comment is not None:
            dimension["comment"] = comment
        value["dimensions"].append(dimension)
    if "image_description" in row:
        value["image_description"] = row["image_description"]
    if "overall_grade" in row:
        value["overall_score"] = row["overall_grade"]
    return value


def _refuse_placeholder(value: Mapping[str, Any]) -> None:
    scores = [dimension["score"] for dimension in value["dimensions"]]
    if scores and all(score == 10 for score in scores) and value.get("overall_score") != 10:
        try:
            overall = float(value.get("overall_score", "nan"))
        except (TypeError, ValueError):
            return
        if overall < 9.5:
            raise CritiqueError(
                Flaw.WRONG_SHAPE,
                f"Every score of the profile is 10 but the overall is {overall:g}: a placeholder.",
            )


def _analysis(found: Mapping[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = {key: found[key] for key in KEYS if key in found}
    if "overall_score" not in value and "overall_grade" in found:
        value["overall_score"] = found["overall_grade"]
    judged = found.get("dimensional_analysis")
    if isinstance(judged, dict):
        value["dimensions"] = [_dimension(key, entry) for key, entry in judged.items()]
    else:
        value["dimensions"] = judged
    return value


_SPELT = {"comments": "comment", "recommendations": "recommendation", "feedback": "comment"}


def _dimension(key: str, entry: Any) -> dict[str, Any]:
    # A name of no known era keeps its words.
    name = NAMES.get(letters(key)) or " ".join(key.replace("_", " ").split()).title()
    if not isinstance(entry, dict):
        return {"name": name, "score": entry}
    value: dict[str, Any] = {"name": name}
    for field, content in entry.items():
        value.setdefault(_SPELT.get(str(field), str(field)), content)
    value["name"] = name
    return value

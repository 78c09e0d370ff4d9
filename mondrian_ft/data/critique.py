"""The canonical critique: its schema, a tolerant parser for labels, a strict check for outputs.

The schema is the workbook's (facts: "The analysis"): ``image_description``, ``dimensions`` (each
``name``, ``score`` 0 to 10, ``comment``, ``recommendation``), ``overall_score`` 0 to 10,
``key_strengths``, ``priority_improvements``, ``technical_notes``. Any number of dimensions is
accepted when reading, because earlier eras had five to nine of them.

Reading is done in three small steps, so that another shape is another function beside them:
`find_object` (text to JSON object), `mend` (object to object, every repair named), `validate`
(object to `Critique`). Shapes other than JSON are read in `parsers`.

A blank text is a value; a key that is not there is missing, and stays missing: it keeps its default
so that code can go on, but `Critique.missing` names it and `render` leaves it out.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import DataError

DIMENSIONS: tuple[str, ...] = (
    "Composition",
    "Lighting",
    "Focus & Sharpness",
    "Color Harmony",
    "Depth & Perspective",
    "Visual Balance",
    "Emotional Impact",
)
"""The seven dimension names of the workbook's schema, in its order."""

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""A text that is not blank."""
Said = Annotated[str, StringConstraints(pattern=r"^")]
"""A text of valid Unicode (what a pattern makes pydantic check), blank or not."""
Score = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class Flaw(StrEnum):
    """Why a text is not a critique; each value is also a reason in the link report."""

    NO_JSON = "no_json"
    BROKEN_JSON = "broken_json"
    TWO_JSON_BLOCKS = "two_json_blocks"
    WRONG_SHAPE = "wrong_shape"
    INCOMPLETE = "incomplete"
    ANALYSIS_FAILED = "analysis_failed"
    ANALYSIS_TOO_LONG = "analysis_too_long"
    EMPTY_TEXT = "empty_text"
    SCORE_NOT_A_NUMBER = "score_not_a_number"
    SCORE_OUT_OF_RANGE = "score_out_of_range"


class CritiqueError(DataError):
    """A text that cannot be read as a critique: ``reason`` is the code, ``str()`` the sentence."""

    def __init__(self, reason: Flaw, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Dimension(BaseModel):
    """One judged quality of a photograph; ``score`` lies in 0 to 10."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Text
    score: Score
    comment: Said = ""
    recommendation: Said = ""


class Critique(BaseModel):
    """A whole analysis. Strict: no foreign keys, numbers are numbers, texts are texts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image_description: Said = ""
    dimensions: Annotated[list[Dimension], Field(min_length=1)]
    overall_score: Score
    key_strengths: list[Said] = Field(default_factory=list)
    priority_improvements: list[Said] = Field(default_factory=list)
    technical_notes: Said = ""

    def scores(self) -> dict[str, float]:
        """The score (0 to 10) of each dimension by name."""
        return {dimension.name: dimension.score for dimension in self.dimensions}

    def missing(self) -> list[str]:
        """The keys that were not there, such as ``technical_notes``, ``dimensions[2].comment``."""
        whole = all(len(d.model_fields_set) == len(DIMENSION_KEYS) for d in self.dimensions)
        if whole and len(self.model_fields_set) == len(KEYS):
            return []
        absent = [key for key in KEYS if key not in self.model_fields_set]
        return absent + [
            f"dimensions[{index}].{key}"
            for index, dimension in enumerate(self.dimensions)
            for key in DIMENSION_KEYS
            if key not in dimension.model_fields_set
        ]

    def blank(self) -> list[str]:
        """The texts that are there but hold nothing, named as in `missing`."""
        found: list[str] = []
        for key, value in self.model_dump(exclude_unset=True).items():
            if isinstance(value, str):
                found += [key] if not value.strip() else []
            elif isinstance(value, list):
                for index, entry in enumerate(value):
                    texts = entry.items() if isinstance(entry, dict) else [("", entry)]
                    for name, text in texts:
                        if isinstance(text, str) and not text.strip():
                            found.append(f"{key}[{index}]" + (f".{name}" if name else ""))
        return found


def rename_dimensions(
    critique: Critique, names: Mapping[str, str | None]
) -> tuple[Critique, list[str]]:
    """A critique with other dimension names, and which entries of ``names`` it had.

    Databases judge by five to nine dimensions (facts: "The analysis"); which of them are the same
    quality is for a person to say. Scores, the overall score included, stay as they were given.

    Args:
        names: what a dimension is called to what it shall be called; None leaves it out. Letter
            case does not matter.

    Raises:
        CritiqueError: two dimensions would bear one name, or none would be left.
    """
    wanted = {name.strip().casefold(): (name, new) for name, new in names.items()}
    if not wanted.keys() & {dimension.name.strip().casefold() for dimension in critique.dimensions}:
        return critique, []
    kept: dict[str, Dimension] = {}
    met: list[str] = []
    for dimension in critique.dimensions:
        key, new = wanted.get(dimension.name.strip().casefold(), (None, dimension.name))
        if key is not None:
            met.append(key)
        if new is None:
            continue
        if new in kept:
            raise CritiqueError(
                Flaw.WRONG_SHAPE, f"two of its dimensions would be called {new}; leave one out."
            )
        kept[new] = dimension.model_copy(update={"name": new})
    if not kept:
        raise CritiqueError(Flaw.WRONG_SHAPE, "none of its dimensions would be left.")
    return critique.model_copy(update={"dimensions": list(kept.values())}), met


KEYS = tuple(Critique.model_fields)
DIMENSION_KEYS = tuple(Dimension.model_fields)


@dataclass(frozen=True)
class Parsed:
    """A critique read from a text, and every repair that reading took, as short sentences."""

    critique: Critique
    mends: list[str] = field(default_factory=list)


def parse_analysis(text: str, *, partial: bool = False) -> Parsed:
    """Read a critique from a stored analysis or a model's raw answer, fenced or bare.

    Repairs that cannot change the meaning are made and listed in ``mends``: text around the JSON,
    an identical second block, scores written as ``"8"`` or ``"8/10"``, keys a letter or two off,
    unknown extra keys. With ``partial`` texts and lists may be missing; dimensions with their names
    and scores and the overall score may not.

    Raises:
        CritiqueError: there is no readable JSON object, there are two different ones, a key is
            missing or of a wrong type, a name is blank, or a score is not a number within 0-10.
    """
    try:
        found, mends = find_object(text)
        mended, more = mend(found)
        return Parsed(validate(mended, partial=partial), mends + more)
    except RecursionError:
        raise CritiqueError(Flaw.BROKEN_JSON, "The JSON is nested too deeply to be read.") from None


def strict_format_error(text: str, dimensions: Sequence[str] | None = None) -> str | None:
    """Say why a model's answer breaks the format, or None if it keeps it.

    Kept means: nothing but one JSON object, exactly the schema's keys and types, scores within
    0-10, no blank text, and, if ``dimensions`` is given, those names once each in any order.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        critique = validate(value)
        if blank := critique.blank():
            return f"{blank[0]} is blank."
    except CritiqueError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"The answer is not bare JSON: {_short(error)}."
    names = [dimension.name for dimension in critique.dimensions]
    if dimensions is not None and sorted(names) != sorted(dimensions):
        wanted = ", ".join(dimensions)
        return f"The dimensions are {', '.join(names)}; they should be {wanted}."
    return None


def render(critique: Critique) -> str:
    """The canonical answer: one line of JSON, keys in schema order, whole scores as integers.

    ``parse_analysis(render(c)).critique == c`` for every critique. There are no spaces between
    JSON tokens: they carry nothing, and a model would pay for each in time. A missing key stays
    missing.
    """
    return json.dumps(
        _whole(critique.model_dump(exclude_unset=True)), ensure_ascii=False, separators=(",", ":")
    )


# -- text to object ------------------------------------------------------------------------------


def find_object(text: str) -> tuple[dict[str, Any], list[str]]:
    """Find the one JSON object of a text, inside a ```` ```json ```` fence or bare.

    An object counts if it is fenced or has at least one of the schema's keys, so that a brace in
    the prose around an answer does not make the answer ambiguous.

    Raises:
        CritiqueError: no object (``no_json``), only a broken one (``broken_json``), or several
            that differ (``two_json_blocks``).
    """
    text = text.removeprefix("\ufeff")
    found: list[dict[str, Any]] = []
    outside: list[str] = []
    ignored = 0
    broken: str | None = None
    failures = 0
    position = 0
    while (start := text.find("{", position)) >= 0:
        outside.append(text[position:start])
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            # Every brace further in would fail in the same way, after the same long descent.
            broken = broken or "it is nested too deeply"
            break
        except ValueError as error:
            broken = broken or _short(error)
            failures += 1
            if failures > _MOST_FAILURES:
                break
            outside.append("{")
            position = start + 1
            continue
        fenced = _FENCE_BEFORE.search(text, max(0, start - 40), start)
        if fenced or any(key in value for key in KEYS):
            found.append(value)
        else:
            ignored += 1
        position = end
    outside.append(text[position:])
    if any(value != found[0] for value in found[1:]):
        raise CritiqueError(
            Flaw.TWO_JSON_BLOCKS,
            f"The analysis holds {len(found)} JSON blocks that differ; keep the one that is meant.",
        )
    if not found:
        if broken:
            raise CritiqueError(
                Flaw.BROKEN_JSON, f"The analysis holds JSON that does not parse: {broken}."
            )
        if ignored:
            keys = ", ".join(KEYS)
            raise CritiqueError(
                Flaw.WRONG_SHAPE, f"The JSON of the analysis has none of the keys {keys}."
            )
        start_of_it = " ".join(text.split())[:60]
        seen = f'; it begins "{start_of_it}"' if start_of_it else "; it is empty"
        raise CritiqueError(Flaw.NO_JSON, f"The analysis holds no JSON object{seen}.")
    mends = []
    if len(found) > 1:
        mends.append(f"the same JSON block stands {len(found)} times; one was read")
    around = _FENCE.sub("", "".join(outside)).strip()
    if around or ignored:
        mends.append(f"text around the JSON was ignored ({len(around)} characters)")
    return found[0], mends


_MOST_FAILURES = 2000
"""Braces that begin nothing before a text is given up: each costs a look at the whole of it."""

_FENCE = re.compile(r"```[ \t]*\w*")
_FENCE_BEFORE = re.compile(r"```[ \t]*(?:json)?\s*\Z", re.IGNORECASE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; plain ``json`` would keep the last in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice[:40]}" appears twice')
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# NaN is let through here so that validation can name the score it stands for.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


# -- object to object ----------------------------------------------------------------------------


def mend(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Repair what can be repaired without guessing; returns a new object and what was done."""
    mends: list[str] = []
    value = _known_keys(found, KEYS, "", mends)
    if "overall_score" in value:
        value["overall_score"] = _score(value["overall_score"], "overall_score", mends)
    dimensions = value.get("dimensions")
    if isinstance(dimensions, list):
        value["dimensions"] = [
            _mend_dimension(dimension, f"dimensions[{index}]", mends)
            for index, dimension in enumerate(dimensions)
        ]
    return value, mends


def _mend_dimension(dimension: Any, where: str, mends: list[str]) -> Any:
    if not isinstance(dimension, dict):
        return dimension
    value = _known_keys(dimension, DIMENSION_KEYS, f"{where}.", mends)
    if "score" in value:
        value["score"] = _score(value["score"], f"{where}.score", mends)
    return value


def _known_keys(
    found: dict[str, Any], keys: Sequence[str], where: str, mends: list[str]
) -> dict[str, Any]:
    if all(key in keys for key in found):
        return dict(found)
    found = _respelt(found, keys, where, mends)
    # Only beside all known keys is a foreign one surplus; otherwise it may stand for one of them.
    extra = [key for key in found if key not in keys]
    if not extra or any(key not in found for key in keys):
        return dict(found)
    mends.extend(f"the unknown key {where}{key} was dropped" for key in extra)
    return {key: found[key] for key in keys}


def _respelt(
    found: dict[str, Any], keys: Sequence[str], where: str, mends: list[str]
) -> dict[str, Any]:
    """Near misses such as ``dimsions`` and ``scroe`` under their right names.

    Only where there is no doubt: the right key is absent, and no second key is as near to it.
    """
    foreign = [key for key in found if key not in keys]
    meant: dict[str, str] = {}
    for key in keys:
        if key not in found:
            near = [word for word in foreign if difflib.get_close_matches(word, [key], 1, 0.8)]
            if len(near) == 1 and near[0] not in meant:
                meant[near[0]] = key
    mends.extend(f'the key {where}"{word}" was read as {key}' for word, key in meant.items())
    return {meant.get(key, key): value for key, value in found.items()}


_SCORE = re.compile(r"\s*([+-]?\d{1,6}(?:\.\d{1,12})?)\s*(?:/\s*10(?:\.0)?)?\s*")


def _score(value: Any, where: str, mends: list[str]) -> Any:
    # Letter grades ("A-") are left as they are, to be refused: no table says what they stand for.
    if not isinstance(value, str) or not (match := _SCORE.fullmatch(value)):
        return value
    mends.append(f'{where} "{value}" was read as {match[1]}')
    return float(match[1])


# -- object to critique --------------------------------------------------------------------------


def validate(value: Any, *, partial: bool = False) -> Critique:
    """Check an object against the schema; ``partial`` allows texts and lists to be missing.

    Raises:
        CritiqueError: naming the first offending key, its value, and how many more there are.
    """
    try:
        critique = Critique.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        flaw, sentence = _explain(dict(problems[0]))
        more = f" (There are {len(problems) - 1} more problems.)" if len(problems) > 2 else ""
        more = " (There is one more problem.)" if len(problems) == 2 else more
        raise CritiqueError(flaw, sentence + more) from None
    absent = critique.missing()
    if absent and not partial:
        more = f" ({len(absent)} keys are.)" if len(absent) > 1 else ""
        raise CritiqueError(Flaw.INCOMPLETE, f"The key {absent[0]} is missing.{more}")
    names = [dimension.name for dimension in critique.dimensions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CritiqueError(Flaw.WRONG_SHAPE, f'The dimension "{twice}" is judged twice.')
    return critique


def _explain(problem: dict[str, Any]) -> tuple[Flaw, str]:
    """Turn one pydantic error into a flaw and a sentence."""
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"])
    where = where.lstrip(".") or "The answer"
    kind, given = problem["type"], problem["input"]
    shown = _short(repr(given))
    is_score = where.endswith("score")
    if kind == "missing":
        flaw = Flaw.INCOMPLETE if where == "overall_score" else Flaw.WRONG_SHAPE
        return flaw, f"The key {where} is missing."
    if kind == "extra_forbidden":
        return Flaw.WRONG_SHAPE, f"The key {where} is not part of the schema."
    if kind == "string_pattern_mismatch":
        return Flaw.EMPTY_TEXT, f"{where} is blank."
    if is_score and kind in ("greater_than_equal", "less_than_equal"):
        return Flaw.SCORE_OUT_OF_RANGE, f"{where} is {shown}; a score lies within 0 and 10."
    if is_score and isinstance(given, float) and math.isinf(given):
        return Flaw.SCORE_OUT_OF_RANGE, f"{where} is {shown}; a score lies within 0 and 10."
    if is_score:
        return Flaw.SCORE_NOT_A_NUMBER, f"{where} is {shown}, which is not a number."
    wanted = _WANTED.get(kind, problem["msg"].lower())
    return Flaw.WRONG_SHAPE, f"{where} is {shown}; it should be {wanted}."


_WANTED = {
    "string_type": "a text",
    "string_unicode": "valid Unicode text",
    "list_type": "a list",
    "model_type": "an object",
    "too_short": "a list with at least one entry",
}


def _short(value: object, limit: int = 80) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _whole(value: Any) -> Any:
    """Write 8.0 as 8: references and answers say ``8``, and one spelling means one target."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""One small parser per shape in which analyses are stored; each gives the canonical critique.

A parser turns a text into an object with the schema's keys as far as the text has them, and a list
of what it had to mend. What comes after is the same for all: `critique.mend`, `critique.validate`.
Nothing is invented: what the text does not say is a missing key.

JSON is repaired only where the meaning cannot change. Answers that were cut off are refused: of
the real ones none is whole after a general repair, and the last text of most ends in a loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..critique import CritiqueError, Flaw, Parsed, mend, parse_analysis, validate
from . import dimensional, html, markdown

MAX_CHARACTERS = 1_000_000
"""The longest text that is read as an analysis; real ones have 2,000 to 40,000 characters."""


@dataclass(frozen=True)
class Reading:
    """A critique, and the name of the parser that read it: a key of `SHAPES`, or ``json``."""

    parsed: Parsed
    parser: str


Found = tuple[dict[str, Any], list[str]]

SHAPES: dict[str, tuple[Callable[[str], bool], Callable[[str], Found]]] = {
    "html": (html.recognise, html.read),
    "dimensional": (dimensional.recognise, dimensional.read),
    "markdown": (markdown.recognise, markdown.read),
}
"""Parsers beside JSON: whether a text has the shape, and the object and mends read from it."""


def read_analysis(text: str, *, partial: bool = False) -> Reading:
    """Read an analysis of any known shape.

    Args:
        text: the stored text; JSON, HTML cards, Markdown, or a dict of dimensions.
        partial: whether texts and lists may be missing (see `critique.parse_analysis`).

    Raises:
        CritiqueError: the text says that the analysis failed, or it cannot be read; no other error
            is raised, whatever the text.
    """
    if len(text) > MAX_CHARACTERS:
        raise CritiqueError(
            Flaw.ANALYSIS_TOO_LONG,
            f"The analysis is longer than {MAX_CHARACTERS:,} characters, so it is no critique.",
        )
    if said := failure(text):
        raise CritiqueError(Flaw.ANALYSIS_FAILED, f'The analysis is an error: "{said}".')
    for name, (recognise, read) in SHAPES.items():
        if recognise(text):
            try:
                found, mends = read(text)
                mended, more = mend(found)
                return Reading(Parsed(validate(mended, partial=partial), mends + more), name)
            except RecursionError:
                sentence = "The analysis is nested too deeply to be read."
                raise CritiqueError(Flaw.WRONG_SHAPE, sentence) from None
    return Reading(parse_analysis(text, partial=partial), "json")


_FAILURE = re.compile(
    r"failed to parse|cannot connect to|could not connect|connection (?:refused|error)"
    r"|internal server error|service unavailable|bad gateway|gateway time-?out"
    r"|httpconnectionpool|traceback \(most recent call last\)|read timed out"
    r"|\b(?:http|error|status)[ :/]*[45]\d\d\b|analysis failed",
    re.IGNORECASE,
)
_TAGS = re.compile(r"<(?:style|script|title)\b[^>]{0,200}>[^<]{0,2000}|<[^<>]{0,2000}>", re.I)


def failure(text: str) -> str | None:
    """The words with which a short text says that there is no analysis, or None.

    Error pages and messages are short and hold no score; a critique may speak of a failure.
    """
    if len(text) > 20_000 or "{" in text or re.search(r"\d\s*/\s*10\b", text):
        return None
    match = _FAILURE.search(text)
    plain = " ".join(_TAGS.sub(" ", text).split())
    return (plain or " ".join(text.split()))[:80] if match and len(plain) < 2000 else None

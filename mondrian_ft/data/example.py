"""The filled example inside a prompt: finding its scores, and taking them out.

A system prompt that shows an answer with scores in it teaches those very scores (facts: 95 of 145
analyses repeat the example's vector). Two shapes are known: JSON with ``"score": 8``, and HTML
cards with ``(8/10)``. A placeholder such as ``"score": 0-10`` is no example.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .critique import Critique

PLACEHOLDER = "<0-10>"
KNOWN_VECTOR = (8.0, 7.0, 9.0, 6.0, 7.0, 8.0, 7.0)
"""The scores of the service's own example, in the schema's order (facts: "Prompts")."""
KNOWN_OVERALL = 7.4


@dataclass(frozen=True)
class Example:
    """The scores of a prompt's filled example, in its order.

    Attributes:
        names: the dimensions' names, as many as ``scores``; empty if they could not all be read.
        scores: 0 to 10 each.
        overall: the stated overall score, if there is one.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    overall: float | None = None


_NUMBER = r"(?P<number>\d{1,2}(?:\.\d+)?)"
# Not followed by what makes it a range or a type: 0-10, 0–10, 0 to 10, 8..10.
_END = r"(?![\d.]*\s*(?:[-–—]|\.\.|to\b|or\b|\|))(?!\d)"
_JSON_SCORE = re.compile(
    r'(?P<head>"(?P<key>score|overall_score|overall_grade)"\s*:\s*"?)' + _NUMBER + _END
)
_CARD_SCORE = re.compile(r"(?P<head>\()" + _NUMBER + r"(?=\s*/\s*10\))")
_NAME = re.compile(r'"name"\s*:\s*"([^"\n]{1,80})"')
_HEADING = re.compile(r"<h3[^>]*>\s*([^<>(]{1,80}?)\s*(?:<|\()")


def filled_example(prompt: str) -> Example | None:
    """The example's scores, or None where the prompt holds no number as a score.

    Zeros throughout are a blank form and no example.
    """
    found = list(_JSON_SCORE.finditer(prompt))
    scores = [m for m in found if m["key"] == "score"]
    overall = [m for m in found if m["key"] != "score"]
    names = _names_before(prompt, scores, _NAME)
    if not scores:
        scores = list(_CARD_SCORE.finditer(prompt))
        names = _names_before(prompt, scores, _HEADING)
    values = tuple(float(m["number"]) for m in scores)
    whole = float(overall[0]["number"]) if overall else None
    if not any(values) and not whole:
        return None
    return Example(names, values, whole)


def repeats_example(critique: Critique, example: Example | None) -> bool:
    """Whether a critique's scores are an example's: in order, or by name where both have names."""
    return example_share(critique, example) == 1


def example_share(critique: Critique, example: Example | None) -> float:
    """The share (0-1) of a critique's scores that an example has; 0 with nothing to compare.

    Compared in order where there are as many, by name where five or more are the same, and with
    the service's own example in any case: labels made with it outlive the prompt that held it.
    """
    scores = tuple(dimension.score for dimension in critique.dimensions)
    ways = []
    if 5 <= len(scores) <= len(KNOWN_VECTOR):
        ways.append([*zip(scores, KNOWN_VECTOR, strict=False)])
    if example is not None and len(example.scores) >= 3:
        if len(scores) == len(example.scores):
            ways.append([*zip(scores, example.scores, strict=True)])
        given = dict(zip(map(_plain, example.names), example.scores, strict=False))
        own = {_plain(name): score for name, score in critique.scores().items()}
        common = given.keys() & own.keys()
        if len(common) >= 5:
            ways.append([(own[name], given[name]) for name in common])
    return max((fmean(mine == theirs for mine, theirs in way) for way in ways), default=0.0)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def strip_example(prompt: str) -> str:
    """The prompt with the example's scores replaced by `PLACEHOLDER`; its words stay.

    A prompt without a filled example comes back unchanged.
    """
    if filled_example(prompt) is None:
        return prompt
    return _CARD_SCORE.sub(rf"\g<head>{PLACEHOLDER}", _JSON_SCORE.sub(_blank, prompt))


def _blank(match: re.Match[str]) -> str:
    return f"{match['head']}{PLACEHOLDER}"


def _names_before(
    prompt: str, scores: Sequence[re.Match[str]], pattern: re.Pattern[str]
) -> tuple[str, ...]:
    """The last name before each score; empty unless every score has one of its own."""
    names, start = [], 0
    for match in scores:
        seen = pattern.findall(prompt, start, match.start())
        if not seen:
            return ()
        names.append(seen[-1])
        start = match.end()
    return tuple(names)

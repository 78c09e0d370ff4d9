"""What a detector returns, and the bounds that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...data.rows import Row

DISQUALIFYING = (
    "recites",
    "one_critique",
    "template_echo",
    "constant_scores",
    "ignores_picture",
    "other_language",
    "loops",
    "not_better_than_mean",
)
"""Detectors that forbid the verdict ``better`` when they fire."""
SOME = 0.1
"""Share of answers (0-1) with a sign of failure that makes a detector fire; one answer at least."""
MORE = 0.2
"""How much larger than the references' a share of answers (0-1) must be to be a habit learnt."""


@dataclass(frozen=True)
class Detection:
    """What one detector saw.

    Attributes:
        name: which.
        fired: whether ``value`` is on the wrong side of ``threshold``.
        value: what was measured, its unit in the detector's docstring; None if it could not be.
        threshold: what it was held against.
        rows: job ids of the answers concerned, if it is about single answers.
        sentence: what it means, with its numbers.
        disqualifies: whether the verdict cannot be ``better`` when it fired.
    """

    name: str
    fired: bool
    value: float | None
    threshold: float | None
    rows: tuple[str, ...]
    sentence: str
    disqualifies: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self) | {"rows": list(self.rows)}


def result(
    name: str,
    fired: bool,
    value: float | None,
    threshold: float | None,
    rows: Sequence[str],
    sentence: str,
) -> Detection:
    return Detection(name, fired, value, threshold, tuple(rows), sentence, name in DISQUALIFYING)


def of_share(name: str, rows: Sequence[Row], found: Sequence[str], what: str) -> Detection:
    share = len(found) / len(rows)
    told = f"{len(found)} of {len(rows)}" if found else "None of the"
    return result(name, share >= SOME, share, SOME, found, f"{told} answers {what}.")

"""Ways in which an adapter can look good and be useless, each with a detector of its own.

Every detector is a pure function of rows, answers and readings in row order and returns one
`Detection`, fired or not. What is compared is always the adapter with something that has the same
stock phrases and habits: the references, the base, or the adapter's own answers to other
photographs; never a text with an absolute bound, since advisors repeat themselves too.

Signs of failure in a text alone (another language, loops, thinking aloud) are read as the audit of
the labels reads them, by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...data.rows import Row
from .. import metrics
from ..metrics import Reading
from ..outputs import Output
from .detection import DISQUALIFYING, Detection
from .scores import constant_scores, ignores_picture, not_better_than_mean
from .words import (
    loops,
    one_critique,
    other_language,
    recites,
    repeated_advice,
    template_echo,
    thinking,
    truncated,
)

__all__ = [
    "DISQUALIFYING",
    "Detection",
    "constant_scores",
    "detect",
    "ignores_picture",
    "loops",
    "not_better_than_mean",
    "one_critique",
    "other_language",
    "recites",
    "repeated_advice",
    "template_echo",
    "thinking",
    "truncated",
]


def detect(
    *,
    rows: Sequence[Row],
    outputs: Sequence[Output],
    readings: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
    train_rows: Sequence[Row],
    base: Sequence[Output] = (),
    shuffled: Sequence[Reading] = (),
) -> list[Detection]:
    """Every detector's result for one arm, in a fixed order.

    ``base`` are the base's answers and ``shuffled`` the readings of the arm's answers to other
    photographs; either may be empty, and what needs them then knows less or nothing.
    """
    answers = [output.text for output in outputs]
    taught = [metrics.read(row.response) for row in train_rows]
    return [
        recites(rows, answers, train_rows, [output.text for output in base]),
        one_critique(rows, answers),
        template_echo(rows, answers, readings),
        constant_scores(rows, readings, references),
        ignores_picture(readings, shuffled, references, photographs),
        other_language(rows, answers),
        loops(rows, answers),
        truncated(rows, outputs),
        thinking(rows, answers),
        repeated_advice(rows, readings, references),
        not_better_than_mean(readings, taught, references, photographs),
    ]

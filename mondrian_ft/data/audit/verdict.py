"""What the labels are worth: one verdict, in sentences that need no statistics to be read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .findings import some

FEW = 20
"""Below this many photographs, one in five held out is at most four: anecdotes, not evidence."""
SPREAD = 1.0
"""Assumed spread, in points of 10, of the difference between two models' errors on one photograph.
"""


@dataclass(frozen=True)
class Verdict:
    """``code``: ``cannot_teach_scoring``, ``too_few``, ``limited`` or ``sound``.

    Attributes:
        sentence: the verdict in one sentence.
        paragraph: the sentence, where it comes from, and what the data can and cannot show.
        rows, photographs, independent: how many there are; copies of a picture count once in
            ``independent``.
        informative: independent photographs with at least one informative label.
        informative_rows: rows whose scores may say something about their photograph.
    """

    code: str
    sentence: str
    paragraph: str
    rows: int
    photographs: int
    independent: int
    informative: int
    informative_rows: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def judge(
    *, rows: int, photographs: int, independent: int, informative: int, informative_rows: int
) -> Verdict:
    """The verdict on so many rows and photographs; see `Verdict` for the counts."""
    pictures = some(informative, "independent photograph")
    why = (
        f"The data are {some(rows, 'row')} on {some(photographs, 'photograph')}, of which "
        f"{independent} {'is' if independent == 1 else 'are'} independent once copies are counted "
        "as one. Scores that are neither the prompt's example nor repeated from one photograph to "
        f"the next stand in {some(informative_rows, 'row')}, on {pictures}."
    )
    if informative < 2:
        code = "cannot_teach_scoring"
        sentence = (
            "Training on these labels cannot teach scoring: no two photographs have scores that "
            "say anything about the photographs themselves."
        )
        what = (
            "A model trained on them can learn the format and the tone, and will repeat one set "
            "of scores whatever it is shown. A low loss or a small score error on such labels "
            "would be a sign of that, not of judgement. Score the photographs by hand, one by one."
        )
    else:
        held = max(1, round(informative * 0.2))
        code = "too_few" if informative < FEW else "limited" if informative < 5 * FEW else "sound"
        sentence = {
            "too_few": f"There are informative labels on only {pictures}: enough to try the "
            "machinery and to learn the format, too few to show that scoring was learnt.",
            "limited": f"There are informative labels on {pictures}: enough to show a large "
            "improvement in scoring, too few for a small one.",
            "sound": f"There are informative labels on {pictures}: enough to teach scoring and to "
            "measure whether it was learnt.",
        }[code]
        what = (
            f"A fifth of them held out is {some(held, 'photograph')}; if the errors of two models "
            f"differ by about a point from one photograph to the next, only an improvement of "
            f"{smallest_shown(held):.1f} points of 10 or more can be told from chance on them. "
            "Whether the scores are right, no count of rows can say."
        )
    paragraph = f"{sentence} {why} {what}"
    return Verdict(
        code, sentence, paragraph, rows, photographs, independent, informative, informative_rows
    )


def smallest_shown(photographs: int) -> float:
    """The smallest mean improvement that a paired comparison on so many photographs would show.

    In points of 10, with a chance of 80 % to see it and of 5 % to see one that is not there
    (normal approximation: 2.8 standard errors).
    """
    return 2.8 * SPREAD / math.sqrt(photographs)

"""Detectors of scores that were not judged: constant, blind to the picture, a mean's at best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from ...data.rows import Row
from .. import metrics, stats
from ..metrics import Reading
from .detection import Detection, result

FLAT = 0.2
"""Spread of the scores, as a part of the references', below which they count as constant."""


def constant_scores(
    rows: Sequence[Row], readings: Sequence[Reading], references: Sequence[Reading]
) -> Detection:
    """Scores that are the same whatever the photograph.

    ``value`` is the spread of the answers' scores over that of the references' (standard
    deviations added up over the dimensions, 0 or more), ``threshold`` 0.2. Unknown for fewer than
    three scored answers or references that never vary themselves.
    """
    pairs = _score_pairs(readings, references)
    given, truth = (
        sum(_spread([pair[side] for pair in found]) for found in pairs.values()) for side in (0, 1)
    )
    vectors = metrics.distinct_score_vectors(readings)
    scored = sum(bool(r.scores) for r in readings)
    ratio = given / truth if truth and scored > 2 else None
    fired = ratio is not None and ratio < FLAT
    return result(
        "constant_scores",
        fired,
        ratio,
        FLAT,
        [row.job_id for row, r in zip(rows, readings, strict=True) if r.scores] if fired else (),
        f"The scores hardly depend on the photograph: {vectors} different sets of scores in "
        f"{scored} answers, with {ratio:.0%} of the references’ spread."
        if fired
        else "The scores vary from photograph to photograph.",
    )


def ignores_picture(
    readings: Sequence[Reading],
    shuffled: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> Detection:
    """Scores that are no further from the reference when another photograph is shown.

    ``value`` is the sign-flip p-value (0-1), by photograph, of the score error being larger with
    another photograph than with the right one, 1 where it is not larger at all; it fires above
    ``threshold``, 0.05. Where no scores can be compared the words of the image descriptions stand
    in for them. Unknown for fewer than six photographs, unless two answers or more are all the
    same with another photograph in both scores and description. The sentence also says how many
    descriptions stay the same.
    """
    name = "ignores_picture"
    if not shuffled:
        return result(name, False, None, None, (), "No answers to other photographs were given.")
    costs: list[float | None] = []
    words: list[float | None] = []
    same = told = 0
    for mine, other, reference in zip(readings, shuffled, references, strict=True):
        own = metrics.score_error(mine.scores, reference.scores)
        wrong = metrics.score_error(other.scores, reference.scores)
        costs.append(None if own is None or wrong is None else wrong - own)
        near = far = None
        if mine.critique and other.critique:
            told += 1
            same += mine.critique.image_description == other.critique.image_description
            if reference.critique:
                near = metrics.description_overlap(mine.critique, reference.critique)
                far = metrics.description_overlap(other.critique, reference.critique)
        words.append(None if near is None or far is None else near - far)
    scored = any(cost is not None for cost in costs)
    gains = list(metrics.by_photograph(costs if scored else words, photographs).values())
    frozen = [
        mine.scores == other.scores
        and (mine.critique and mine.critique.image_description)
        == (other.critique and other.critique.image_description)
        for mine, other in zip(readings, shuffled, strict=True)
        if mine.readable or other.readable
    ]
    p = None
    if len(gains) >= stats.SMALLEST_SAMPLE:
        p = stats.sign_flip(gains) if fmean(gains) > 0 else 1.0
    elif len(frozen) >= 2 and all(frozen):
        p = 1.0
    fired = p is not None and p > 1 - stats.LEVEL
    measure = "score error is" if scored else "descriptions are"
    gain = fmean(gains) if gains else 0.0
    extent = f" ({gain:+.2f} points)".replace("-", "−") if scored else ""
    return result(
        name,
        fired,
        p,
        round(1 - stats.LEVEL, 9),
        (),
        f"There is no sign that the scores come from the picture: shown another photograph, the "
        f"{measure} not clearly worse{extent}, and {same} of {told} descriptions are the same."
        if fired
        else "Shown another photograph, the answers are clearly worse."
        if p is not None
        else "There are too few photographs to tell whether the picture matters.",
    )


def not_better_than_mean(
    readings: Sequence[Reading],
    taught: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> Detection:
    """Scores further from the references than the training critiques' mean scores are.

    ``value`` is by how many points (0-10, by photograph) the scores are nearer than those means;
    it fires at ``threshold`` 0 or below. Unknown without scores to compare. To be nearer than the
    base and not nearer than a constant is to have learnt a level, not to judge photographs.
    """
    mean = metrics.mean_scores(r.scores for r in taught if r.scores)
    gains = []
    for reading, reference in zip(readings, references, strict=True):
        constant = metrics.score_error(mean, reference.scores)
        own = metrics.score_error(reading.scores, reference.scores)
        gains.append(None if constant is None or own is None else constant - own)
    found = list(metrics.by_photograph(gains, photographs).values())
    value = fmean(found) if found else None
    return result(
        "not_better_than_mean",
        value is not None and value <= 0,
        value,
        0.0,
        (),
        "The scores are no nearer to the references than a constant guess, the training critiques’ "
        f"mean scores ({abs(value):.2f} points further)."
        if value is not None and value <= 0
        else "The scores are nearer to the references than a constant guess."
        if value is not None
        else "No scores could be held against a constant guess.",
    )


def _score_pairs(
    readings: Sequence[Reading], references: Sequence[Reading]
) -> dict[str, list[tuple[float, float]]]:
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for reading, reference in zip(readings, references, strict=True):
        for key in reading.scores.keys() & reference.scores.keys():
            pairs[key].append((reading.scores[key], reference.scores[key]))
    return pairs


def _spread(values: Sequence[float]) -> float:
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) ** 0.5

"""Ways in which an adapter can look good and be useless, each with a detector of its own.

Every detector is a pure function of rows, answers and readings in row order and returns one
`Detection`, fired or not. What is compared is always the adapter with something that has the same
stock phrases and habits: the references, the base, or the adapter's own answers to other
photographs; never a text with an absolute bound, since advisors repeat themselves too.

Signs of failure in a text alone (another language, loops, thinking aloud) are read as the audit of
the labels reads them, by the same functions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..data.audit.language import is_english
from ..data.audit.texts import LOOP, longest_loop, repeats_advice, texts, thinks_aloud
from ..data.rows import Row
from . import metrics, stats
from .metrics import Reading
from .outputs import Output

DISQUALIFYING = (
    "recites",
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
FLAT = 0.2
"""Spread of the scores, as a part of the references', below which they count as constant."""
GRAM = 5
"""Words in a phrase that is compared; long enough for a stock phrase to be a few of them."""


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
        constant_scores(rows, readings, references),
        ignores_picture(readings, shuffled, references, photographs),
        other_language(rows, answers),
        loops(rows, answers),
        truncated(rows, outputs),
        thinking(rows, answers),
        repeated_advice(rows, readings, references),
        not_better_than_mean(readings, taught, references, photographs),
    ]


def recites(
    rows: Sequence[Row],
    answers: Sequence[str],
    train_rows: Sequence[Row],
    base: Sequence[str] = (),
) -> Detection:
    """Answers that are a training critique of another photograph, nearly word for word.

    A text's likeness to the training critiques is the largest share (0-1) of its phrases of five
    words that one of them has. The references of an advisor with stock phrases are alike in the
    same way, so an answer counts as recited only where it is more than halfway from what nine of
    ten references reach to a copy. ``value`` is the share of such answers; ``threshold`` is 0.2
    above the share of references, or of ``base`` answers if larger, that reach it as well. Fewer
    than two recited answers never fire. Scores and the names of dimensions are no part of it.
    """
    own = [(row.image_sha256 or str(row.image_path)) for row in rows]
    library: dict[tuple[str, ...], set[int]] = defaultdict(set)
    sources = [(row.image_sha256 or str(row.image_path)) for row in train_rows]
    for index, row in enumerate(train_rows):
        for gram in _grams(row.response):
            library[gram].add(index)

    def nearest(text: str, photograph: str) -> float:
        grams = _grams(text)
        shared = Counter(
            index
            for gram in grams
            for index in library.get(gram, ())
            if sources[index] != photograph
        )
        return max(shared.values(), default=0) / len(grams) if grams else 0.0

    if not train_rows:
        return _found("recites", False, None, None, (), "There are no training critiques to copy.")
    usual = [nearest(row.response, photo) for row, photo in zip(rows, own, strict=True)]
    line = (1 + (metrics.percentile(usual, 90) or 0.0)) / 2
    near = [nearest(text, photo) for text, photo in zip(answers, own, strict=True)]
    copied = [row.job_id for row, value in zip(rows, near, strict=True) if value >= line]
    share = len(copied) / len(rows)
    of_base = [nearest(text, photo) for text, photo in zip(base, own, strict=False)]
    known = max(
        sum(value >= line for value in values) / len(values) if values else 0.0
        for values in (usual, of_base)
    )
    fired = share > known + MORE and len(copied) >= 2
    return _found(
        "recites",
        fired,
        share,
        known + MORE,
        copied,
        f"{len(copied)} of {len(rows)} answers repeat a training critique of another photograph "
        f"nearly word for word; {known:.0%} of the references do."
        if fired
        else "The answers are no copies of training critiques.",
    )


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
    return _found(
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
        return _found(name, False, None, None, (), "No answers to other photographs were given.")
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
    return _found(
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


def other_language(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers that are not in English where the reference is; ``data.audit.language`` tells.

    ``value`` is their share (0-1), ``threshold`` 0.1.
    """
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if is_english(_prose(row.response)) and not is_english(_prose(text))
    ]
    return _share("other_language", rows, found, "are not in the references’ language")


def loops(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers in which a phrase follows on itself eight times or more; value as a share (0-1)."""
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if longest_loop(text) >= LOOP > longest_loop(row.response)
    ]
    return _share("loops", rows, found, "repeat a word or phrase without end")


def truncated(rows: Sequence[Row], outputs: Sequence[Output]) -> Detection:
    """Answers that the token limit cut; value as a share (0-1)."""
    found = [row.job_id for row, output in zip(rows, outputs, strict=True) if not output.finished]
    return _share("truncated", rows, found, "were cut by the token limit")


def thinking(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers that think aloud where the reference does not; value as a share (0-1)."""
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if thinks_aloud(text) and not thinks_aloud(row.response)
    ]
    return _share("thinking", rows, found, "have thinking text in them")


def repeated_advice(
    rows: Sequence[Row], readings: Sequence[Reading], references: Sequence[Reading]
) -> Detection:
    """Answers with one recommendation under several dimensions.

    ``value`` is their share (0-1), ``threshold`` 0.2 above the references' share. One answer alone
    never fires.
    """
    found = [
        row.job_id
        for row, reading in zip(rows, readings, strict=True)
        if reading.critique and repeats_advice(reading.critique)
    ]
    known = sum(bool(r.critique and repeats_advice(r.critique)) for r in references) / len(rows)
    share = len(found) / len(rows)
    fired = share > known + MORE and len(found) > 1
    return _found(
        "repeated_advice",
        fired,
        share,
        known + MORE,
        found,
        f"{len(found)} of {len(rows)} answers give one advice in several dimensions; {known:.0%} "
        "of the references do."
        if fired
        else "The advice differs from dimension to dimension as it does in the references.",
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
    return _found(
        "not_better_than_mean",
        value is not None and value <= 0,
        value,
        0.0,
        (),
        f"The scores are {-value:.2f} points further from the references than the training "
        "critiques’ mean scores are."
        if value is not None and value <= 0
        else "The scores are nearer to the references than a constant guess."
        if value is not None
        else "No scores could be held against a constant guess.",
    )


def _found(
    name: str,
    fired: bool,
    value: float | None,
    threshold: float | None,
    rows: Sequence[str],
    sentence: str,
) -> Detection:
    return Detection(name, fired, value, threshold, tuple(rows), sentence, name in DISQUALIFYING)


def _share(name: str, rows: Sequence[Row], found: Sequence[str], what: str) -> Detection:
    share = len(found) / len(rows)
    told = f"{len(found)} of {len(rows)}" if found else "None of the"
    return _found(name, share >= SOME, share, SOME, found, f"{told} answers {what}.")


def _prose(text: str) -> str:
    """The texts of a critique without keys, names and scores; the whole text if unreadable."""
    critique = metrics.read(text).critique
    return "\n".join(texts(critique)) if critique else text


def _grams(text: str) -> set[tuple[str, ...]]:
    """Phrases of five words, none of which crosses from one text of the critique into the next.

    Crossing would count the order of the schema as likeness. A text of fewer words is one phrase.
    """
    found: set[tuple[str, ...]] = set()
    for part in _prose(text).split("\n"):
        words = re.findall(r"\w+", part.casefold())
        for start in range(max(len(words) - GRAM, 0) + 1):
            found.add(tuple(words[start : start + GRAM]))
    return found - {()}


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

"""What is measured of an answer: can it be read, how far are its scores, does it say anything.

All functions are pure. Scores are on the analyses' scale of 0-10, shares within 0-1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from ..data.critique import Critique, CritiqueError, parse_analysis, strict_format_error

LOWEST, HIGHEST = 0.0, 10.0


@dataclass(frozen=True)
class Reading:
    """What could be read from one answer.

    ``critique`` is None and ``problem`` says why when the answer cannot be read even leniently;
    ``mends`` lists what the lenient parser had to put right; ``strict_error`` is None for an answer
    that needed none of it: bare JSON, exact keys and types. ``scores`` maps ``dimension_key`` to
    0-10, ``names`` the same keys to the names as written.
    """

    critique: Critique | None
    problem: str | None
    strict_error: str | None
    mends: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    overall: float | None = None

    @property
    def readable(self) -> bool:
        """Whether a tolerant reader, such as the advisor service, gets a critique out of it."""
        return self.critique is not None

    @property
    def strict(self) -> bool:
        """Whether the answer keeps the format to the letter."""
        return self.strict_error is None


def read(text: str, dimensions: Sequence[str] | None = None) -> Reading:
    """Read one answer, leniently for its scores and strictly for its format.

    ``dimensions`` are the names the strict check asks for; None leaves the names free.
    """
    strict_error = strict_format_error(text, dimensions)
    try:
        parsed = parse_analysis(text, partial=True)
    except CritiqueError as error:
        return Reading(None, str(error), strict_error or str(error))
    critique = parsed.critique
    return Reading(
        critique,
        None,
        strict_error,
        tuple(parsed.mends),
        {dimension_key(name): score for name, score in critique.scores().items()},
        {dimension_key(name): name for name in critique.scores()},
        critique.overall_score,
    )


def dimension_key(name: str) -> str:
    """``Focus & Sharpness``, ``focus_and_sharpness`` and ``Focus and sharpness`` are one key."""
    return "_".join(re.findall(r"\w+", name.casefold().replace("&", " and ").replace("_", " ")))


def score_errors(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Absolute error, 0-10, in each dimension that both have; keys as ``dimension_key`` gives."""
    return {key: abs(scores[key] - value) for key, value in reference.items() if key in scores}


def score_error(scores: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """Mean absolute error over the shared dimensions, 0-10; None where they share none."""
    errors = score_errors(scores, reference)
    return fmean(errors.values()) if errors else None


def worst_error(reference: Mapping[str, float]) -> float | None:
    """The largest mean error any scores could have, 5-10; None for a reference without scores.

    What an answer is charged that cannot be read, in ``score_mae_worst_case``.
    """
    if not reference:
        return None
    return fmean(max(value - LOWEST, HIGHEST - value) for value in reference.values())


def mean_scores(references: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each dimension over ``references``: the prediction that ignores the picture."""
    seen: dict[str, list[float]] = defaultdict(list)
    for scores in references:
        for key, value in scores.items():
            seen[key].append(value)
    return {key: fmean(values) for key, values in seen.items()}


def by_photograph(
    values: Sequence[float | None], photographs: Sequence[Hashable]
) -> dict[Hashable, float]:
    """The mean value of each photograph, in order of appearance; None values do not count.

    Rows that share a photograph are not independent: they count as one observation.
    """
    if len(values) != len(photographs):
        raise ValueError(f"{len(values)} values for {len(photographs)} photographs")
    seen: dict[Hashable, list[float]] = {}
    for value, photograph in zip(values, photographs, strict=True):
        if value is not None:
            seen.setdefault(photograph, []).append(value)
    return {photograph: fmean(found) for photograph, found in seen.items()}


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, -1 to 1, of (answer, reference) scores; ``scipy.stats``.

    None for fewer than three pairs or where either side never varies: a model that gives every
    photograph the same score ranks nothing. Ties share their mean rank (Kendall 1948).
    """
    if not _rankable(pairs):
        return None
    from scipy.stats import spearmanr

    given, truth = zip(*pairs, strict=True)
    found: Any = spearmanr(given, truth)
    return float(found.statistic)


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b (1945, Biometrika 33), -1 to 1, of (answer, reference) scores.

    Of two photographs, how much oftener both sides rank them alike than unlike; corrected for
    ties. None where ``spearman`` is None.
    """
    if not _rankable(pairs):
        return None
    from scipy.stats import kendalltau

    given, truth = zip(*pairs, strict=True)
    found: Any = kendalltau(given, truth)
    return float(found.statistic)


def _rankable(pairs: Sequence[tuple[float, float]]) -> bool:
    return len(pairs) >= 3 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))


def spread_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard deviation of the answers' scores over that of the references', 0 or more.

    1 for a model that tells photographs apart as much as the advisor does, 0 for one that gives
    all the same score; a cautious model that is right on average lies between. None for fewer than
    two pairs or references without spread.
    """
    if len(pairs) < 2:
        return None
    given, truth = (pstdev(side) for side in zip(*pairs, strict=True))
    return given / truth if truth else None


def overall_gap(critique: Critique) -> float:
    """How far the stated overall score lies from the mean of its own dimensions, 0-10."""
    return abs(critique.overall_score - fmean(d.score for d in critique.dimensions))


def distinct_advice(critiques: Iterable[Critique]) -> float | None:
    """Distinct recommendations over all recommendations, across dimensions and photographs, 0-1.

    After distinct-n (Li et al. 2016, "A Diversity-Promoting Objective Function"), with a whole
    recommendation as the unit. It falls as critiques are added, so only equal numbers of them can
    be compared. None without any.
    """
    said = [
        " ".join(d.recommendation.casefold().split())
        for critique in critiques
        for d in critique.dimensions
        if d.recommendation.strip()
    ]
    return len(set(said)) / len(said) if said else None


def description_overlap(answer: Critique, reference: Critique) -> float | None:
    """Jaccard overlap, 0-1, of the words of two image descriptions; None if either has none."""
    mine, theirs = (
        set(re.findall(r"\w+", c.image_description.casefold())) for c in (answer, reference)
    )
    return len(mine & theirs) / len(mine | theirs) if mine and theirs else None


def percentile(values: Iterable[float | None], percent: float) -> float | None:
    """The ``percent``-th percentile (0-100), between neighbours; None where a value is unknown."""
    found = list(values)
    known = [value for value in found if value is not None]
    if not found or len(known) < len(found):
        return None
    import numpy as np

    return float(np.percentile(known, percent))


def distinct_score_vectors(readings: Iterable[Reading]) -> int:
    """How many different sets of scores the readable answers give; 1 means a template."""
    return len({tuple(sorted(r.scores.items())) for r in readings if r.readable and r.scores})


def foreign_script(text: str, reference: str) -> bool:
    """Whether most letters of ``text`` are outside the Latin script while the reference's are not.

    A coarse alarm for answers in another language, which a format check lets pass.
    """
    return _latin_share(text) < 0.5 <= _latin_share(reference)


def _latin_share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    # U+024F ends Latin Extended-B; U+1E00-1EFF is Latin Extended Additional.
    latin = sum(c <= "\u024f" or "\u1e00" <= c <= "\u1eff" for c in letters)
    return latin / len(letters) if letters else 1.0

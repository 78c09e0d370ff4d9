"""Intervals and tests for small samples of photographs, and the rule that turns them to a verdict.

Everything here is a pure function of its arguments: resampling is seeded, so equal input gives
equal numbers. numpy and scipy are imported on first use, since the terminal screens need only
the constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
SCORE_MARGIN = 0.25
"""Score points (of 0-10) by which a tuned model may be worse and still count as no worse."""
FORMAT_MARGIN = 0.02
"""Share of answers (0-1) by which format compliance may fall and still count as no worse."""
SMALLEST_SAMPLE = 6
"""Photographs below which nothing is claimed: 2 / 2**5 > 0.05, so no sign-flip test of five or
fewer can reach the 5 % level."""
EXACT_UP_TO = 40
RESAMPLES = 9_999


def mean_interval(
    values: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Confidence interval of the mean of ``values`` at ``level``; None for fewer than two values.

    Bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence Intervals",
    JASA 82) with 9,999 resamples, through ``scipy.stats.bootstrap``. Same unit as the values. Equal
    values give an interval of no width. With fewer than about ten values it is too narrow, as
    every bootstrap is.
    """
    if len(values) < 2:
        return None
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    from scipy.stats import bootstrap

    found = bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1_000,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if isfinite(low) and isfinite(high) else None


def sign_flip(differences: Sequence[float], *, seed: int = 0) -> float | None:
    """Two-sided p-value, in (0, 1], of paired ``differences`` having no direction; None if empty.

    The permutation test of Fisher (1935, "The Design of Experiments", section 21): under the null
    hypothesis each difference could as well have the opposite sign, and p is the share of all sign
    patterns whose sum is at least as far from zero. Up to 40 differences every one of the 2**n
    patterns is counted, by sorting the sums of one half and searching them for each sum of the
    other; above that, 99,999 random patterns stand for them and the observed one is counted in.
    """
    import numpy as np

    data = np.asarray(differences, dtype=np.float64)
    if data.size == 0:
        return None
    # Scores are round numbers, so sums tie: a tolerance keeps rounding from splitting the ties.
    threshold = abs(float(data.sum())) - 1e-9 * max(1.0, float(np.abs(data).sum()))
    if threshold <= 0:
        return 1.0
    if data.size <= EXACT_UP_TO:
        half = data.size // 2
        left, right = _signed_sums(data[:half]), np.sort(_signed_sums(data[half:]))
        beyond = int((right.size - np.searchsorted(right, threshold - left, side="left")).sum())
        return min(1.0, 2 * beyond / 2.0**data.size)
    rng = np.random.default_rng(seed)
    beyond, drawn = 0, 99_999
    for start in range(0, drawn, 10_000):
        count = min(10_000, drawn - start)
        signs = rng.choice((-1.0, 1.0), size=(count, data.size))
        beyond += int((np.abs(signs @ data) >= threshold).sum())
    return (beyond + 1) / (drawn + 1)


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """All 2**n sums of ``values`` (n,) under every choice of signs, shape (2**n,)."""
    import numpy as np

    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums + value, sums - value))
    return sums


def share_interval(hits: int, n: int, *, level: float = LEVEL) -> tuple[float, float] | None:
    """Wilson's score interval (1927, JASA 22) of a share ``hits / n``, within 0-1; None if n is 0.

    Unlike the bootstrap it has a width when every answer is right: 18 of 18 leaves 0.82-1.
    """
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula gives 0 and 1 but for rounding.
    low, high = max(0.0, centre - reach), min(1.0, centre + reach)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


@dataclass(frozen=True)
class Change:
    """A paired change over photographs; positive means that the tuned model is better.

    ``state`` is one of ``better``, ``no_worse``, ``inconclusive``, ``worse`` as ``judge`` has it.
    """

    n: int
    mean: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    margin: float
    state: str

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON, the interval as a list."""
        found = asdict(self)
        found["interval"] = None if self.interval is None else list(self.interval)
        return found


def judge(
    gains: Sequence[float], *, margin: float, observed: bool = False, seed: int = 0
) -> Change:
    """What paired ``gains`` (positive: tuned better, any unit) allow one to say.

    ``better``: the 95 % interval lies above zero and the sign-flip test agrees (p <= 0.05).
    ``worse``: the same below zero. ``no_worse``: the interval lies above ``-margin``; with
    ``observed`` the mean itself need only be there, for yes-or-no gains, of which no affordable
    number of photographs could bound the interval to a few points. ``inconclusive``: anything else,
    and any sample of fewer than six photographs. Where every gain is exactly zero the answer is
    ``no_worse`` at any size.
    """
    n = len(gains)
    if n == 0:
        return Change(0, None, None, None, margin, "inconclusive")
    mean, interval, p = fmean(gains), mean_interval(gains, seed=seed), sign_flip(gains, seed=seed)
    if all(gain == 0 for gain in gains):
        state = "no_worse"
    elif n < SMALLEST_SAMPLE or interval is None or p is None:
        state = "inconclusive"
    elif interval[0] > 0 and p <= 1 - LEVEL:
        state = "better"
    elif interval[1] < 0 and p <= 1 - LEVEL:
        state = "worse"
    else:
        bound = mean if observed else interval[0]
        state = "no_worse" if bound > -margin else "inconclusive"
    return Change(n, mean, interval, p, margin, state)


def combine(score: str, form: str) -> str:
    """One verdict from the states of score error and format compliance.

    Either one worse makes the whole worse; either one unknown leaves it inconclusive; one better
    and the other no worse is better.
    """
    states = {score, form}
    for state in ("worse", "inconclusive", "better"):
        if state in states:
            return state
    return "no_worse"

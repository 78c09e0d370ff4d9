"""Intervals and tests for small samples of photographs, and the rule that turns them to a verdict.

Everything here is a pure function of its arguments: resampling is seeded, so equal input gives
equal numbers. numpy and scipy are imported on first use, since the terminal screens need only
the constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite, log, sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
POWER = 0.80
"""How often an effect of the stated minimum size must be found."""
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
    values: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Confidence interval of the mean of ``values`` at ``level``; None for fewer than two values.

    Bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence Intervals",
    JASA 82) with ``resamples`` resamples, through ``scipy.stats.bootstrap``. Same unit as the
    values. Equal values give an interval of no width. With fewer than about ten values it is too
    narrow, as every bootstrap is.
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
        n_resamples=resamples,
        batch=1_000,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if isfinite(low) and isfinite(high) else None


@dataclass(frozen=True)
class Ratio:
    """How many times another's a positive quantity is, over ``n`` pairs; see `paired_ratio`."""

    n: int
    ratio: float | None
    interval: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON, the interval as a list."""
        found = asdict(self)
        found["interval"] = None if self.interval is None else list(self.interval)
        return found


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = RESAMPLES
) -> Ratio:
    """The geometric mean of ``ours[i] / theirs[i]``, all above 0, with its 95 % interval.

    The interval is `mean_interval` of the logarithms. Ratios are averaged as logarithms because
    their plain mean is above 1 where neither side is larger. None below six pairs, where the
    bootstrap says too little.
    """
    logs = [log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if not logs:
        return Ratio(0, None, None)
    found = mean_interval(logs, resamples=resamples) if len(logs) >= SMALLEST_SAMPLE else None
    ends = None if found is None else (exp(found[0]), exp(found[1]))
    return Ratio(len(logs), exp(fmean(logs)), ends)


def sign_flip(differences: Sequence[float], *, seed: int = 0) -> float | None:
    """Two-sided p-value, in (0, 1], of paired ``differences`` having no direction; None if empty.

    The permutation test of Fisher (1935, "The Design of Experiments", section 21): under the null
    hypothesis each difference could as well have the opposite sign, and p is the share of all sign
    patterns whose sum is at least as far from zero. Up to 40 differences every one of the 2**n
    patterns is counted, by sorting the sums of one half and searching them for each sum of the
    other; above that, 99,999 random patterns stand for them and the observed one is counted in.

    ``scipy.stats.permutation_test(permutation_type="samples")`` gives the same p (tested), but it
    evaluates the patterns one by one: 2**18 of them took 0.96 s where this took 0.07 ms, and 2**40
    it cannot do at all. An evaluation asks for some ten p-values, a simulation for thousands.
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


def studentized(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> float | None:
    """Two-sided p-value, in (0, 1], of the mean being zero, by the studentised bootstrap.

    The bootstrap-t of Efron (1982, "The Jackknife, the Bootstrap and Other Resampling Plans",
    chapter 10; Hall 1992, "The Bootstrap and Edgeworth Expansion", section 3.5): the tail of the
    observed t among the t of ``resamples`` resamples about the sample's own mean, doubled. Unlike
    the sign-flip test it takes the values' skewness into account. None for fewer than two values
    or values without spread. scipy.stats.bootstrap has no studentised method, hence by hand.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    n = data.size
    if n < 2 or np.ptp(data) == 0:
        return None
    mean = data.mean()
    observed = mean / (data.std(ddof=1) / sqrt(n))
    rng = np.random.default_rng(seed)
    above = below = 0
    for start in range(0, resamples, 1_000):
        drawn = data[rng.integers(n, size=(min(1_000, resamples - start), n))]
        off, spread = drawn.mean(axis=1) - mean, drawn.std(axis=1, ddof=1) / sqrt(n)
        # A resample of one value n times has no spread: its t is as far out as can be.
        flat = spread < 1e-12
        t = np.where(flat, np.copysign(np.inf, off), off / np.where(flat, 1.0, spread))
        t[flat & (np.abs(off) < 1e-12)] = 0.0
        above += int((t >= observed).sum())
        below += int((t <= observed).sum())
    return min(1.0, 2 * (min(above, below) + 1) / (resamples + 1))


def share_interval(hits: int, n: int, *, level: float = LEVEL) -> tuple[float, float] | None:
    """Wilson's score interval (1927, JASA 22) of a share ``hits / n``, within 0-1; None if n is 0.

    Unlike the bootstrap it has a width when every answer is right: 18 of 18 leaves 0.82-1.
    """
    if n == 0:
        return None
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value, in (0, 1], of as many gained as lost; 1 where neither happened.

    McNemar's test (1947, Psychometrika 12) in its exact form: the binomial test of the pairs that
    changed, through ``scipy.stats.binomtest``. Six one-sided changes are the fewest that reach 5 %.
    """
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6), in the given order.

    An adjusted p below 0.05 holds with all of them taken together (family-wise error 5 %, whatever
    their dependence). None values are not tests and stay None. scipy has only the false discovery
    rate's corrections, which promise less; statsmodels would be a dependency for these lines.
    """
    order = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, at) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        adjusted[at] = least
    return adjusted


def effect_size(differences: Sequence[float]) -> float | None:
    """Standardised paired effect: mean over standard deviation of the differences, any sign.

    Cohen's d_z (1988, "Statistical Power Analysis", section 2.3.5). None for fewer than two
    differences or differences without spread.
    """
    if len(differences) < 2 or (spread := stdev(differences)) < 1e-12:
        return None
    return fmean(differences) / spread


def minimum_detectable_effect(differences: Sequence[float]) -> float | None:
    """Smallest true gain that ``judge`` would call better in four of five evaluations like this.

    Same unit as ``differences``, above 0; from their spread and number alone, whatever their mean.
    None for fewer than six or without spread.

    The paired t-test's (t(0.975) + t(0.80)) * sd / sqrt(n), n - 1 degrees of freedom, which the
    noncentral t confirms within 1 %, times 1 + (2.5 + 5 * s) / n. The rule asks for more than a
    t-test does, three tests at once, and pays for it most where the differences are skewed to the
    left (a few photographs much worse, s = -skewness there, 0 otherwise). The factor is calibrated
    by simulation of the rule for n of 6 to 80: it finds normal, discrete and tied differences in
    0.81-0.95 of repeats and those of skewness -1 in 0.82-0.95, whether the spread is known or
    the evaluation's own. Where another evaluation's spread is used, the last falls to 0.72-0.80.
    """
    n = len(differences)
    if n < SMALLEST_SAMPLE or (spread := stdev(differences)) < 1e-12:
        return None
    from scipy.stats import skew, t

    left = max(0.0, -float(skew(differences, bias=False)))
    reach = float(t.ppf(0.5 + LEVEL / 2, n - 1) + t.ppf(POWER, n - 1))
    return reach * spread / sqrt(n) * (1 + (2.5 + 5 * left) / n)


def minimum_detectable_share(n: int) -> float | None:
    """Smallest true rise of a share that ``judge`` would call better in four of five evaluations.

    For ``n`` paired yes-or-no observations none of which gets worse: the rise at which six or more
    of them get better, the fewest that McNemar's test can tell, with a probability of 80 %
    (binomial, exact). Within 0-1, at best: where some get worse, more is needed. None below six.
    """
    if n < SMALLEST_SAMPLE:
        return None
    from scipy.special import bdtri

    return float(bdtri(SMALLEST_SAMPLE - 1, n, 1 - POWER))


@dataclass(frozen=True)
class Change:
    """A paired change over photographs; positive means that the tuned model is better.

    ``state`` is one of ``better``, ``no_worse``, ``inconclusive``, ``worse`` as ``judge`` has it;
    ``p_value`` is ``sign_flip``'s, ``studentized_p`` ``studentized``'s; ``effect_size`` is the
    mean over the standard deviation. ``p_mcnemar`` is ``mcnemar``'s for yes-or-no gains, counting
    photographs that gained and lost, and None for others.
    """

    n: int
    mean: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    margin: float
    state: str
    studentized_p: float | None = None
    effect_size: float | None = None
    minimum_detectable_effect: float | None = None
    p_mcnemar: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON, the interval as a list."""
        found = asdict(self)
        found["interval"] = None if self.interval is None else list(self.interval)
        return found


def judge(
    gains: Sequence[float],
    *,
    margin: float,
    observed: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Change:
    """What paired ``gains`` (positive: tuned better, any unit) allow one to say.

    ``better``: the 95 % interval lies above zero, and both the sign-flip test and the studentised
    bootstrap agree (p <= 0.05). ``worse``: the same below zero. ``no_worse``: the interval lies
    above ``-margin``. ``inconclusive``: anything else, and any sample of fewer than six
    photographs. Where every gain is exactly zero the answer is ``no_worse`` at any size.

    With ``observed``, for yes-or-no gains (-1 to 1), the mean itself need only be
    ``-margin`` or more, since no affordable number of photographs could bound the interval to a few
    points; and the studentised bootstrap is not asked, since McNemar's test, which sign-flipping
    such gains is, needs no assumption about their distribution.

    Why three: the sign-flip test is exact where both arms' errors are distributed alike, and too
    easy where gains are skewed to the left; the interval alone is too narrow below some twenty
    photographs. In 4,000 simulations at n = 15 of gains with mean zero and skewness -1 the first
    two said better in 4.3 %, all three in 3.4 %; at skewness -2 in 6.1 % and 3.5 %; of gains
    without skewness 2.9 % and 2.5 %. ``combine`` gives a second way to be better, the format, so
    each has to stay well below 5 %.
    """
    n = len(gains)
    if n == 0:
        return Change(0, None, None, None, margin, "inconclusive")
    mean, p = fmean(gains), sign_flip(gains, seed=seed)
    interval = mean_interval(gains, seed=seed, resamples=resamples)
    skewed = None if observed else studentized(gains, seed=seed, resamples=resamples)
    # Gains without any spread have no studentised p; the sign-flip test then decides alone.
    clear = p is not None and max(p, skewed or 0.0) <= 1 - LEVEL + 1e-12
    if all(gain == 0 for gain in gains):
        state = "no_worse"
    elif n < SMALLEST_SAMPLE or interval is None or p is None:
        state = "inconclusive"
    elif interval[0] > 0 and clear:
        state = "better"
    elif interval[1] < 0 and clear:
        state = "worse"
    else:
        # A loss of just the margin is within it, whatever the last bit of a mean says.
        bound = mean + 1e-12 if observed else interval[0]
        state = "no_worse" if bound > -margin else "inconclusive"
    return Change(
        n,
        mean,
        interval,
        p,
        margin,
        state,
        skewed,
        effect_size(gains),
        minimum_detectable_share(n) if observed else minimum_detectable_effect(gains),
        mcnemar(sum(g > 0 for g in gains), sum(g < 0 for g in gains)) if observed else None,
    )


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

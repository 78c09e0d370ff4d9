"""The statistics say what the literature says, and what simulation confirms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from mondrian_ft.evaluation import stats


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_sign_flip_counts_every_pattern(n: int) -> None:
    """The exact p-value is scipy's, which enumerates the same patterns, ties included."""
    rng = np.random.default_rng(n)
    for values in (rng.normal(0.4, 1, n), rng.integers(-2, 4, n) / 2):
        expected = reference.permutation_test(
            (values,),
            np.mean,
            permutation_type="samples",
            n_resamples=2**n,
            alternative="two-sided",
        ).pvalue
        found = stats.sign_flip(list(values))
        # scipy doubles the smaller tail, which for all-zero samples exceeds what can be counted.
        assert found == pytest.approx(min(1.0, expected))


def test_sign_flip_by_hand() -> None:
    """Six gains of one sign: two of the 64 patterns are as extreme. None at all: no p-value."""
    assert stats.sign_flip([1.0, 2.0, 0.5, 0.1, 3.0, 0.2]) == 2 / 64
    assert stats.sign_flip([0.0, 0.0]) == 1.0
    assert stats.sign_flip([]) is None


def test_sign_flip_of_many_is_drawn_and_repeatable() -> None:
    """Beyond forty photographs the patterns are drawn: near the exact normal limit, and seeded."""
    values = np.random.default_rng(1).normal(0.25, 1, 60)
    z = abs(values.sum()) / np.sqrt((values**2).sum())
    assert stats.sign_flip(list(values)) == stats.sign_flip(list(values))
    assert stats.sign_flip(list(values)) == pytest.approx(2 * reference.norm.sf(z), abs=0.01)


def test_interval_covers() -> None:
    """The interval covers some 95 % of known means, and is none or a point where it must be."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        interval = stats.mean_interval(list(rng.normal(1.0, 0.5, 18)), seed=trial)
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert covered >= 51
    assert stats.mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert stats.mean_interval([2.0]) is None


def test_share_interval_is_wilsons() -> None:
    """The share's interval is the one scipy's binomtest calls wilson."""
    for hits, n in ((18, 18), (0, 5), (7, 9), (1, 1)):
        expected = reference.binomtest(hits, n).proportion_ci(method="wilson")
        assert stats.share_interval(hits, n) == pytest.approx((expected.low, expected.high))
    assert stats.share_interval(0, 0) is None


def test_judge_states() -> None:
    """Each state has its case: clear gain, clear loss, a small spread, a wide one, too few."""
    rng = np.random.default_rng(3)
    assert stats.judge(list(rng.normal(0.8, 0.3, 18)), margin=0.25).state == "better"
    assert stats.judge(list(rng.normal(-0.8, 0.3, 18)), margin=0.25).state == "worse"
    spread = rng.normal(0.0, 0.1, 18)
    assert stats.judge(list(spread - spread.mean()), margin=0.25).state == "no_worse"
    assert stats.judge(list(10 * (spread - spread.mean())), margin=0.25).state == "inconclusive"
    uneven = [1.0, 1.0, -1.0] + [0.0] * 17
    assert stats.judge(uneven, margin=0.02).state == "inconclusive"
    assert stats.judge(uneven, margin=0.02, observed=True).state == "no_worse"
    assert stats.judge([-v for v in uneven], margin=0.02, observed=True).state == "inconclusive"
    assert stats.judge([1.0] * 5, margin=0.25).state == "inconclusive"
    assert stats.judge([0.0], margin=0.25).state == "no_worse"
    assert stats.judge([], margin=0.25).state == "inconclusive"


def test_judge_seldom_claims_what_is_not_there() -> None:
    """With no true difference, better or worse is claimed about one time in twenty, not more."""
    rng = np.random.default_rng(4)
    states = [stats.judge(list(rng.normal(0, 1, 16)), margin=0.25).state for _ in range(80)]
    assert sum(state in ("better", "worse") for state in states) <= 9


def test_combine() -> None:
    """One worse spoils the verdict, one unknown leaves it open, one better carries it."""
    assert stats.combine("better", "worse") == "worse"
    assert stats.combine("better", "inconclusive") == "inconclusive"
    assert stats.combine("no_worse", "better") == "better"
    assert stats.combine("no_worse", "no_worse") == "no_worse"


def test_mcnemar_is_the_sign_flip_test_of_yes_or_no() -> None:
    """Six gained and none lost is 2/64; equal numbers are no difference."""
    assert stats.mcnemar(6, 0) == pytest.approx(2 / 64)
    assert stats.mcnemar(0, 0) == stats.mcnemar(3, 3) == 1
    gains = [1.0] * 7 + [-1.0] * 2 + [0.0] * 9
    assert stats.mcnemar(7, 2) == pytest.approx(stats.sign_flip(gains))


def test_holm_by_hand() -> None:
    """The smallest of three times three, the next times two, never below the one before it."""
    assert stats.holm([0.04, 0.01, None, 0.03]) == [
        pytest.approx(0.06),
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
    ]
    assert stats.holm([0.9, 0.8]) == [1, 1]
    assert stats.holm([]) == []


def test_studentized_is_the_t_test_of_many_normal_values() -> None:
    """Of many symmetric values it gives Student's p, in both directions; of skewed ones another."""
    rng = np.random.default_rng(2)
    values = rng.normal(0.2, 1, 80)
    student = values.mean() / (values.std(ddof=1) / np.sqrt(values.size))
    expected = 2 * reference.t.sf(abs(student), values.size - 1)
    for side in (values, -values):
        assert stats.studentized(list(side)) == pytest.approx(expected, abs=0.015)
    assert stats.studentized(list(values)) == stats.studentized(list(values))
    gains = -(rng.gamma(1.0, 1.0, 15) - 1.5)
    skewed, other = stats.studentized(list(gains)), stats.sign_flip(list(gains))
    assert skewed is not None
    assert other is not None
    assert skewed > other
    assert stats.studentized([1.0] * 8) is None
    assert stats.studentized([1.0]) is None
    assert stats.studentized([0.0, 0.0, 5.0]) is not None


def test_detectable_effects() -> None:
    """Never below the paired t-test's own, near it for many, and unknown without any spread."""
    rng = np.random.default_rng(0)
    for n, most in ((8, 2.0), (30, 1.3), (400, 1.05)):
        values = list(rng.normal(0.3, 2, n))
        own = stats.minimum_detectable_effect(values)
        assert own is not None
        shift = own / np.std(values, ddof=1) * np.sqrt(n)
        critical = reference.t.ppf(0.975, n - 1)
        power = reference.nct.sf(critical, n - 1, shift)
        assert power >= 0.8
        classic = (critical + reference.t.ppf(0.8, n - 1)) / np.sqrt(n) * np.std(values, ddof=1)
        assert classic <= own <= most * classic
        again = stats.minimum_detectable_effect([value + 5 for value in values])
        assert own == pytest.approx(again)
    assert stats.minimum_detectable_effect([1.0] * 9) is None
    assert stats.minimum_detectable_effect([1.0, 2.0, 3.0]) is None
    share = stats.minimum_detectable_share(15)
    assert share is not None
    assert reference.binom.sf(5, 15, share) == pytest.approx(0.8)
    assert stats.minimum_detectable_share(5) is None


def test_effect_size_by_hand() -> None:
    """Mean 2, standard deviation 1."""
    assert stats.effect_size([1.0, 2.0, 3.0]) == pytest.approx(2)
    assert stats.effect_size([-1.0, -2.0, -3.0]) == pytest.approx(-2)
    assert stats.effect_size([2.0, 2.0]) is None
    assert stats.effect_size([2.0]) is None


def test_a_loss_of_just_the_margin_is_within_it() -> None:
    """Two of 100 answers lost the format, two points were allowed, and no verdict came of it."""
    gains = [-1.0] * 2 + [0.0] * 98
    assert stats.judge(gains, margin=0.02, observed=True).state == "no_worse"
    assert stats.judge(gains, margin=0.019, observed=True).state == "inconclusive"

"""How often the verdict is right, by simulation through the function that decides real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mondrian_ft.evaluation import evidence, stats
from mondrian_ft.evaluation.metrics import Reading

N = 15
REPEATS = 1_000
RESAMPLES = 999
"""Of each bootstrap; a real evaluation uses 9,999, which moves a p-value by less than 0.01."""
NAMES = {f"d{index}": f"D{index}" for index in range(7)}
PHOTOGRAPHS = [str(index) for index in range(N)]

Scores = np.ndarray
"""Of one arm: shape (n, 7), points of 0-10."""


def readings(scores: Scores, strict: np.ndarray | None = None) -> list[Reading]:
    """Answers with these scores, in the exact format where ``strict`` (n,) says so."""
    kept = np.ones(len(scores), bool) if strict is None else strict
    return [
        Reading(
            None,
            None,
            None if ok else "no",
            (),
            dict(zip(NAMES, map(float, row), strict=True)),
            NAMES,
        )
        for row, ok in zip(scores, kept, strict=True)
    ]


def decide(base: list[Reading], tuned: list[Reading], truth: Scores) -> dict:
    """The verdict on one simulated evaluation."""
    return evidence.verdict(base, tuned, readings(truth), PHOTOGRAPHS, resamples=RESAMPLES)


def truths(rng: np.random.Generator) -> Scores:
    """An advisor's whole scores."""
    return rng.integers(2, 9, (N, 7)).astype(float)


def rounded(rng: np.random.Generator, truth: Scores) -> Scores:
    """A model that misses by a point or two, in whole scores: many ties."""
    return np.clip(np.round(truth + rng.normal(0, 1.3, truth.shape)), 0, 10)


def blunders(rng: np.random.Generator, truth: Scores) -> Scores:
    """A model that is far off on some photographs: errors skewed to the right."""
    off = rng.gamma(0.7, 1.2, (len(truth), 1)) * rng.choice((-1.0, 1.0), truth.shape)
    return truth + off


def coarse(rng: np.random.Generator, truth: Scores) -> Scores:
    """A model that is right or one point off as a whole: errors of two values only."""
    return truth + rng.integers(0, 2, (len(truth), 1))


def uneven(rng: np.random.Generator, truth: Scores) -> Scores:
    """Another kind of model, as good on average as ``even``: usually better, seldom much worse.

    Its mean error is 1, its skewness that of a gamma variable of shape 4, which is 1.
    """
    return truth + rng.gamma(4.0, 0.25, (len(truth), 1))


def even(rng: np.random.Generator, truth: Scores) -> Scores:
    """A model that misses every score by exactly one point."""
    return truth + 1.0


NULLS: dict[str, tuple[Callable[..., Scores], Callable[..., Scores], float]] = {
    "independent noise": (rounded, rounded, 1.0),
    "independent noise in scores and format": (rounded, rounded, 0.7),
    "skewed errors": (blunders, blunders, 1.0),
    "ties, and noise in the format": (coarse, coarse, 0.85),
    "tuned skewed to the worse, equal on average": (even, uneven, 1.0),
    "the same, and noise in the format": (even, uneven, 0.8),
}
"""base, tuned and the share of exact answers, which neither arm differs in."""


@pytest.mark.slow
@pytest.mark.parametrize("scenario", NULLS)
def test_better_is_not_said_without_a_difference(scenario: str) -> None:
    """Under no difference the verdict is better in at most 5 % of 1,000 evaluations."""
    base, tuned, exact = NULLS[scenario]
    rng = np.random.default_rng(list(NULLS).index(scenario))
    states: Counter[str] = Counter()
    for _ in range(REPEATS):
        truth = truths(rng)
        before, after = (readings(arm(rng, truth), rng.random(N) < exact) for arm in (base, tuned))
        states[decide(before, after, truth)["verdict"]] += 1
    assert states["better"] <= 0.05 * REPEATS, states


def shifted(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Gains (n,) of standard deviation about 1 around zero."""
    if kind == "normal":
        return rng.normal(0, 1, N)
    if kind == "rounded":
        errors = np.abs(np.round(rng.normal(0, 1.5, (2, N, 7)))).mean(axis=2)
        return (errors[0] - errors[1]) / 0.5
    if kind == "ties":
        errors = np.abs(np.round(rng.normal(0, 1, (2, N))))
        return errors[0] - errors[1]
    gains = (rng.gamma(4.0, 1.0, N) - 4) / 2
    return gains if kind == "skewed right" else -gains


KINDS = ["normal", "rounded", "ties", "skewed right", "skewed left"]


def evaluate_gains(gains: np.ndarray) -> dict:
    """A verdict on two arms whose paired score errors differ by ``gains``, and in nothing else."""
    truth = np.full((N, 7), 0.0)
    after = np.full((N, 1), 10.0)
    return decide(readings(truth + after + gains[:, None]), readings(truth + after), truth)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_minimum_effect_is_found(kind: str) -> None:
    """A true effect of the size a report states as detectable is found in 80 % or more.

    Stated twice: once for the spread that such gains have, by the median of many reports, and once
    by the very evaluation that then has to find it.
    """
    rng = np.random.default_rng([1, KINDS.index(kind)])
    samples = [shifted(rng, kind) for _ in range(REPEATS)]
    stated = [stats.minimum_detectable_effect(list(gains)) for gains in samples]
    assert None not in stated
    typical = float(np.median(np.array(stated, float)))
    rng = np.random.default_rng([2, KINDS.index(kind)])
    found: Counter[str] = Counter()
    for gains in (shifted(rng, kind) for _ in range(REPEATS // 2)):
        own = stats.minimum_detectable_effect(list(gains))
        assert own is not None
        for which, effect in (("typical", typical), ("own", own)):
            said = evaluate_gains(gains + effect)
            found[which] += said["verdict"] == "better"
            change = said["change"]["score"]
            assert change["minimum_detectable_effect"] == pytest.approx(own)
    assert found["typical"] >= 0.8 * (REPEATS // 2)
    assert found["own"] >= 0.8 * (REPEATS // 2)


def test_margins_are_the_callers() -> None:
    """The same evaluation is inconclusive under one margin and no worse under a wider one."""
    rng = np.random.default_rng(5)
    truth = truths(rng)
    base, tuned = readings(rounded(rng, truth)), readings(rounded(rng, truth))
    strict = np.arange(N) > 0
    sides = (base, tuned, readings(truth), PHOTOGRAPHS)
    assert evidence.verdict(*sides, score_margin=0.01)["verdict"] == "inconclusive"
    assert evidence.verdict(*sides, score_margin=2.0)["verdict"] == "no_worse"
    lost = readings(rounded(np.random.default_rng(6), truth), strict)
    sides = (base, lost, readings(truth), PHOTOGRAPHS)
    assert evidence.verdict(*sides, score_margin=2.0)["verdict"] == "inconclusive"
    wide = evidence.verdict(*sides, score_margin=2.0, format_margin=0.1)
    assert wide["verdict"] == "no_worse"
    assert wide["change"]["format"]["margin"] == 0.1


def test_the_change_tells_its_size_and_what_could_be_seen() -> None:
    """The paired effect size and McNemar's test, against numbers worked out by hand."""
    gains = np.array([1.0, 0.0, 2.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0, 2.0, 1.0])
    found = evaluate_gains(gains)["change"]
    assert found["score"]["effect_size"] == pytest.approx(gains.mean() / gains.std(ddof=1))
    truth = np.full((N, 7), 5.0)
    strict = np.arange(N) < 7
    form = decide(readings(truth, strict), readings(truth), truth)["change"]["format"]
    assert form["p_mcnemar"] == pytest.approx(2 / 2**8)
    assert form["p_mcnemar"] == pytest.approx(form["p_value"])
    assert form["state"] == "better"


def test_one_dimension_of_seven_is_found_and_no_other() -> None:
    """Differences, intervals and p by dimension, with Holm's correction over the seven."""
    rng = np.random.default_rng(8)
    truth = truths(rng)
    base, tuned = (truth + rng.normal(0, 1, truth.shape) for _ in range(2))
    base[:, 3] += 4
    changes = evidence.per_dimension_change(
        readings(base), readings(tuned), readings(truth), PHOTOGRAPHS
    )
    assert list(changes) == list(NAMES.values())
    assert [name for name, c in changes.items() if c["p_holm"] <= 0.05] == ["D3"]
    for change in changes.values():
        assert change["p_value"] <= change["p_holm"] <= 7 * change["p_value"]
        assert change["interval"][0] <= change["mean"] <= change["interval"][1]
        assert change["n"] == N

"""What the gate lets through, rule by rule, and that every rule says why with its figures."""

from __future__ import annotations

from typing import Any

import pytest

from mondrian_ft.registry import Decision, Occupant, Rules, Subject, decide

from .made import BASE, LOCK, comparison, digest

SUBJECT = Subject("v2", digest(2), BASE, LOCK, "of training_data/split.lock.json")
V1 = Occupant("v1", digest(1))


def judged(
    *,
    rules: Rules | None = None,
    subject: Subject = SUBJECT,
    occupant: Occupant | None = V1,
    **how: Any,
) -> Decision:
    """The decision on a report on adapter 2 beside adapter 1."""
    about: dict[str, Any] = {"against": 1} | how
    report = comparison(2, **about)
    return decide(report, rules or Rules(), subject=subject, occupant=occupant)


def failed(decision: Decision) -> list[str]:
    assert decision.passed == all(reason.passed for reason in decision.reasons)
    assert all(reason.sentence.endswith(".") for reason in decision.reasons)
    return [reason.rule for reason in decision.reasons if not reason.passed]


def test_better_passes_and_every_rule_tells() -> None:
    """All eight rules give a sentence, with figures where there are some."""
    decision = judged()
    assert failed(decision) == []
    told = {reason.rule: reason.sentence for reason in decision.reasons}
    assert list(told) == [
        "adapter",
        "data",
        "base",
        "against",
        "format",
        "score",
        "latency",
        "detections",
    ]
    assert "18 of 18 rows" in told["data"]
    assert "split.lock.json" in told["data"]
    assert "1.60 points against v1 (95 % interval 1.30 to 1.90)" in told["score"]
    assert "95 % interval -2 to +2 %" in told["latency"]


def test_an_empty_channel_is_compared_with_the_base() -> None:
    """No occupant, no comparison with one."""
    decision = judged(occupant=None, against=None)
    assert failed(decision) == []
    assert "against the base" in decision.reasons[5].sentence


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"against": None}, "against"),
        ({"against": 7}, "against"),
        ({"lock": "1" * 64}, "data"),
        ({"lock": None}, "data"),
        ({"base": BASE | {"weights": "0"}}, "base"),
        ({"base": BASE | {"quantization": "4 bits"}}, "base"),
        ({"base": None}, "base"),
        ({"subject": Subject("v3", digest(3), BASE, LOCK, "")}, "adapter"),
    ],
)
def test_evidence_about_something_else(how: dict[str, Any], rule: str) -> None:
    """Another adapter, rows, base or rival: it is no evidence, and no other rule is asked."""
    decision = judged(**how)
    assert failed(decision) == [rule]
    assert not decision.fits
    assert not {"score", "format", "latency"} & {reason.rule for reason in decision.reasons}


def test_a_base_that_was_moved_is_the_same() -> None:
    """Its name may be a path."""
    assert failed(judged(base=BASE | {"name": "/elsewhere/sample"})) == []


@pytest.mark.parametrize(
    ("state", "rules", "passes"),
    [
        ("worse", Rules(inconclusive="allow", no_worse="allow"), False),
        ("inconclusive", Rules(), False),
        ("inconclusive", Rules(no_worse="allow"), False),
        ("inconclusive", Rules(inconclusive="allow"), True),
        ("no_worse", Rules(), False),
        ("no_worse", Rules(inconclusive="allow"), False),
        ("no_worse", Rules(no_worse="allow"), True),
    ],
)
def test_scores_that_are_not_better(state: str, rules: Rules, passes: bool) -> None:
    """What becomes of them is the config's to say, except for the worse."""
    decision = judged(gain=-0.1, state=state, rules=rules)
    assert failed(decision) == ([] if passes else ["score"])
    if state != "worse":
        assert f"registry.gate.{state}" in decision.reasons[5].sentence


@pytest.mark.parametrize(
    ("ratio", "passes"), [(0.8, True), (1.11, True), (1.13, False), (None, True)]
)
def test_latency_is_refused_when_it_is_certain(ratio: float | None, passes: bool) -> None:
    """1.11 has its lower end at 1.09, 1.13 at 1.11; what was not measured refuses nothing."""
    assert failed(judged(ratio=ratio)) == ([] if passes else ["latency"])
    if ratio is None:
        assert "not measured" in judged(ratio=ratio).reasons[6].sentence
    assert failed(judged(ratio=1.5, rules=Rules(latency=0.5))) == []


def test_the_format_may_not_fall() -> None:
    """However much better the scores are."""
    report = comparison(2, against=1)
    form = report["evidence"]["against"]["production"]["change"]["format"]
    for state in ("worse", "inconclusive"):
        form |= {"state": state, "mean": -0.1}
        decision = decide(report, Rules(inconclusive="allow"), subject=SUBJECT, occupant=V1)
        assert failed(decision) == ["format"]
    assert "falls by 10.0 points" in decision.reasons[4].sentence


def test_a_collapse_or_a_copy_is_refused() -> None:
    """A detector that disqualifies, by name; one that only tells does not."""
    decision = judged(fired="recites")
    assert failed(decision) == ["detections"]
    assert "recites: It is." in decision.reasons[-1].sentence
    report = comparison(2, against=1, fired="recites")
    report["evidence"]["detections"][0]["disqualifies"] = False
    assert decide(report, Rules(), subject=SUBJECT, occupant=V1).passed
    report["evidence"]["detections"] = []
    assert failed(decide(report, Rules(), subject=SUBJECT, occupant=V1)) == ["detections"]

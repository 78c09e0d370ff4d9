"""What people prefer: the file, the counts and the exact test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.errors import DataError
from mondrian_ft.evaluation import assessments
from mondrian_ft.evaluation.assessments import Choice, Pair


def pair(index: int, photograph: str | None = None) -> Pair:
    name = f"{index}.jpg"
    return Pair(f"job-{index}", name, f"/p/{name}", photograph, f"base {index}", "tuned", "said")


def write(
    path: Path, said: Sequence[tuple[Pair, str]], reviewer: str | None = None, **more: Any
) -> None:
    """Judgements by what they prefer, the tuned one on the left of the even jobs."""
    for one, preferred in said:
        left = "tuned" if int(one.job_id[4:]) % 2 == 0 else "base"
        choice = Choice.EQUAL if preferred == "equal" else Choice.RIGHT
        choice = Choice.LEFT if preferred == left else choice
        choice = Choice.UNDO if preferred == "undo" else choice
        judgement = assessments.judge(
            one, choice, left=left, adapter="abc", reviewer=reviewer, **more
        )
        assessments.append(path, judgement)


def summary(path: Path, pairs: Sequence[Pair]) -> dict[str, Any]:
    return assessments.summarise(pairs, assessments.read(path))


@pytest.mark.parametrize(("tuned", "base"), [(14, 2), (5, 5), (0, 6), (1, 0), (9, 1)])
def test_the_sign_test_is_exact(tuned: int, base: int) -> None:
    """Against the binomial sums by hand, both tails; the interval agrees with the test."""
    n, high = tuned + base, max(tuned, base)
    tail = sum(math.comb(n, k) for k in range(high, n + 1)) / 2**n
    share, interval, p_value = assessments.sign_test(tuned, base)
    assert share == tuned / n
    assert p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-12)
    assert interval is not None
    assert p_value is not None
    assert interval[0] <= tuned / n <= interval[1]
    assert (interval[0] > 0.5 or interval[1] < 0.5) == (p_value < 0.05)


def test_clopper_pearson_at_the_ends_is_in_closed_form() -> None:
    """All of n: the lower end is 0.025 ** (1 / n)."""
    _, interval, _ = assessments.sign_test(6, 0)
    assert interval == pytest.approx([0.025 ** (1 / 6), 1.0])


def test_counts_without_ties_and_without_anything(tmp_path: Path) -> None:
    """Equal ones are counted and take no part in the test; nothing judged tests nothing."""
    path = tmp_path / "assessments.jsonl"
    pairs = [pair(index) for index in range(18)]
    assert summary(path, pairs)["n"] == 0
    assert assessments.sentence(summary(path, pairs)) == "People: no photograph is judged yet."
    write(path, [(one, "equal") for one in pairs[:2]])
    people = summary(path, pairs)
    assert (people["equal"], people["p_value"], people["share"]) == (2, None, None)
    assert "nothing to test" in assessments.sentence(people)
    write(path, [(one, "tuned") for one in pairs[2:16]])
    write(path, [(one, "base") for one in pairs[16:]], reference_shown=True)
    people = summary(path, pairs)
    assert {key: people[key] for key in ("n", "tuned", "base", "equal")} == {
        "n": 18,
        "tuned": 14,
        "base": 2,
        "equal": 2,
    }
    assert people["p_value"] == pytest.approx(0.00418, abs=1e-5)
    assert (people["reference_shown"], people["reviewers"], people["agreement"]) == (2, 1, None)
    assert assessments.sentence(people) == (
        "People: in 14 of 18 photographs the tuned critique was preferred, in 2 the base's, "
        "2 equal; exact sign test p = 0.004."
    )
    told = " ".join(assessments.notes(people))
    assert "88 % (95 % interval 62 to 98 %)" in told
    assert "In 2 of 18 judgements the reference was in sight" in told


def test_the_last_line_wins_and_undo_takes_back(tmp_path: Path) -> None:
    path = tmp_path / "assessments.jsonl"
    pairs = [pair(0), pair(1)]
    write(path, [(pairs[0], "base"), (pairs[1], "tuned"), (pairs[0], "tuned")])
    assert summary(path, pairs)["tuned"] == 2
    write(path, [(pairs[1], "undo")])
    people = summary(path, pairs)
    assert (people["n"], people["tuned"], people["photographs"]) == (1, 1, 2)
    told = " ".join(assessments.notes(people))
    assert "Fewer than 6" in told
    assert "1 of 2 photographs were not judged." in told
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


def test_judgements_of_other_answers_do_not_count(tmp_path: Path) -> None:
    """One changed answer, one job that is gone: told, not counted."""
    path = tmp_path / "assessments.jsonl"
    pairs = [pair(index) for index in range(3)]
    write(path, [(one, "tuned") for one in pairs])
    changed = Pair(**{**vars(pairs[1]), "tuned": "another answer"})
    people = summary(path, [pairs[0], changed])
    assert (people["n"], people["tuned"], people["stale"]) == (1, 1, 2)
    assert "2 judgements are about other answers" in " ".join(assessments.notes(people))


def test_photographs_are_the_unit(tmp_path: Path) -> None:
    """Two rows of one photograph and two reviewers give one vote, by majority."""
    path = tmp_path / "assessments.jsonl"
    pairs = [pair(0, "a" * 64), pair(1, "a" * 64), pair(2, "b" * 64), pair(3, "c" * 64)]
    write(path, list(zip(pairs, ["tuned", "tuned", "base", "equal"], strict=True)), "anna")
    write(path, list(zip(pairs, ["tuned", "base", "tuned", "tuned"], strict=True)), "ben")
    people = summary(path, pairs)
    assert (people["n"], people["photographs"], people["judgements"]) == (3, 3, 8)
    # Photograph a 3 to 1, b a draw, c one for tuned.
    assert (people["tuned"], people["base"], people["equal"]) == (2, 0, 1)
    assert people["reviewers"] == 2
    # Anna: 2 tuned, 1 base, 1 equal; Ben: 3 tuned, 1 base. By chance (2*3 + 1*1) / 16.
    assert people["agreement"] == {
        "pairs": 4,
        "share": 0.25,
        "kappa": pytest.approx((0.25 - 7 / 16) / (1 - 7 / 16)),
    }


def test_agreement_that_chance_alone_would_give() -> None:
    """Two who always say the same one thing: kappa is not defined, and said to be so."""
    said = [
        assessments.judge(pair(n), Choice.LEFT, left="tuned", adapter=None, reviewer=who)
        for n in range(3)
        for who in ("anna", "ben")
    ]
    assert assessments.agreement(said) == {"pairs": 3, "share": 1.0, "kappa": None}


def test_a_torn_last_line_is_passed_over_and_a_damaged_one_told(tmp_path: Path) -> None:
    path = tmp_path / "assessments.jsonl"
    write(path, [(pair(0), "tuned")])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"job_id": "jo')
    found = assessments.read(path)
    assert len(found.latest) == 1
    assert "cut short" in found.notice
    write(path, [(pair(1), "base")])
    assert len(assessments.read(path).latest) == 2
    path.write_text('{"job_id": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="Line 1 of the assessments"):
        assessments.read(path)


def test_sides_and_order_are_drawn_once_and_for_all() -> None:
    """Stable for one seed and adapter, other for another, and left as often as right."""
    pairs = [pair(index) for index in range(400)]
    sides = [assessments.left_of(0, "abc", one.job_id) for one in pairs]
    assert sides == [assessments.left_of(0, "abc", one.job_id) for one in pairs]
    # Four standard deviations of a fair coin tossed 400 times are 40.
    assert 160 <= sides.count("tuned") <= 240
    for seed, adapter in ((1, "abc"), (0, "abd")):
        other = [assessments.left_of(seed, adapter, one.job_id) for one in pairs]
        assert 160 <= sum(a == b for a, b in zip(sides, other, strict=True)) <= 240
    order = [one.job_id for one in assessments.shuffled(pairs, 0, "abc")]
    assert order != [one.job_id for one in pairs]
    assert order == [one.job_id for one in assessments.shuffled(pairs[::-1], 0, "abc")]
    assert order != [one.job_id for one in assessments.shuffled(pairs, 1, "abc")]


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({}, "has no sample_results"),
        ({"sample_results": []}, "has no sample_results"),
        ({"sample_results": ["x"]}, "Entry 1 of sample_results in r.json is no object"),
        (
            {"sample_results": [{"image": "a", "base_model": {"output": "x"}}]},
            "no answer of the tuned model",
        ),
    ],
)
def test_reports_that_cannot_be_assessed(report: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        assessments.pairs_of(report, "r.json")


def test_the_workbooks_own_report_will_do() -> None:
    """No job ids, no hashes, excerpts only; the same photograph twice is one too many."""
    sample = {
        "image": "a.jpg",
        "base_model": {"output": "one"},
        "fine_tuned_model": {"output": "two"},
    }
    found = assessments.pairs_of({"sample_results": [sample]}, "r.json")[0]
    assert (found.job_id, found.base, found.tuned) == ("a.jpg", "one", "two")
    assert found.photograph == "a.jpg"
    with pytest.raises(DataError, match=r"The job a\.jpg is twice"):
        assessments.pairs_of({"sample_results": [sample, sample]}, "r.json")

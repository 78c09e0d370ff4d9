"""Numbers as people read them."""

from __future__ import annotations

import pytest

from mondrian_ft.report import view, wording

from .conftest import critique


def test_percent_never_rounds_to_certainty() -> None:
    """199 of 200 is not 100 %, and 1 of 300 is not 0 %."""
    assert wording.percent(199 / 200) == "99\u00a0%"
    assert wording.percent(1 / 300) == "1\u00a0%"
    assert (wording.percent(1.0), wording.percent(None)) == ("100\u00a0%", "–")


def test_gaps_and_points() -> None:
    """Differences carry true signs; equal scores say 0; unknown ones say nothing."""
    assert [wording.gap(v, 7) for v in (9, 6.5, 7)] == ["+2", "−0.5", "0"]
    assert wording.gap(None, 7) == ""
    assert wording.points(-0.5, signed=True) == "−0.50"


def test_durations() -> None:
    """Seconds, minutes, hours."""
    assert [wording.duration(s) for s in (38.2, 141, 21900)] == ["38 s", "2 min 21 s", "6 h 05 min"]


def test_marked_differences() -> None:
    """Words that differ are marked, joined over spaces; wholly different texts are left alone."""
    parts = view.marked("The light is hard and cold today.", "The light is soft and warm today.")
    assert [text for text, differs in parts if differs] == ["hard", "cold"]
    assert "".join(text for text, _ in parts) == "The light is hard and cold today."
    parts = view.marked("A red barn by the old road.", "A green hut by the old road.")
    assert [text for text, differs in parts if differs] == ["red barn"]
    assert view.marked("Nothing alike here", "The sea, calm") == [("Nothing alike here", False)]


def test_several_advisors_have_no_name(finish) -> None:
    """One advisor is named, several are the advisors."""
    report = finish(2).report
    assert wording.advisor_name(report) == "Ansel"
    report["sample_results"][0]["advisor"] = "watkins"
    assert wording.advisor_name(report) == "the advisors"


def test_why_nothing_is_settled(finish) -> None:
    """An inconclusive verdict says why: too few photographs, too much scatter, or lost format."""
    few = finish(3).report
    assert few["evidence"]["verdict"] == "inconclusive"
    assert "fewer than 6 cannot settle it" in wording.lede(few)[0]
    scatter = finish(8, tuned=[critique(8 if i % 2 else 3 + i % 6) for i in range(8)]).report
    change = scatter["evidence"]["change"]
    change["score"]["state"] = "inconclusive"
    assert "vary too much" in wording.unsettled(change)
    change["score"]["state"] = "better"
    change["format"] |= {"state": "inconclusive", "mean": -0.05}
    assert "5 points less often" in wording.unsettled(change)


def test_the_verdict_is_a_sentence_with_its_evidence(finish) -> None:
    """Both errors, the difference with interval, effect size, p, and what could be found."""
    report = finish(12, tuned=[critique(3 + (i * 5) % 7) for i in range(12)]).report
    change = report["evidence"]["change"]["score"]
    _, said = wording.headline(report)
    for told in (
        f"{abs(change['mean']):.2f} {'less' if change['mean'] >= 0 else 'more'} (",
        "interval",
        f"effect size {change['effect_size']:.1f}".replace("-", "−"),
        f"minimum detectable effect {change['minimum_detectable_effect']:.2f}",
    ):
        assert told in said
    assert said.endswith(").")


@pytest.mark.parametrize(
    ("mean", "interval", "told"),
    [
        (1.2, [0.5, 1.9], "1.20 less (95\u00a0% interval 0.50 to 1.90)"),
        (-1.2, [-1.9, -0.5], "1.20 more (95\u00a0% interval 0.50 to 1.90)"),
        (0.2, [-0.1, 0.5], "interval of the gain −0.10 to +0.50, which includes none)"),
        (0.0, [0.0, 0.0], "0.00 less"),
        (None, None, ""),
    ],
)
def test_differences_in_words(mean, interval, told: str) -> None:
    """A gain, a loss, neither, and nothing that could be compared."""
    change = {"n": 9, "mean": mean, "interval": interval}
    evidence = {"n_photographs": 9, "change": {"score": change}}
    said = wording.difference(evidence)
    assert said.endswith(told)
    assert bool(said) == bool(told)
    if said:
        assert ", on the 9 that both scored" in wording.difference(evidence | {"n_photographs": 10})


def test_arms_have_names() -> None:
    """Known arms have words, others keep their name."""
    names = ("base_examples", "production_constrained", "prompt_example", "tuned_v3")
    told = ["Few-shot base", "Constrained production", "Prompt’s example", "Tuned v3"]
    assert [wording.label(name) for name in names] == told


def test_no_verdict_without_both(finish) -> None:
    """Where base or tuned failed the others are told, and what is missing."""
    report = finish(production=[critique(5)] * 8).report
    del report["evidence"]["arms"]["base"], report["evidence"]["change"]
    short, said = wording.headline(report)
    assert short == "No verdict without base."
    assert "tuned by 0.40 and production by" in said


def test_no_harm_is_not_claimed_of_answers_that_nobody_could_read(finish) -> None:
    """Two arms whose answers all were noise read "Fine-tuning did no harm"; an equal pair of
    readable ones still does."""
    noise = finish(base=["noise"] * 8, tuned=["other noise"] * 8).report
    assert noise["evidence"]["verdict"] == "no_worse"
    short, said = wording.headline(noise)
    assert short == "Nothing to compare."
    assert "the tuned and the base model gave no scores that could be read" in said
    equal = finish(base=[critique(5)] * 8, tuned=[critique(5)] * 8).report
    assert equal["evidence"]["verdict"] == "no_worse"
    assert wording.headline(equal)[0] == "Fine-tuning did no harm, and no proven good."


def test_seconds_in_a_column_have_equal_digits() -> None:
    """0.20 beside 0.26 once read 0.2, as if it were measured less finely."""
    assert [wording.seconds(value) for value in (0.0841, 0.2, 0.26, 0.995, 2.14, 41.2)] == [
        "0.084",
        "0.20",
        "0.26",
        "0.99",
        "2.1",
        "41",
    ]


def test_an_example_that_no_prompt_holds_is_not_said_to_be_in_it() -> None:
    """Where the prompts have none, the guess is the service's example, and it is called that."""
    assert wording.guess("prompt_example", {"n_prompts_with_example": 4}).endswith("in the prompt")
    assert wording.guess("prompt_example", {"n_prompts_with_example": 0}) == wording.OWN_EXAMPLE
    assert wording.guess("tuned", {}) == ""

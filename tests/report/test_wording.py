"""Numbers as people read them."""

from __future__ import annotations

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

"""Training data whose critiques have no scores: said everywhere, and nothing falls over."""

from __future__ import annotations

import html as escapes
import json
import re
from pathlib import Path

import pytest

from mondrian_ft.report import html, screen, tables

from .conftest import critique
from .test_schema import faults
from .test_screen import printed


def scoreless() -> str:
    """A critique in every other way."""
    value = json.loads(critique(5))
    del value["overall_score"]
    for dimension in value["dimensions"]:
        del dimension["score"]
    return json.dumps(value)


@pytest.mark.parametrize("reference", [scoreless(), "A lake, and a fine one."])
@pytest.mark.parametrize("base", [critique(8), "oops"], ids=["readable", "unreadable"])
@pytest.mark.parametrize("n", [1, 8])
def test_page_and_screen_say_it(finish, tmp_path: Path, reference: str, base: str, n: int) -> None:
    """One sentence instead of a score error; no sentence is about scores that are not there."""
    made = finish(n, base=[base] * n, references=[reference] * n, tuned_shuffled=[critique(4)] * n)
    evidence = made.report["evidence"]
    assert evidence["n_references_with_scores"] == 0
    assert evidence["verdict"] == "inconclusive"
    assert faults(made.report) == []
    tables.tables(made.report)

    where = "1 photograph" if n == 1 else f"{n} photographs"
    sentence = (
        f"The references on {where} hold no scores, so only the format of the answers can be "
        "compared."
    )
    page = html.write(made.report, made.log, made.facts, tmp_path / "report.html").read_text()
    text = escapes.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))
    shown = printed(screen.show_closing, made.report, adapter=None, page=tmp_path / "report.html")
    for told in (text, " ".join(shown.split())):
        assert "Not enough to tell." in told
        assert sentence in told
    assert (
        "The format alone can show that a model got worse, but not that it judges better." in text
    )
    assert "nothing here says whether the model judges as Ansel does" in text
    assert "gave scores for 0" not in text
    assert "set of scores" not in text
    assert "distance from Ansel’s own scores" not in text


def test_some_with_scores_are_no_reason_to_say_it(finish, tmp_path: Path) -> None:
    """Two of eight are compared, and the page says how many."""
    made = finish(8, references=[critique(5)] * 2 + [scoreless()] * 6)
    assert made.report["evidence"]["n_references_with_scores"] == 2
    page = html.write(made.report, made.log, made.facts, tmp_path / "report.html").read_text()
    assert "hold no scores" not in page
    assert "Scores could be compared in 2 of 8 tuned answers and 2 of 8 base answers." in page

"""What the detectors saw, and what could be seen at all, reaches the reader."""

from __future__ import annotations

import io
import json

from rich.console import Console

from mondrian_ft.report import html, measures, screen, wording

from .conftest import critique

GERMAN = "Das Licht ist zu hart und die Komposition wird durch den Himmel nicht sehr ruhig. " * 2


def german(score: float) -> str:
    """A critique whose words are German."""
    said = json.loads(critique(score)) | {"image_description": GERMAN}
    for dimension in said["dimensions"]:
        dimension |= {"comment": GERMAN, "recommendation": GERMAN + dimension["name"]}
    return json.dumps(said)


def test_why_a_better_does_not_count(finish) -> None:
    """Page and terminal say beside the verdict what forbids it, not that the scores vary."""
    finished = finish(12, tuned=[german(3.4 + i % 6) for i in range(12)])
    evidence = finished.report["evidence"]
    assert evidence["capped_by"] == ["other_language"]
    assert wording.headline(finished.report)[0] == "Not better, whatever the scores say."
    text = " ".join(wording.lede(finished.report))
    assert "12 of 12 answers are not in the references’ language" in text
    assert "vary too much" not in text
    page = html.write(finished.report, finished.log, finished.facts, finished.folder / "r.html")
    assert "not in the references’ language" in page.read_text(encoding="utf-8")
    file = io.StringIO()
    screen.show_closing(Console(file=file, width=80), finished.report)
    assert "It does not count as better: 12 of 12" in " ".join(file.getvalue().split())


def test_lesser_faults_stand_among_the_limits(finish) -> None:
    """A fault that leaves the verdict alone is told, once; without one nothing is."""
    thinking = [f"Okay, let me see. {critique(3.4 + i % 6)}" for i in range(12)]
    said = measures.limits(finish(12, tuned=thinking).report, "Ansel")
    assert sum("12 of 12 answers have thinking text" in text for text in said) == 1
    assert not any("The tuned model:" in text for text in measures.limits(finish().report, "Ansel"))


def test_what_could_be_found_is_said(finish) -> None:
    """The smallest difference that would be found stands in the report, if it can be told."""
    report = finish(12, tuned=[critique(3 + (i * 5) % 7) for i in range(12)]).report
    effect = report["evidence"]["change"]["score"]["minimum_detectable_effect"]
    assert f"{effect:.2f} points" in wording.detectable(report["evidence"])
    assert wording.detectable(report["evidence"]) in measures.limits(report, "Ansel")
    assert wording.detectable(finish(3).report["evidence"]) == ""


def test_the_table_has_spread_ranks_and_speed(finish) -> None:
    """The measures beside the score error have their columns; what nobody measured has none."""
    arms = finish().report["evidence"]["arms"]
    main, more = (
        measures.arms_table(arms, columns)["heads"] for columns in (measures.MAIN, measures.MORE)
    )
    assert {"Score error", "Correlation", "Seconds", "Tokens/s"} <= set(main)
    assert {"Kendall", "Spread", "Different advice"} <= set(more)
    assert "Memory, GB" not in main
    assert "First token" not in more

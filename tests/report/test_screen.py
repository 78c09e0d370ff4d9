"""The terminal: complete and readable at 80 columns, without colour, and in ASCII."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mondrian_ft.data.reasons import Reason
from mondrian_ft.report import screen

LINKED = {
    "rows": 9,
    "linked": 4,
    "mended": [{"job_id": "e", "mends": ["a score"]}],
    "left_out": [
        {"job_id": "a7569241-2edd-44be", "reason": "no_json", "detail": "It says [bold]hm[/bold]."},
        {"job_id": "b", "reason": "other_advisor", "detail": "Ünïcode name " + "x" * 200},
        {"job_id": "c", "reason": "other_advisor", "detail": ""},
        {"job_id": None, "reason": "photograph_missing", "detail": "photo.jpg is not there."},
        {"job_id": "e", "reason": "a_later_reason", "detail": "new"},
    ],
}


def printed(show, *arguments, width: int = 80, encoding: str = "utf-8", **named) -> str:
    """What a dumb terminal of that width and encoding gets."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show(Console(file=file, width=width, no_color=True, highlight=False), *arguments, **named)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_every_reason_has_words() -> None:
    """The closed list of reasons and their words are the same list."""
    assert set(screen.REASONS) == {reason.value for reason in Reason}


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"accept": "mended", "mended": []}, ""),
        ({"accept": "mended"}, "data.accept=mended keeps mended rows; the manifest says what was"),
        (
            {"accept": "strict", "reasons": {"needs_mending": 2}},
            "left out 2 rows that need mending",
        ),
        (
            {"accept": "strict", "reasons": {"needs_mending": 1}},
            "left out 1 row that needs mending",
        ),
        ({"accept": "all", "incomplete": [{}]}, "data.accept=all linked 1 row that lacks a text."),
    ],
)
def test_how_strict_linking_was_is_said(facts: dict, sentence: str) -> None:
    """What the default let pass, or a stricter one kept out, is a sentence of its own."""
    told = screen.accepted({**LINKED, **facts})
    assert sentence in told
    assert bool(told) == bool(sentence)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_link_table(width: int) -> None:
    """Counts, reasons and an example; narrow screens lose the example, never a reason."""
    text = printed(screen.show_link, LINKED, Path("/x/" + "y" * 90), width=width)
    assert "Linked 4 of 9 rows, 1 of them mended." in text
    assert "  2  by another advisor" in text
    assert "a later reason" in text
    assert "/x/" + "y" * 90 in text
    assert all(len(line) <= width for line in text.splitlines() if "/x/" not in line)
    assert ("[bold]hm[/bold]" in text) == (width >= 80)


def test_nothing_left_out() -> None:
    """A clean database prints one line and no empty table."""
    assert printed(screen.show_link, {"rows": 1, "linked": 1, "left_out": []}) == (
        "Linked 1 of 1 row.\n"
    )


def test_closing_screen(finish) -> None:
    """The verdict, every arm's numbers, the targets, and paths and commands that can be copied."""
    report = finish(tuned_shuffled=["unreadable"] * 8).report
    adapter = Path("/photographs of mine/outputs/" + "z" * 80) / "adapter"
    command = "python -m mondrian_ft task=evaluate " + "k" * 90
    text = printed(
        screen.show_closing,
        report,
        adapter=adapter,
        page=Path("r.html"),
        commands=[("again", command)],
    )
    assert text.splitlines()[1] == "Fine-tuning helped."
    for told in ("base", "tuned", "constant guess", "overall", "interval", "met:", command):
        assert told in text
    assert f"'{adapter}'" in text
    assert "report   r.html" in text


def test_ascii_terminals(finish) -> None:
    """A terminal that knows only ASCII gets everything, and no encoding error."""
    report = finish(tuned=["oops"] * 8).report
    assert "missed:" in printed(screen.show_closing, report, encoding="ascii")
    assert "?n?code" in printed(screen.show_link, LINKED, encoding="ascii")


def test_base_alone(finish) -> None:
    """One arm alone has a table without targets that it cannot have."""
    report = finish().report
    del report["evidence"]["arms"]["tuned"]
    report["evidence"]["criteria"] = []
    text = printed(screen.show_closing, report)
    assert "Base, measured alone." in text
    assert "met:" not in text


def test_many_arms_fit_eighty_columns(many) -> None:
    """Each arm has its line with interval, trivial ones too; the failed one has its reason."""
    text = printed(screen.show_closing, many.report, encoding="ascii")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    started = {line.split("  ")[0]: line for line in lines if line}
    for arm in many.report["evidence"]["arms"]:
        name = "constant guess" if arm == "mean_score" else arm.replace("_", " ")
        assert re.search(r"\d\.\d\d to \d\.\d\d", started[name])
    told = " ".join(text.split())
    for words in (
        "Constrained production could not be evaluated: its adapter is of <another> base.",
        "Against production: better: the score error fell by 0.61 points.",
        "Tuned, held to the schema: 3 of 8 answers differ",
        "effect size",
        "minimum detectable effect",
    ):
        assert words in told
    assert "?" not in text


def test_near_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are printed as one would type them from here."""
    monkeypatch.chdir(tmp_path)
    assert screen.near(tmp_path / "a b" / "c") == "'a b/c'"
    assert screen.near("/elsewhere/c") == "/elsewhere/c"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_count_is_a_bar_in_a_terminal_and_nothing_in_a_file(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    with screen.counting(console, "checking photographs") as progress:
        progress(1, 3)
        progress(3, 3)
    assert ("checking photographs" in stream.getvalue()) is terminal
    assert ("3/3" in stream.getvalue()) is terminal


def test_a_format_that_keeps_the_verdict_down_is_named() -> None:
    """Scores 1.8 points nearer and "Not enough to tell" once stood together without a reason."""
    from mondrian_ft.report import wording

    form = {"mean": -0.03, "margin": 0.02, "state": "inconclusive"}
    change = {"score": {"state": "better"}, "format": form}
    told = wording.format_change({"change": change})
    assert "fell by 3 points, and no more than 2 may be lost" in told
    for other in ({**form, "state": "no_worse"}, {**form, "mean": 0.03}, {**form, "mean": 0.0}):
        assert wording.format_change({"change": {**change, "format": other}}) == ""
    score = {"state": "inconclusive"}
    assert wording.format_change({"change": {"score": score, "format": form}}) == ""

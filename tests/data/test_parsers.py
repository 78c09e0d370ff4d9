"""Parsers: one per stored shape, one critique out of all of them, and no error but their own."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mondrian_ft.data.critique import DIMENSIONS, CritiqueError, Flaw, render, validate
from mondrian_ft.data.parsers import MAX_CHARACTERS, Reading, failure, read_analysis
from mondrian_ft.data.parsers.dimensional import profile_text
from mondrian_ft.data.parsers.outputs import unwrap
from mondrian_ft.data.reasons import Reason

from .shapes import SHAPES, cards, dimensional, markdown, thinking
from .world import SHARED, critique, fenced

NAMES = (*DIMENSIONS, "Subject Isolation", "Subject Matter")
# Words as people write them; what looks like markup or a label belongs to the shape, not the text.
WORD = st.text("abcdefghijklmnopqrstuvwxyzéäø日本,;'!?%", min_size=1, max_size=9)
WORDS = st.lists(WORD, min_size=2, max_size=8).map(" ".join)
SCORE = st.integers(0, 10) | st.integers(0, 100).map(lambda tenths: tenths / 10)


@st.composite
def critiques(draw: st.DrawFn) -> dict[str, Any]:
    """Valid critiques of every era: five to nine dimensions in any order."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(5, 9))]
    return {
        "image_description": draw(WORDS),
        "dimensions": [
            {
                "name": name,
                "score": draw(SCORE),
                "comment": draw(WORDS),
                "recommendation": draw(WORDS),
            }
            for name in names
        ],
        "overall_score": draw(SCORE),
        "key_strengths": draw(st.lists(WORDS, max_size=3)),
        "priority_improvements": draw(st.lists(WORDS, max_size=3)),
        "technical_notes": draw(WORDS),
    }


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(value=critiques())
def test_a_valid_critique_survives_every_shape(shape: str, value: dict[str, Any]) -> None:
    """Written in any shape and read back it is the same, to the letter."""
    wanted = validate(value)
    reading = read_analysis(SHAPES[shape](value))
    assert reading.parsed.critique == wanted
    assert reading.parser == shape
    # Another shape than the schema's is a mend in itself, so that nothing is taken for exact.
    assert reading.parsed.mends
    assert read_analysis(render(wanted)) == Reading(type(reading.parsed)(wanted, []), "json")


PIECES = st.sampled_from(
    [
        *(
            '{"dimensions":',
            '{"dimensional_analysis":{',
            '"overall_grade":',
            "[",
            "]",
            "{",
            "}",
            ",",
        ),
        *(
            "```json\n",
            "```",
            "\n## Full Analysis\n",
            "### Composition (8/10)\n",
            "<h3>Composition",
        ),
        *(
            '<span class="dimension-score">(8/10)</span></h3>',
            "<p>",
            "<b>",
            "</div>",
            "<div>",
            "<!--",
        ),
        *("Recommendation:", "\x00", "\ud800", "<thought>", "9" * 400, "NaN", "1e999", "null", '"'),
        *(
            '{"dimensional_profile":{"composition_score":10}}',
            "Overall: ",
            "/10",
            "- ",
            "**",
            "\\u",
        ),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=200) | st.lists(PIECES | st.text(max_size=9), max_size=30).map("".join)
)
@example('{"dimensional_analysis":' + "[" * 100_000)
@example("<div>" * 20_000 + "<h3>Composition (8/10)</h3>")
@example("<b>x" * 20_000)
@example("## Full Analysis\n" + "**" * 20_000)
@example("### " + "(" * 20_000 + "/10")
@example('{"dimensional_analysis": {"a": {"name": 1}}, "overall_grade": []}')
@example("{" * 50_000)
def test_no_text_makes_a_parser_raise_anything_but_its_own_error(text: str) -> None:
    """Whatever a model, a service or a disk left there: a critique, or a reason in a sentence."""
    for partial in (False, True):
        try:
            assert read_analysis(text, partial=partial).parsed.critique.dimensions
        except CritiqueError as error:
            Reason(error.reason.value)
    unwrap(text, lambda key: True)


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dimensional_analysis", "dimensional_profile", "overall_grade"])
                | st.sampled_from(
                    ["dimensions", "name", "score", "scroe", "comment", "composition"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_makes_a_parser_raise_anything_but_its_own_error(value: Any) -> None:
    """Well-formed JSON of the wrong kinds, wherever a kind is expected."""
    with suppress(CritiqueError):
        read_analysis(json.dumps(value), partial=True)


def test_no_text_takes_long() -> None:
    """A runaway text is refused by its length, and one within it is read in a moment."""
    start = time.process_time()
    for piece in ("<b>x", "{", '{"a":"', "## a (8/10)\n", "**a", "Recommendation: ", "<p>1/10"):
        text = (piece * 200_000)[:200_000]
        for begin in ("", "<div>", "## Full Analysis\n"):
            with suppress(CritiqueError):
                read_analysis(begin + text)
    assert time.process_time() - start < 15
    with pytest.raises(CritiqueError) as caught:
        read_analysis("x" * (MAX_CHARACTERS + 1))
    assert caught.value.reason is Flaw.ANALYSIS_TOO_LONG


def test_what_a_shape_does_not_say_is_missing_and_not_invented() -> None:
    """Cards without an overall score have none, and cannot be used; lacking texts are named."""
    value = critique(8)
    page = cards(value).replace("<h2>Overall Score: 8/10</h2>", "")
    with pytest.raises(CritiqueError, match="overall_score is missing"):
        read_analysis(page, partial=True)
    lacking = markdown(value).partition("## Key Strengths")[0].replace("**Recommendation:**", "And")
    with pytest.raises(CritiqueError) as caught:
        read_analysis(lacking)
    assert caught.value.reason is Flaw.INCOMPLETE
    read = read_analysis(lacking, partial=True).parsed.critique
    lists = ["key_strengths", "priority_improvements", "technical_notes"]
    assert read.missing() == lists + [f"dimensions[{i}].recommendation" for i in range(7)]


def test_an_empty_text_is_a_value() -> None:
    """An empty list of strengths, and an empty recommendation, are what was said."""
    value = critique(8, key_strengths=[])
    value["dimensions"][0]["recommendation"] = ""
    for write in (cards, markdown, dimensional, thinking):
        read = read_analysis(write(value)).parsed.critique
        assert read == validate(value)
        assert read.missing() == []


@pytest.mark.parametrize("grade", ["A-", "excellent", "", None, [], "nine"])
def test_a_grade_that_is_no_number_is_refused(grade: Any) -> None:
    """No table says what an A- is worth, so none is made up."""
    text = json.dumps({**json.loads(dimensional(critique())), "overall_grade": grade})
    with pytest.raises(CritiqueError) as caught:
        read_analysis(text)
    assert caught.value.reason is Flaw.SCORE_NOT_A_NUMBER


def test_a_profile_gives_scores_and_comments_and_a_placeholder_is_refused() -> None:
    """A row of dimensional_profiles: NULL is missing, '' is a value, all tens are no judgement."""
    row = {
        "advisor_id": "ansel",
        "composition_score": 8.0,
        "focus_sharpness_score": 6.5,
        "composition_comment": "",
        "focus_sharpness_comment": None,
        "overall_grade": "7.2",
        "image_description": "A ridge.",
    }
    reading = read_analysis(profile_text(row), partial=True)
    assert reading.parser == "dimensional"
    critique = reading.parsed.critique
    assert critique.scores() == {"Composition": 8.0, "Focus & Sharpness": 6.5}
    assert critique.overall_score == 7.2
    assert "dimensions[0].comment" not in critique.missing()
    assert "dimensions[1].comment" in critique.missing()
    tens = {**row, "composition_score": 10, "focus_sharpness_score": 10, "overall_grade": "7.4"}
    with pytest.raises(CritiqueError, match="placeholder"):
        read_analysis(profile_text(tens), partial=True)


def test_llm_outputs_in_its_three_shapes() -> None:
    """The raw answer, the page, the page with its mode; another advisor's is not ours."""
    mine = "ansel".__eq__
    assert unwrap('{"ansel": "<p>"}', mine) == {"llm_outputs.html": "<p>"}
    page = '{"ansel": {"html": "<p>", "mode_used": "rag"}, "watkins": "<b>"}'
    assert unwrap(page, mine) == {"llm_outputs.html": "<p>"}
    raw = json.dumps({"prompt": "p", "response": "{}", "summary": "s", "model": "m"})
    assert unwrap(raw, mine) == {"llm_outputs.response": "{}"}
    for other in ("", "{", "[]", "null", '{"watkins": "<p>"}', '{"ansel": 1}', "[" * 100_000):
        assert unwrap(other, mine) == {}


@pytest.mark.parametrize(
    "text",
    [
        "Failed to parse model response",
        "Cannot connect to AI service on port 5100",
        "<!doctype html><title>500 Internal Server Error</title><h1>Internal Server Error</h1>",
        "Error 503: Service Unavailable",
    ],
)
def test_an_error_page_is_no_analysis(text: str) -> None:
    """A job can be done and hold nothing: finished means finished in substance."""
    with pytest.raises(CritiqueError) as caught:
        read_analysis(text)
    assert caught.value.reason is Flaw.ANALYSIS_FAILED


def test_a_critique_may_speak_of_failure() -> None:
    for write in (cards, markdown, dimensional, thinking, fenced):
        assert (
            failure(write(critique(image_description="A service unavailable: failed to parse.")))
            is None
        )


VERDICTS: list[tuple[str, str, str]] = [
    ("1135eb17", "wrong_shape", "echoes a prompt, then answers with five keys of its own"),
    ("5ee8f82c", "valid", "bare JSON, every key, seven dimensions"),
    ("70f87cb2", "valid", "complete, though its last texts ramble: the audit's matter"),
    ("1e7c2233", "valid", "bare JSON, every key"),
    ("09e43ad9", "valid", "bare JSON, every key"),
    ("7cf6df23", "valid", "bare JSON, every key"),
    ("4b141477", "valid", "bare JSON, every key"),
    ("35522dd8", "valid", "bare JSON, every key"),
    ("31ecebee", "valid", "bare JSON, every key"),
    ("fef718f3", "broken_json", "loops on **peace** in a text that never ends; no overall score"),
    ("44f9887c", "broken_json", "misspelled keys, null scores, and an object without a value"),
    ("d1d89592", "wrong_shape", "a description, then an object per invented key; no dimensions"),
    ("3880d8dc", "wrong_shape", "thinking text; what JSON there is holds no dimensions"),
    ("6f002b56", "broken_json", "thinking text around a sketch of JSON, cut off in prose"),
    ("5329bbff", "incomplete", "thinking; a first try with two dimensions, no overall; then cut"),
    ("7c4508c8", "no_json", "a thought that turns into word salad up to the token limit"),
    ("279c847d", "valid", "complete; its Chinese texts are the audit's matter"),
]
"""Each real answer's id, the verdict a person gave it, and why. None is only in need of mending:
what these models get wrong is the whole answer, not a comma."""


@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs the shared real pieces")
def test_the_verdicts_on_the_real_answers_are_those_of_a_person() -> None:
    lines = (SHARED / "real" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for entry in map(json.loads, lines):
        try:
            reading = read_analysis(entry["response"])
            verdict = "mended" if reading.parsed.mends else "valid"
        except CritiqueError as error:
            verdict = error.reason.value
            with pytest.raises(CritiqueError):
                # Nor is any of them whole but for its texts.
                read_analysis(entry["response"], partial=True)
        found.append((entry["id"][:8], verdict))
    assert found == [(job, verdict) for job, verdict, _ in VERDICTS]

"""The critique: one schema, a tolerant reader, a strict check, one way to write it."""

import json
import random
from typing import Any

import pytest

from mondrian_ft.data.critique import (
    DIMENSIONS,
    CritiqueError,
    Flaw,
    parse_analysis,
    rename_dimensions,
    render,
    strict_format_error,
    validate,
)
from mondrian_ft.data.reasons import Reason

from .world import SHARED, critique, fenced


def first(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``value`` with its first dimension changed."""
    head, *tail = value["dimensions"]
    return {**value, "dimensions": [{**head, **changes}, *tail]}


@pytest.mark.parametrize("write", [json.dumps, fenced], ids=["bare", "fenced"])
def test_a_clean_analysis_is_read_without_a_mend(write):
    """Fenced and bare JSON are the same analysis."""
    parsed = parse_analysis(write(critique(7)))
    assert parsed.mends == []
    assert parsed.critique.scores() == dict.fromkeys(DIMENSIONS, 7.0)


def test_render_round_trips_on_one_line():
    """The canonical answer is read back as the same critique, and is itself strictly valid."""
    draw = random.Random(0)
    for _ in range(50):
        score = draw.choice([0, 10, 7, 7.0, round(draw.uniform(0, 10), 2)])
        value = critique(score, technical_notes='é "quoted"\n{brace} ```json 图')
        text = render(parse_analysis(json.dumps(value)).critique)
        assert "\n" not in text
        assert parse_analysis(text).critique == parse_analysis(json.dumps(value)).critique
        assert parse_analysis(text).mends == []
        assert strict_format_error(text, DIMENSIONS) is None
        assert json.loads(text) == value
        assert list(json.loads(text)) == list(value)


def test_whole_scores_are_written_as_integers():
    """One spelling of a score means one training target."""
    text = render(parse_analysis(json.dumps(critique(8.0))).critique)
    assert '"score":8,' in text
    assert "8.0" not in text


@pytest.mark.parametrize("written", ["8", " 8 ", "8/10", "8.0 / 10"])
def test_scores_written_as_text_are_mended_and_listed(written):
    """A repair is made only where it cannot change the meaning, and never in silence."""
    value = first(critique(7, overall_score=written), score=written)
    parsed = parse_analysis(json.dumps(value))
    assert parsed.critique.overall_score == 8
    assert parsed.critique.dimensions[0].score == 8
    assert len(parsed.mends) == 2
    assert "overall_score" in parsed.mends[0]


def test_surrounding_text_a_repeated_block_and_extra_keys_are_mended_and_listed():
    """Thinking before the answer, the same block twice, and a surplus key are named."""
    block = fenced({**critique(), "mood": "calm"})
    parsed = parse_analysis(f"Okay, let me {{think}}.\n{block}\n{block}")
    assert len(parsed.mends) == 3
    assert any("mood" in mend for mend in parsed.mends)


BAD: list[tuple[str, Flaw]] = [
    ("", Flaw.NO_JSON),
    ("Failed to parse model response", Flaw.NO_JSON),
    ("<h1>HTTP 500</h1>", Flaw.NO_JSON),
    (json.dumps({k: v for k, v in critique().items() if k != "technical_notes"}), Flaw.INCOMPLETE),
    (json.dumps({k: v for k, v in critique().items() if k != "overall_score"}), Flaw.INCOMPLETE),
    (json.dumps(critique())[:-40], Flaw.BROKEN_JSON),
    ('{"image_description": "a", "image_description": "b"}', Flaw.BROKEN_JSON),
    ('{"image_description":' * 100_000, Flaw.BROKEN_JSON),
    (fenced(critique(7)) + "\n" + fenced(critique(6)), Flaw.TWO_JSON_BLOCKS),
    (json.dumps(critique(7)) + "\n" + json.dumps(critique(6)), Flaw.TWO_JSON_BLOCKS),
    (fenced(critique(7)) + "\n" + fenced({"a": 1}), Flaw.TWO_JSON_BLOCKS),
    ('{"composition": "fine"}', Flaw.WRONG_SHAPE),
    (json.dumps(critique(dimensions={})), Flaw.WRONG_SHAPE),
    (json.dumps(critique(dimensions=[])), Flaw.WRONG_SHAPE),
    (json.dumps(critique(dimensions=["Composition"])), Flaw.WRONG_SHAPE),
    (json.dumps(critique(key_strengths="Light")), Flaw.WRONG_SHAPE),
    (json.dumps(first(critique(), name="Lighting")), Flaw.WRONG_SHAPE),
    (json.dumps(first(critique(), comment="\ud800")), Flaw.WRONG_SHAPE),
    (json.dumps({k: v for k, v in critique().items() if k != "dimensions"}), Flaw.WRONG_SHAPE),
    (json.dumps(first(critique(), name=" ")), Flaw.EMPTY_TEXT),
    (json.dumps(critique(overall_score="A-")), Flaw.SCORE_NOT_A_NUMBER),
    (json.dumps(critique(overall_score=float("nan"))), Flaw.SCORE_NOT_A_NUMBER),
    (json.dumps(first(critique(), score=float("nan"))), Flaw.SCORE_NOT_A_NUMBER),
    (json.dumps(first(critique(), score=True)), Flaw.SCORE_NOT_A_NUMBER),
    (json.dumps(first(critique(), score=None)), Flaw.SCORE_NOT_A_NUMBER),
    (json.dumps(first(critique(), score=float("inf"))), Flaw.SCORE_OUT_OF_RANGE),
    (json.dumps(first(critique(), score=85)), Flaw.SCORE_OUT_OF_RANGE),
    (json.dumps(first(critique(), score="85")), Flaw.SCORE_OUT_OF_RANGE),
    (json.dumps(first(critique(), score="-1/10")), Flaw.SCORE_OUT_OF_RANGE),
    (json.dumps(critique(overall_score=10.01)), Flaw.SCORE_OUT_OF_RANGE),
]


@pytest.mark.parametrize(("text", "flaw"), BAD)
def test_a_malformed_analysis_has_a_reason_and_a_sentence(text, flaw):
    """Every way in which labels go wrong has its own code and a sentence for a person."""
    with pytest.raises(CritiqueError) as caught:
        parse_analysis(text)
    assert caught.value.reason is flaw
    assert str(caught.value).rstrip(")").endswith(".")
    assert len(str(caught.value)) < 250
    assert Reason(flaw.value)
    assert strict_format_error(text) is not None


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (critique(technical_notes=""), "technical_notes"),
        (first(critique(), comment=" "), "dimensions[0].comment"),
        (critique(key_strengths=["Light", ""]), "key_strengths[1]"),
    ],
)
def test_a_blank_text_is_a_value_in_a_label_and_breaks_the_format_of_an_output(value, where):
    """What was said is read as it was said; what is asked of the model is a text."""
    parsed = parse_analysis(json.dumps(value))
    assert parsed.mends == []
    assert parsed.critique.blank() == [where]
    assert json.loads(render(parsed.critique)) == value
    assert strict_format_error(json.dumps(value)) == f"{where} is blank."


def test_a_missing_text_stays_missing():
    """Nothing is invented: neither in the critique nor in what is written of it."""
    value = first(critique(), comment="")
    del value["technical_notes"], value["dimensions"][0]["recommendation"]
    parsed = parse_analysis(json.dumps(value), partial=True)
    assert parsed.critique.missing() == ["technical_notes", "dimensions[0].recommendation"]
    assert json.loads(render(parsed.critique)) == value
    assert parse_analysis(render(parsed.critique), partial=True).critique.missing()


def test_keys_that_are_a_letter_off_are_read_and_listed():
    """`dimsions` and `scroe` occur in real answers; two keys as near as each other are refused."""
    value = critique()
    value["dimsions"] = value.pop("dimensions")
    value["dimsions"][0]["scroe"] = value["dimsions"][0].pop("score")
    parsed = parse_analysis(json.dumps(value))
    assert parsed.critique == parse_analysis(json.dumps(critique())).critique
    assert parsed.mends == [
        'the key "dimsions" was read as dimensions',
        'the key dimensions[0]."scroe" was read as score',
    ]
    with pytest.raises(CritiqueError):
        parse_analysis(json.dumps({**value, "dimensons": value["dimsions"]}))


@pytest.mark.parametrize(
    "text",
    [
        fenced(critique()),
        "Here it is: " + json.dumps(critique()),
        json.dumps([critique()]),
        json.dumps(critique(overall_score="8")),
        json.dumps({**critique(), "mood": "calm"}),
        json.dumps(critique(overall_score=float("nan"))),
        json.dumps(critique())[:-1] + ', "overall_score": 3}',
    ],
)
def test_what_is_mended_in_a_label_breaks_the_format_of_an_output(text):
    """Format compliance is strict: bare JSON, exact keys and types."""
    assert strict_format_error(text) is not None


def test_dimension_names_are_part_of_the_format_when_given():
    """Order is free; a missing, foreign or renamed dimension is not."""
    value = critique()
    assert strict_format_error(json.dumps(value)) is None
    turned = {**value, "dimensions": value["dimensions"][::-1]}
    assert strict_format_error(json.dumps(turned), DIMENSIONS) is None
    fewer = {**value, "dimensions": value["dimensions"][1:]}
    assert strict_format_error(json.dumps(fewer)) is None
    assert "Composition" in str(strict_format_error(json.dumps(fewer), DIMENSIONS))


@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs the shared real pieces")
def test_real_files_and_responses():
    """Real analysis files are clean; of 17 raw answers, 9 keep the format and 8 have a reason."""
    for path in (SHARED / "real" / "analysis_md").glob("*.md"):
        assert parse_analysis(path.read_text(encoding="utf-8")).mends == []
    lines = (SHARED / "real" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    good, reasons = 0, []
    for line in lines:
        text = json.loads(line)["response"]
        try:
            parsed = parse_analysis(text)
        except CritiqueError as error:
            reasons.append(error.reason)
            assert strict_format_error(text)
        else:
            good += 1
            assert parse_analysis(render(parsed.critique)).critique == parsed.critique
    assert (good, len(reasons), len(lines)) == (9, 8, 17)


def test_dimensions_get_the_names_they_are_told_to_have():
    """Other eras' names become today's; what is left out is gone, and nothing else changes."""
    value = critique(7)
    value["dimensions"][0]["name"] = "Framing"
    value["dimensions"].append({"name": "Subject Matter", "score": 3})
    read = validate(value, partial=True)
    names: dict[str, str | None] = {" framing": "Composition", "Subject Matter": None, "Mood": "X"}
    renamed, met = rename_dimensions(read, names)
    assert met == [" framing", "Subject Matter"]
    assert renamed == validate(critique(7))
    assert renamed.missing() == []
    assert rename_dimensions(read, {}) == (read, [])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"Lighting": "Composition"}, "would be called Composition"),
        (dict.fromkeys(DIMENSIONS), "none of its dimensions would be left"),
    ],
)
def test_names_that_cannot_be_given_are_refused(names, told):
    with pytest.raises(CritiqueError, match=told):
        rename_dimensions(validate(critique(7)), names)

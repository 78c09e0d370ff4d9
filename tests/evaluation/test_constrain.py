"""Decoding under the schema: always a valid critique, and nothing else about the answer changes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.critique import Critique, parse_analysis, render, strict_format_error
from mondrian_ft.errors import ModelError
from mondrian_ft.evaluation.constrain import Constraint, Lengths, critique_schema
from mondrian_ft.evaluation.generate import generate

from .critiques import answer
from .test_generate import answers, requests

NAMES = ("Composition", "Focus & Sharpness", "Tiefe „Ä“")
SHORT = Lengths(
    image_description=24, comment=16, recommendation=16, technical_notes=12, entry=10, entries=2
)


def accepts(constraint: Constraint, base: Any, text: str) -> bool:
    """Whether a text, as the tokenizer cuts it, is allowed to its end."""
    matching = constraint.start(1)
    for token in base.answer_tokens(text):
        bits = matching.allowed([0]).view(np.uint32)[0]
        if not bits[token // 32] >> (token % 32) & 1:
            return False
        matching.consume(0, token)
    return True


def critique(
    score: str = "8",
    overall: str = "7.3",
    description: str = "A lake.",
    strengths: str = '["light"]',
) -> str:
    dimensions = ",".join(
        f'{{"name":"{name}","score":{score},"comment":"Seen.","recommendation":"Mind it."}}'
        for name in NAMES
    )
    return (
        f'{{"image_description":"{description}","dimensions":[{dimensions}],"overall_score":{overall},'
        f'"key_strengths":{strengths},"priority_improvements":[],"technical_notes":"None."}}'
    )


@pytest.mark.parametrize("decimals", [False, True])
def test_a_model_that_knows_nothing_answers_in_the_format(lab, base, decimals) -> None:
    """Random weights: free, never a critique; under the schema, always one, with these names."""
    lab.attach(base)
    some = requests(lab, base, 6, ("Judge it.", "Judge this photograph at length, please.", "?"))
    free = generate(base, some, max_tokens=60, batch_size=4)
    assert all(strict_format_error(one.text) for one in free)
    constraint = Constraint.critique(base, NAMES, decimals=decimals, lengths=SHORT)
    found = generate(base, some, max_tokens=700, batch_size=4, constraint=constraint)
    for one in found:
        assert one.finished
        assert strict_format_error(one.text, NAMES) is None
        value = parse_analysis(one.text).critique
        assert [dimension.name for dimension in value.dimensions] == list(NAMES)
        assert all(len(dimension.comment) <= 16 for dimension in value.dimensions)
        # The canonical spelling, but for a score such as 8.0.
        assert render(value) == one.text.replace(".0,", ",")
    assert len({one.text for one in found}) > 1
    alone = generate(base, some, max_tokens=700, batch_size=1, constraint=constraint)
    assert [one.text for one in alone] == [one.text for one in found]


def test_drawn_answers_keep_to_it_too(lab, base) -> None:
    """At a high temperature, where nearly any token may be drawn."""
    constraint = Constraint.critique(base, NAMES[:1], lengths=SHORT)
    some = requests(lab, base, 4)
    found = generate(
        base, some, max_tokens=500, batch_size=4, constraint=constraint, temperature=3.0, seed=5
    )
    assert all(strict_format_error(one.text, NAMES[:1]) is None for one in found)


def test_what_is_allowed_anyway_is_left_alone(lab, base) -> None:
    """A schema that permits whatever the model says changes no token; nothing is penalised."""
    some = requests(lab, base, 5)
    free = answers(base, some, max_tokens=30)

    class Anything:
        """A constraint in shape only."""

        def start(self, rows: int) -> Any:
            return self

        def allowed(self, rows: list[int]) -> np.ndarray:
            return np.full((len(rows), 32), -1, np.int32)

        def consume(self, row: int, token: int) -> None: ...

    assert answers(base, some, max_tokens=30, constraint=Anything()) == free


@pytest.mark.parametrize(
    ("text", "whole", "decimal"),
    [
        (critique(), True, True),
        (critique(score="0"), True, True),
        (critique(score="10"), True, True),
        (critique(score="7.5"), False, True),
        (critique(overall="10"), True, True),
        (critique(overall="7.25"), False, False),
        (critique(overall="10.1"), False, False),
        (critique(score="11"), False, False),
        (critique(score="10.5"), False, False),
        (critique(score="-1"), False, False),
        (critique(score='"8"'), False, False),
        (critique(description='Say \\"x\\"\\n, „Ä“ 漢'), True, True),
        (critique(description=""), False, False),
        (critique(description="  "), False, False),
        (critique(description="\\ud800"), False, False),
        (critique(description="a" * 24), True, True),
        (critique(description="a" * 25), False, False),
        (critique(strengths="[]"), True, True),
        (critique(strengths='["a","b","c"]'), False, False),
        (critique(strengths='[ "a"]'), False, False),
        (critique()[:-1] + ',"more":1}', False, False),
        (critique()[:-1], False, False),
        ("```json" + critique(), False, False),
    ],
)
def test_the_schema_says_what_the_strict_check_says(base, text, whole, decimal) -> None:
    """Allowed is what the check lets pass, within the lengths and in the canonical spelling."""
    for decimals, expected in ((False, whole), (True, decimal)):
        constraint = Constraint.critique(base, NAMES, decimals=decimals, lengths=SHORT)
        assert accepts(constraint, base, text) is expected
    if whole:
        assert strict_format_error(text, NAMES) is None


def test_the_order_of_keys_is_the_one_that_is_taught(base) -> None:
    """Another order would be JSON as well; the scores would then come before the words."""
    value = json.loads(critique())
    turned = dict(reversed(value.items()))
    constraint = Constraint.critique(base, NAMES, lengths=SHORT)
    assert strict_format_error(json.dumps(turned), NAMES) is None
    assert not accepts(constraint, base, json.dumps(turned, separators=(",", ":")))
    schema = critique_schema(NAMES)
    assert list(schema["properties"]) == list(Critique.model_fields)


def test_lengths_follow_the_references(base) -> None:
    """Every reference, and one half longer, is within the lengths taken from them."""
    references = [parse_analysis(answer(3, 9)).critique, parse_analysis(answer(5, 5)).critique]
    lengths = Lengths.of(references)
    assert lengths.image_description == 48
    assert lengths.entries == 2
    constraint = Constraint.critique(base, ("Composition", "Lighting"), lengths=lengths)
    assert all(accepts(constraint, base, render(one)) for one in references)


def test_what_cannot_be_a_schema_is_refused(base) -> None:
    """No names, a name twice, or what llguidance does not know."""
    with pytest.raises(ModelError, match="different names"):
        critique_schema([])
    with pytest.raises(ModelError, match="different names"):
        critique_schema(["Light", "Light"])
    with pytest.raises(ModelError, match="cannot be compiled"):
        Constraint(base, {"type": "string", "pattern": "(?=x)x"})


def test_a_token_that_is_not_allowed_is_an_error(base) -> None:
    """It cannot come from our decoding; if it does, the answer is not passed on as valid."""
    matching = Constraint.critique(base, NAMES).start(1)
    with pytest.raises(ModelError, match="under the schema failed"):
        matching.consume(0, base.answer_tokens("x")[0])

"""The filled example in a prompt: told from placeholders, read, and taken out."""

from __future__ import annotations

import json

import pytest

from mondrian_ft.data.audit.entries import Entry, entries_of_rows
from mondrian_ft.data.audit.labels import template_scores
from mondrian_ft.data.audit.language import is_english
from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.data.example import KNOWN_OVERALL, KNOWN_VECTOR, filled_example, strip_example
from mondrian_ft.data.rows import Row

from .world import World, critique

FILLED = "Reply like this:\n" + json.dumps(
    {
        "dimensions": [
            {"name": name, "score": score, "comment": "…"}
            for name, score in zip(DIMENSIONS, KNOWN_VECTOR, strict=True)
        ],
        "overall_score": KNOWN_OVERALL,
    },
    indent=2,
)
CARDS = "\n".join(
    f'<h3>{name} <span class="dimension-score">({score}/10)</span></h3>'
    for name, score in (("Composition", 8), ("Lighting", 3), ("Mood", 5))
)


def test_the_services_own_example() -> None:
    """Names, scores and the overall score are read off the filled example."""
    example = filled_example(FILLED)
    assert example is not None
    assert example.scores == KNOWN_VECTOR
    assert example.names == DIMENSIONS
    assert example.overall == KNOWN_OVERALL


def test_html_cards() -> None:
    """The older prompts show HTML cards."""
    example = filled_example(CARDS)
    assert example is not None
    assert example.scores == (8, 3, 5)
    assert example.names == ("Composition", "Lighting", "Mood")


@pytest.mark.parametrize(
    "prompt",
    [
        "Give a score from 0 to 10.",
        '{"name": "Lighting", "score": 0-10}',
        '{"score": "0 to 10", "overall_score": 0..10}',
        '{"score": <number>, "overall_score": 0.0}',
        '{"score": 0, "overall_score": 0}',
    ],
)
def test_placeholders_are_no_example(prompt: str) -> None:
    """A range, a type or zeros throughout is a form to fill in; it is left as it is."""
    assert filled_example(prompt) is None
    assert strip_example(prompt) == prompt


@pytest.mark.parametrize("prompt", [FILLED, CARDS])
def test_stripping_takes_every_score_and_nothing_else(prompt: str) -> None:
    """After stripping there is no example any more, and all words are still there."""
    stripped = strip_example(prompt)
    assert filled_example(stripped) is None
    assert strip_example(stripped) == stripped
    for name in ("Composition", "Lighting"):
        assert name in stripped


def entry(world: World, prompt: str, scores: dict[str, float]) -> Entry:
    label = critique(5)
    label["dimensions"] = [
        {"name": name, "score": score, "comment": "c", "recommendation": "r"}
        for name, score in scores.items()
    ]
    row = Row("a", "ansel", world.photo("a.png"), prompt, json.dumps(label), "0" * 64)
    return entries_of_rows([row])[0]


def test_template_scores_by_the_rows_own_prompt(world: World) -> None:
    """Another prompt's example counts as well: in order, or by name among more dimensions."""
    filled = FILLED.replace('"score": 8', '"score": 2')
    example = filled_example(filled)
    assert example is not None
    same = dict(zip(DIMENSIONS, example.scores, strict=True))
    more = {"Subject Isolation": 5.0, **same}
    other = {**same, "Lighting": 4.0}
    assert template_scores([entry(world, filled, same)])
    assert template_scores([entry(world, filled, more)])
    assert not template_scores([entry(world, filled, other)])
    assert not template_scores([entry(world, "Judge.", same)])


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("The tonal range of this photograph is wide and the light falls from the left.", True),
        ("Composition: f/11, Zone VI.", True),
        ("", True),
        ("这张照片展示了山脉和天空。", False),
        ("Фотография показывает горы и небо.", False),
        (
            "La lumière de la montagne est dans le ciel et sur les arbres, pour un effet doux.",
            False,
        ),
        ("El cielo y la montaña se ven en la luz de la tarde, con los colores del valle.", False),
    ],
)
def test_language(text: str, english: bool) -> None:
    """Letters and small words tell; a text too short to tell passes for English."""
    assert is_english(text) is english

"""Answers are kept under what they depend on, and a damaged file costs time, not truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from mondrian_ft.evaluation.answers import AnswerStore, Question
from mondrian_ft.evaluation.outputs import Output

MODEL = {"base": "abc", "adapter": None}
SETTINGS = {"max_tokens": 9, "batch_size": 2}
ASKED = Question("a" * 64, "b" * 64)
SAID = Output("{“é”}\u2028\x85\ud800", 12, 7, 0.25, True)


def test_an_answer_is_found_again_and_only_under_what_it_depends_on(tmp_path: Path) -> None:
    AnswerStore(tmp_path, MODEL, SETTINGS).put(ASKED, SAID)
    assert AnswerStore(tmp_path, MODEL, dict(reversed(SETTINGS.items()))).get(ASKED) == SAID
    for model, settings, question in (
        ({**MODEL, "adapter": "d"}, SETTINGS, ASKED),
        (MODEL, {**SETTINGS, "batch_size": 1}, ASKED),
        (MODEL, SETTINGS, Question("c" * 64, ASKED.prompt)),
        (MODEL, SETTINGS, Question(ASKED.picture, "c" * 64)),
    ):
        assert AnswerStore(tmp_path, model, settings).get(question) is None


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path, cut: int) -> None:
    """The kill of a run while it writes; what comes after the torn line is read all the same."""
    store = AnswerStore(tmp_path, MODEL, SETTINGS)
    store.put(ASKED, SAID)
    other = Question("c" * 64, ASKED.prompt)
    store.put(other, SAID)
    assert store.path
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    again = AnswerStore(tmp_path, MODEL, SETTINGS)
    assert again.get(ASKED) == SAID
    # Only the line's end is missing after the first cut: the answer itself is whole.
    assert (again.get(other) is None) == (cut > 1)
    again.put(other, SAID)
    third = AnswerStore(tmp_path, MODEL, SETTINGS)
    assert third.get(other) == SAID
    assert third.get(ASKED) == SAID


def test_a_store_that_cannot_be_written_still_answers(tmp_path: Path) -> None:
    """A file stands where the folder should be: nothing is kept on disk, and nothing fails."""
    (tmp_path / "cache").write_text("in the way")
    store = AnswerStore(tmp_path / "cache", MODEL, SETTINGS)
    store.put(ASKED, SAID)
    assert store.get(ASKED) == SAID
    assert "cannot write" in store.problem
    unkept = AnswerStore(None, MODEL, SETTINGS)
    unkept.put(ASKED, SAID)
    assert unkept.problem == ""
    assert AnswerStore(None, MODEL, SETTINGS).get(ASKED) is None

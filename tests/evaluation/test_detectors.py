"""Planted adapters are caught by the detector that should, and a good one by none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from mondrian_ft.data.rows import Row
from mondrian_ft.evaluation import detectors, evidence, metrics
from mondrian_ft.evaluation.forgetting import Forgetting

from . import planted
from .critiques import answer, make_output, make_row
from .planted import Answers, Exam


@pytest.mark.parametrize("plant", [planted.good, planted.weaker])
def test_a_good_adapter_fires_none(plant: Callable[[Exam], Answers]) -> None:
    """Stock phrases and a fallible eye are no fault, over many seeds of the sample."""
    for seed in range(12):
        exam = Exam.draw(seed)
        assert not planted.fired(planted.detections(exam, plant(exam))), seed


@pytest.mark.parametrize("plant", planted.PLANTS, ids=lambda plant: plant.__name__)
def test_planted_faults_fire(plant: Callable[[Exam], Answers]) -> None:
    """Each fault is seen by its own detector, by no other that it does not concern."""
    must, may = planted.PLANTS[plant]
    for seed in range(4):
        exam = Exam.draw(seed)
        found = planted.fired(planted.detections(exam, plant(exam)))
        assert must <= found <= must | may, seed


@pytest.mark.parametrize("plant", planted.PLANTS, ids=lambda plant: plant.__name__)
def test_disqualified_adapters_are_never_better(compare, plant) -> None:
    """A fault that disqualifies takes the verdict better away, with its sentence as the reason."""
    exam = Exam.draw(1)
    answers = plant(exam)
    found = {d.name: d for d in planted.detections(exam, answers) if d.fired and d.disqualifies}
    evidence = planted.report(compare, exam, answers)["evidence"]
    fired = [d for d in evidence["detections"] if d["fired"] and d["disqualifies"]]
    assert {d["name"] for d in fired} == found.keys()
    if found:
        assert evidence["verdict"] != "better"
    assert set(evidence["capped_by"]) <= found.keys()
    for name in evidence["capped_by"]:
        assert found[name].sentence in evidence["reason"]


def test_a_good_adapter_is_better(compare) -> None:
    """And none of this keeps a good adapter from its verdict."""
    exam = Exam.draw(1)
    evidence = planted.report(compare, exam, planted.good(exam))["evidence"]
    assert evidence["verdict"] == "better"
    assert evidence["capped_by"] == []
    assert len(evidence["detections"]) == 12


def test_the_cap_is_what_lowers_it(compare) -> None:
    """German answers with the advisor's own scores would be better, but for the language."""
    exam = Exam.draw(1)
    evidence = planted.report(compare, exam, planted.german(exam))["evidence"]
    assert evidence["change"]["score"]["state"] == "better"
    assert evidence["verdict"] == "inconclusive"
    assert evidence["capped_by"] == ["other_language"]
    assert "18 of 18 answers are not in the references’ language" in evidence["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("plant", [planted.shuffled_labels, planted.shuffled_scores])
def test_trained_on_shuffled_labels_is_never_better(plant: Callable[[Exam], Answers]) -> None:
    """In 200 repeats, of every mixture of guessing and giving the mean, at n = 15."""
    states = []
    for seed in range(200):
        exam = Exam.draw(1000 + seed, n=15, n_train=40)
        answers = plant(exam)
        found = evidence.verdict(
            planted.readings(exam.base()),
            planted.readings(answers.own),
            planted.readings([row.response for row in exam.rows]),
            [str(row.image_sha256) for row in exam.rows],
            detections=planted.detections(exam, answers),
            resamples=999,
        )
        states.append(found["verdict"])
    assert states.count("better") == 0


def test_repeating_references_are_no_recital() -> None:
    """Where the references themselves are copies of training texts, copying tells nothing."""
    rows = [make_row(str(i), answer(5 + i % 3, 4)) for i in range(8)]
    train = [make_row(f"t{i}", answer(5 + i % 3, 4)) for i in range(8)]
    assert not detectors.recites(rows, [row.response for row in rows], train).fired


def test_a_photographs_own_critique_is_no_recital() -> None:
    """Only critiques of other photographs count: one's own, word for word, would be right."""
    exam = Exam.draw(2)
    own = [row.response for row in exam.rows]
    assert not detectors.recites(exam.rows, own, exam.rows).fired
    others = [*own[1:], *own[:1]]
    found = detectors.recites(exam.rows, others, exam.rows)
    assert found.fired
    assert found.rows == tuple(row.job_id for row in exam.rows)


def test_what_the_base_does_is_no_recital() -> None:
    """A copy that the base gives as well was not learnt from the training critiques."""
    exam = Exam.draw(2)
    copies = [exam.train[0].response] * len(exam.rows)
    assert detectors.recites(exam.rows, copies, exam.train).fired
    assert not detectors.recites(exam.rows, copies, exam.train, base=copies).fired


def test_one_critique_for_all_is_none_of_the_references() -> None:
    """A collapse is seen without a training critique to compare with, and needs three answers.

    Rows that share a photograph may share an answer, and so may what the references share.
    """
    exam = Exam.draw(2)
    said = planted.collapsed(exam).own
    assert not detectors.recites(exam.rows, said, exam.train).fired
    found = detectors.one_critique(exam.rows, said)
    rest = tuple(row.job_id for row in exam.rows[1:])
    assert (found.fired, found.value, found.rows) == (True, len(rest) / len(exam.rows), rest)
    assert not detectors.one_critique(exam.rows[:2], said[:2]).fired
    shared = [replace(row, image_sha256="a" * 64) for row in exam.rows]
    assert not detectors.one_critique(shared, said).fired
    alike = [replace(row, response=said[0]) for row in exam.rows]
    assert not detectors.one_critique(alike, said).fired


def test_two_pairs_of_like_photographs_are_no_collapse() -> None:
    """4 of 19 answers of a good adapter once were: each pair was counted as two copies."""
    exam = Exam.draw(2)
    said = [row.response for row in exam.rows]
    said[1], said[3] = said[0], said[2]
    found = detectors.one_critique(exam.rows, said)
    assert found.rows == (exam.rows[1].job_id, exam.rows[3].job_id)
    assert not found.fired


@pytest.mark.parametrize("shape", ["json", "html"])
def test_the_words_of_the_prompts_example_are_an_echo(shape: str) -> None:
    """Right scores under the comments of the prompt's example are no critique of a photograph.

    The prompt's other words do not count, nor an echo that the references have as well.
    """
    exam = Exam.draw(2)
    example = json.loads(exam.train[0].response)
    shown = {
        "json": json.dumps(example, indent=1),
        "html": "".join(
            f"<h3>{d['name']} (8/10)</h3><p>{d['comment']}</p><p>{d['recommendation']}</p>"
            for d in example["dimensions"]
        ),
    }[shape]
    rows = [replace(row, prompt=f"Judge it. Answer like this:\n{shown}") for row in exam.rows]

    def echo(text: str) -> str:
        said = json.loads(text)
        for mine, theirs in zip(said["dimensions"], example["dimensions"], strict=True):
            mine |= {key: theirs[key] for key in ("comment", "recommendation")}
        return json.dumps(said)

    answers = planted.good(exam).own
    echoes = [echo(text) for text in answers]

    def fired(rows: list[Row], texts: list[str]) -> bool:
        return detectors.template_echo(rows, texts, planted.readings(texts)).fired

    assert fired(rows, echoes)
    assert not fired(rows, answers)
    assert not fired(exam.rows, echoes)
    assert not fired([replace(row, response=echo(row.response)) for row in rows], echoes)


def test_the_scores_of_the_prompts_example_are_an_echo() -> None:
    """In any order of the dimensions, where answers have them clearly oftener than references."""
    exam = Exam.draw(2)
    names = [d["name"] for d in json.loads(exam.rows[0].response)["dimensions"]]
    scores = dict(zip(names, (3, 9, 4, 4, 8, 2, 6), strict=True))
    shown = [{"name": name, "score": score} for name, score in scores.items()]

    def echo(text: str) -> str:
        said = json.loads(text)
        for dimension in said["dimensions"]:
            dimension["score"] = scores[dimension["name"]]
        return json.dumps(said | {"dimensions": said["dimensions"][::-1]})

    rows = [replace(row, prompt=json.dumps(shown)) for row in exam.rows]
    answers = planted.good(exam).own
    echoes = [echo(text) for text in answers]
    some = [*echoes[:3], *answers[3:]]
    taught = [replace(row, response=echo(row.response)) for row in rows[:9]] + rows[9:]
    for held, texts, expected in (
        (rows, echoes, True),
        (rows, answers, False),
        (rows, some, False),
        (taught, echoes, True),
        (taught, [*echoes[:9], *answers[9:]], False),
    ):
        found = detectors.template_echo(held, texts, planted.readings(texts))
        assert found.fired == expected, found


def test_few_photographs_fire_nothing_by_chance() -> None:
    """Two photographs cannot show that the picture is ignored, unless nothing changes at all."""
    references = [metrics.read(answer(3, 4)), metrics.read(answer(8, 9))]
    own = [metrics.read(answer(4, 4)), metrics.read(answer(7, 9))]
    photographs = ["a", "b"]
    found = detectors.ignores_picture(own, own[::-1], references, photographs)
    assert (found.fired, found.value) == (False, None)
    assert detectors.ignores_picture(own, own, references, photographs).fired
    assert not detectors.ignores_picture(own, [], references, photographs).fired


def test_descriptions_stand_in_for_scores() -> None:
    """Where references hold no scores, the descriptions tell whether the picture is seen."""
    exam = Exam.draw(3)
    photographs = [str(row.image_sha256) for row in exam.rows]
    references = [
        metrics.Reading(r.critique, None, None)
        for r in planted.readings([row.response for row in exam.rows])
    ]
    for plant, blind in ((planted.good, False), (planted.blind, True)):
        answers = plant(exam)
        found = detectors.ignores_picture(
            planted.readings(answers.own),
            planted.readings(answers.shuffled),
            references,
            photographs,
        )
        assert found.fired == blind


def test_a_loop_or_language_of_the_references_is_none() -> None:
    """What the advisor does as well is no failure of the adapter."""
    text = json.dumps(json.loads(answer(5, 5)) | {"technical_notes": planted.GERMAN * 9})
    rows = [make_row(str(i), text) for i in range(4)]
    assert not detectors.other_language(rows, [text] * 4).fired
    assert not detectors.loops(rows, [text] * 4).fired
    english = [make_row(str(i), answer(5, 5)) for i in range(4)]
    assert detectors.other_language(english, [text] * 4).fired


def test_detections_are_json() -> None:
    """A detection goes into the report as it is."""
    found = detectors.truncated(
        [make_row("1", answer(5, 5))], [make_output("{", finished=False)]
    ).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["fired"]
    assert found["rows"] == ["job-1"]
    assert not found["disqualifies"]


@pytest.mark.parametrize(
    ("losses", "fired", "value"),
    [
        ((0.1, 1.1), False, 1.0),
        ((0.1, 1.2), True, 1.1),
        ((0.3, 0.2), False, -0.1),
        ((None, None), False, None),
        ((0.1, None), False, None),
    ],
)
def test_forgetting_is_a_rise_of_more_than_a_nat(losses, fired: bool, value: float | None) -> None:
    """At the threshold it does not fire, nor where nothing was measured; it caps no verdict."""
    found = detectors.forgetting(*losses)
    assert found.fired == fired
    assert found.value == (None if value is None else pytest.approx(value))
    assert not found.disqualifies
    assert ("forgotten" in found.sentence) == fired
    if value is not None:
        assert f" {100 * math.exp(-value):.0f} % as likely" in found.sentence


def test_what_was_forgotten_is_told_and_decides_nothing(compare) -> None:
    """The measure stands in the evidence, unmeasured as null, and a better stays one."""
    exam = Exam.draw(1)
    sides = exam, planted.good(exam)
    lost = Forgetting(n=9, asked=13, prompts=3, base_loss=0.1, tuned_loss=4.1)
    for given, fires in ((None, False), (lost, True)):
        evidence = planted.report(partial(compare, forgetting=given), *sides)["evidence"]
        assert evidence["forgetting"] == (given and given.as_dict())
        (found,) = (d for d in evidence["detections"] if d["name"] == "forgetting")
        assert found["fired"] == fires
        assert (evidence["verdict"], evidence["capped_by"]) == ("better", [])

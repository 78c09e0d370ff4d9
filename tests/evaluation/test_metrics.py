"""Each measure on answers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mondrian_ft.data.audit.texts import repeats_advice
from mondrian_ft.evaluation import metrics

from .critiques import answer


def test_reading_an_exact_answer() -> None:
    """An answer in the exact format is strict, readable, and gives its scores."""
    reading = metrics.read(answer(8, 6), ["Composition", "Lighting"])
    assert reading.strict
    assert reading.readable
    assert not reading.mends
    assert reading.scores == {"composition": 8, "lighting": 6}
    assert reading.overall == 7


def test_reading_a_fenced_answer() -> None:
    """A fence is readable but not strict, and what was mended is told."""
    reading = metrics.read(f"Here it is:\n```json\n{answer(8, 6)}\n```")
    assert reading.readable
    assert not reading.strict
    assert reading.strict_error
    assert reading.scores == {"composition": 8, "lighting": 6}


@pytest.mark.parametrize("text", ["", "**peace** " * 50, '{"dimsions": []}', answer(8, 6)[:-30]])
def test_reading_what_cannot_be_read(text: str) -> None:
    """Loops, misspelled keys and cut answers give no scores, and a reason."""
    reading = metrics.read(text)
    assert not reading.readable
    assert not reading.strict
    assert not reading.scores
    assert reading.problem
    assert reading.strict_error


def test_other_dimension_names_are_not_strict() -> None:
    """Strictness asks for the names that the training answers taught, when they agree on them."""
    text = answer(8, 6, names=("Mood", "Lighting"))
    assert metrics.read(text).strict
    assert not metrics.read(text, ["Composition", "Lighting"]).strict


def test_dimension_keys() -> None:
    """The spellings of the users' eras meet in one key."""
    spellings = ("Focus & Sharpness", "focus_and_sharpness", "Focus  and sharpness")
    assert {metrics.dimension_key(s) for s in spellings} == {"focus_and_sharpness"}


def test_score_error_by_hand() -> None:
    """Errors of 2 and 1 average 1.5; a dimension one side lacks does not count; none is None."""
    assert metrics.score_error({"a": 8, "b": 5}, {"a": 6, "b": 6}) == 1.5
    assert metrics.score_error({"a": 8}, {"a": 6, "b": 6}) == 2
    assert metrics.score_error({"a": 8}, {"b": 6}) is None


def test_worst_error_is_never_below_the_truth() -> None:
    """No scores can be further away than what an unreadable answer is charged."""
    reference = {"a": 7.0, "b": 2.0}
    assert metrics.worst_error(reference) == 7.5
    assert metrics.score_error({"a": 0, "b": 10}, reference) == 7.5
    assert metrics.worst_error({}) is None


def test_mean_scores_by_dimension() -> None:
    """The constant prediction is the mean of each dimension where it was scored."""
    assert metrics.mean_scores([{"a": 4, "b": 8}, {"a": 6}]) == {"a": 5, "b": 8}


def test_rows_of_one_photograph_count_once() -> None:
    """Three rows on two photographs are two observations; a missing value is no observation."""
    assert metrics.by_photograph([1.0, 3.0, 5.0], ["x", "x", "y"]) == {"x": 2.0, "y": 5.0}
    assert metrics.by_photograph([1.0, None, None], ["x", "x", "y"]) == {"x": 1.0}
    with pytest.raises(ValueError, match="2 values for 1"):
        metrics.by_photograph([1.0, 2.0], ["x"])


def test_rank_correlations_by_hand() -> None:
    """Ties share ranks, pairs are counted, and a constant ranks nothing."""
    pairs = [(1.0, 2.0), (2.0, 2.0), (2.0, 5.0), (4.0, 4.0), (3.0, 9.0)]
    given, truth = [1, 2.5, 2.5, 5, 4], [1.5, 1.5, 4, 3, 5]
    assert metrics.spearman(pairs) == pytest.approx(np.corrcoef(given, truth)[0, 1])
    # Of the ten pairs six agree, two disagree, one ties on each side.
    assert metrics.kendall(pairs) == pytest.approx((6 - 2) / 9)
    for measure in (metrics.spearman, metrics.kendall):
        assert measure([(1, 1), (2, 2), (3, 3)]) == pytest.approx(1)
        assert measure([(7, 1), (7, 2), (7, 3)]) is None
        assert measure([(1, 7), (2, 7), (3, 7)]) is None
        assert measure([(1, 1), (2, 2)]) is None
        assert measure([]) is None


def test_spread_ratio() -> None:
    """Half the reference's spread is 0.5, none is 0, and references without any give None."""
    assert metrics.spread_ratio([(5, 2), (7, 6)]) == pytest.approx(0.5)
    assert metrics.spread_ratio([(5, 2), (5, 6)]) == 0
    assert metrics.spread_ratio([(5, 2), (7, 2)]) is None
    assert metrics.spread_ratio([(5, 2)]) is None


def test_overall_gap_and_descriptions() -> None:
    """A stated 9 over dimensions of 8 and 6 is 2 off; descriptions share words or none."""
    first, second = (metrics.read(t).critique for t in (answer(8, 6, overall=9), answer(8, 6)))
    assert first is not None
    assert second is not None
    assert metrics.overall_gap(first) == pytest.approx(2)
    assert metrics.description_overlap(first, second) == 1
    other = second.model_copy(update={"image_description": "A lake at dawn."})
    assert metrics.description_overlap(first, other) == pytest.approx(2 / 6)
    blank = second.model_copy(update={"image_description": ""})
    assert metrics.description_overlap(first, blank) is None
    assert metrics.distinct_advice([first, second]) == pytest.approx(2 / 4)
    assert metrics.distinct_advice([]) is None


def test_percentiles_need_every_value() -> None:
    """Between neighbours; one unknown value leaves it unknown."""
    assert metrics.percentile([1.0, 2.0, 3.0], 50) == 2
    assert metrics.percentile([1.0, 3.0], 95) == pytest.approx(2.9)
    assert metrics.percentile([1.0, None], 50) is None
    assert metrics.percentile([], 50) is None


def test_templates_and_repeated_advice_are_seen() -> None:
    """Equal score vectors are one; the same advice under two dimensions is noticed."""
    readings = [metrics.read(t) for t in (answer(8, 7), answer(8, 7), answer(6, 7), "no")]
    assert metrics.distinct_score_vectors(readings) == 2
    critique = metrics.read(answer(8, 7)).critique
    assert critique is not None
    assert not repeats_advice(critique)
    same = metrics.read(answer(8, 7).replace("Mind Lighting", "Mind Composition")).critique
    assert same is not None
    assert repeats_advice(same)


def test_foreign_script() -> None:
    """A Chinese answer to an English reference is noticed, an accented one is not."""
    assert metrics.foreign_script("构图很好 光线柔和", "A fine picture.")
    assert not metrics.foreign_script("Ein schönes Bild, à mon goût.", "A fine picture.")
    assert not metrics.foreign_script("构图很好", "构图很好")
    assert not metrics.foreign_script("", "A fine picture.")

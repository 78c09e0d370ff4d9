"""``comparison_report.json``: the promised keys, honest numbers, and every awkward case."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mondrian_ft.errors import DataError
from mondrian_ft.evaluation import comparison
from mondrian_ft.evaluation.outputs import Output

from .critiques import answer, make_output, make_row

REFERENCES = [answer(4 + i % 5, 3 + i % 4) for i in range(8)]
NEAR = [answer(4.5 + i % 5, 3 + i % 4) for i in range(8)]
GENERIC = [answer(8, 7)] * 8


def test_promised_keys(compare) -> None:
    """Every key of the users' old report is there, and the interface's evidence beside it."""
    report = compare(REFERENCES, REFERENCES, base=GENERIC, tuned=NEAR, tuned_shuffled=GENERIC)
    assert {
        "evaluation_date",
        "base_model",
        "lora_path",
        "validation_data",
        "metrics",
        "summary",
        "sample_results",
        "evidence",
    } <= report.keys()
    for block in ("base_model", "fine_tuned_model"):
        assert {
            "format_compliance",
            "valid_outputs",
            "total_outputs",
            "avg_score",
            "std_score",
            "avg_inference_time",
            "total_inference_time",
        } == report["metrics"][block].keys()
        for sample in report["sample_results"]:
            assert {
                "output",
                "full_output",
                "inference_time",
                "format_valid",
                "score",
                "validation_error",
            } <= sample[block].keys()
    assert report["metrics"]["improvements"].keys() == {
        "format_compliance_delta",
        "score_delta",
        "inference_time_delta",
    }
    arms = report["evidence"]["arms"]
    assert list(arms) == ["base", "tuned", "mean_score"]
    for arm in arms.values():
        assert {"n", "format_strict", "score_mae"} <= arm.keys()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_numbers_by_hand(compare) -> None:
    """Two photographs, worked out on paper."""
    report = compare(
        [answer(6, 4), answer(8, 8)],
        [answer(5, 5), answer(7, 5)],
        base=[answer(8, 8), answer(8, 7)],
        tuned=[answer(6, 5), f"```json\n{answer(8, 8)}\n```"],
        tuned_shuffled=[answer(8, 8), answer(6, 5)],
    )
    arms = report["evidence"]["arms"]
    assert arms["base"]["score_mae"] == pytest.approx((3 + 0.5) / 2)
    assert arms["tuned"]["score_mae"] == pytest.approx((0.5 + 0) / 2)
    assert arms["tuned"]["score_mae_shuffled"] == pytest.approx((3 + 2.5) / 2)
    assert arms["mean_score"]["score_mae"] == pytest.approx((0.5 + 2.5) / 2)
    lighting = {"mae": 2.5, "bias": 1.5, "spearman": None, "kendall": None, "n": 2}
    lighting["spread_ratio"] = pytest.approx(0.5 / 2)
    assert arms["base"]["per_dimension"]["Lighting"] == lighting
    assert arms["base"]["overall_bias"] == pytest.approx((3 - 0.5) / 2)
    assert arms["base"]["overall_spread_ratio"] == pytest.approx(0.25 / 1.5)
    assert arms["base"]["overall_gap"] == 0
    assert arms["base"]["score_bias"] == pytest.approx((3 - 0.5) / 2)
    assert (arms["tuned"]["format_strict"], arms["tuned"]["readable"]) == (0.5, 1.0)
    assert report["metrics"]["base_model"]["avg_score"] == pytest.approx(7.75)
    assert report["metrics"]["fine_tuned_model"]["avg_score"] == pytest.approx(6.75)
    assert report["metrics"]["improvements"]["format_compliance_delta"] == -0.5


def test_full_output_is_uncut(compare) -> None:
    """A long answer is kept whole; the users' reports were cut at 500 characters."""
    long = answer(8, 7).replace("A lake", "A lake" * 900)
    sample = compare([answer(8, 7)], base=[long], tuned=[long])["sample_results"][0]
    assert sample["base_model"]["full_output"] == long
    assert len(sample["base_model"]["output"]) == 500


def test_an_arm_that_says_nothing_readable(compare) -> None:
    """No readable answer: no score error, full charge in the worst case, and a worse verdict."""
    report = compare(REFERENCES, REFERENCES, base=NEAR, tuned=["**peace** "] * 8)
    tuned = report["evidence"]["arms"]["tuned"]
    assert (tuned["n_scored"], tuned["score_mae"], tuned["format_strict"]) == (0, None, 0.0)
    assert tuned["score_mae_worst_case"] >= 5
    assert report["metrics"]["fine_tuned_model"]["avg_score"] is None
    assert report["evidence"]["verdict"] == "worse"
    json.dumps(report, allow_nan=False)


def test_losing_the_hard_answers_earns_nothing(compare) -> None:
    """Answers that cannot be read neither improve the paired change nor hide in the verdict."""
    hard = [answer(2, 2)] * 4 + REFERENCES[:4]
    base = [answer(8, 7)] * 4 + REFERENCES[:4]
    tuned = ["oops"] * 4 + REFERENCES[:4]
    evidence = compare(hard, REFERENCES, base=base, tuned=tuned)["evidence"]
    assert evidence["change"]["score"]["n"] == 4
    assert evidence["change"]["score"]["mean"] == 0
    assert evidence["change"]["format"]["mean"] == -0.5
    assert evidence["verdict"] in ("worse", "inconclusive")


def test_better_and_worse(compare) -> None:
    """A clear gain is better, the same arms exchanged are worse, with the numbers in a sentence."""
    references = [answer(3 + i % 5, 2 + i % 4) for i in range(16)]
    near = [answer(3.5 + i % 5, 2 + i % 4) for i in range(16)]
    far = [answer(8, 7)] * 16
    evidence = compare(references, references, base=far, tuned=near)["evidence"]
    assert evidence["verdict"] == "better"
    assert "16 photographs" in evidence["reason"]
    assert "fell" in evidence["reason"]
    assert compare(references, references, base=near, tuned=far)["evidence"]["verdict"] == "worse"


@pytest.mark.parametrize("texts", [[answer(8, 7)], [answer(8, 7), "unreadable"], ["x"] * 7])
def test_no_difference_is_no_worse(compare, texts: list[str]) -> None:
    """A zero difference everywhere is no_worse at any size, even where nothing can be read."""
    references = [answer(7, 7)] * len(texts)
    assert compare(references, base=texts, tuned=texts)["evidence"]["verdict"] == "no_worse"


def test_few_photographs_prove_nothing(compare) -> None:
    """One photograph, or five rows on one photograph, is inconclusive however large the gain."""
    one = compare([answer(3, 3)], base=[answer(8, 8)], tuned=[answer(3, 3)])["evidence"]
    assert one["verdict"] == "inconclusive"
    rows = [answer(3, 3)] * 7
    same = compare(rows, shas=["a"] * 7, base=[answer(8, 8)] * 7, tuned=rows)["evidence"]
    assert (same["n"], same["n_photographs"], same["verdict"]) == (7, 1, "inconclusive")


def test_references_without_scores(compare) -> None:
    """References that hold no critique leave score errors unknown; format is still measured."""
    evidence = compare(["Lovely."] * 3, base=[answer(8, 7)] * 3, tuned=[answer(7, 7)] * 3)[
        "evidence"
    ]
    assert evidence["n_references_with_scores"] == 0
    assert "mean_score" not in evidence["arms"]
    assert evidence["arms"]["tuned"]["score_mae"] is None
    assert evidence["arms"]["tuned"]["score_mae_worst_case"] is None
    assert evidence["arms"]["tuned"]["format_strict"] == 1.0
    assert evidence["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("base", "tuned", "verdict", "told"),
    [
        ("oops", answer(7, 7), "inconclusive", "format compliance rose by 100 points"),
        (answer(8, 7), answer(7, 7), "inconclusive", "format compliance stayed the same"),
        (answer(8, 7), "oops", "worse", "format compliance fell by 100 points"),
    ],
)
def test_without_scores_the_format_alone_is_judged(
    compare, base: str, tuned: str, verdict: str, told: str
) -> None:
    """It can show that a model got worse, never that it judges better; and that is said."""
    report = compare(["Lovely."] * 8, train=["Lovely."] * 8, base=[base] * 8, tuned=[tuned] * 8)
    assert report["summary"]["verdict"] == verdict
    lead = verdict.capitalize()
    assert report["summary"]["text"] == (
        f"{lead}: the references hold no scores to compare with, and {told}."
    )


def test_base_alone(compare) -> None:
    """Without a tuned arm there is no tuned block and no verdict; the base is still measured."""
    report = compare(REFERENCES, REFERENCES, base=GENERIC)
    assert list(report["metrics"]) == ["base_model"]
    assert "fine_tuned_model" not in report["sample_results"][0]
    assert report["evidence"]["verdict"] == "inconclusive"


def test_mixed_eras_leave_dimension_names_free(compare) -> None:
    """Where training answers disagree on names, an answer with either set keeps the format."""
    other = answer(8, 7, names=("Mood", "Depth"))
    mixed = compare([REFERENCES[0]], [REFERENCES[0], other], base=[other], tuned=[other])
    fixed = compare([REFERENCES[0]], [REFERENCES[0]], base=[other], tuned=[other])
    assert mixed["evidence"]["arms"]["base"]["format_strict"] == 1.0
    assert fixed["evidence"]["arms"]["base"]["format_strict"] == 0.0


def test_no_rows_is_a_clear_error(compare) -> None:
    """Nothing to evaluate: a sentence that says which key to change."""
    with pytest.raises(DataError, match=r"data\.val_split"):
        compare([], base=[], tuned=[])


def test_unpaired_arms_are_a_programming_error(compare) -> None:
    """One output per row and no reserved names; anything else is our own mistake."""
    with pytest.raises(ValueError, match="1 outputs for 2 rows"):
        compare(REFERENCES[:2], base=GENERIC[:2], tuned=GENERIC[:1])
    with pytest.raises(ValueError, match="reserved"):
        compare(REFERENCES[:1], base=GENERIC[:1], mean_score=GENERIC[:1])
    with pytest.raises(ValueError, match="reserved"):
        compare(REFERENCES[:1], base=GENERIC[:1], tuned_shuffled=GENERIC[:1])


def test_equal_input_gives_equal_reports(compare) -> None:
    """Resampling is seeded: the same answers give the same report, byte for byte."""
    first, second = (
        json.dumps(compare(REFERENCES, REFERENCES, base=GENERIC, tuned=NEAR)) for _ in range(2)
    )
    assert first == second


def test_criteria(compare) -> None:
    """The closing marks: what is met, what is missed, and nothing on what cannot be told."""
    report = compare(REFERENCES, REFERENCES, base=GENERIC, tuned=NEAR, tuned_shuffled=GENERIC)
    marks = {mark["name"]: mark["met"] for mark in report["evidence"]["criteria"]}
    assert marks == {
        "base_format": True,
        "tuned_format": True,
        "error_below_base": True,
        "error_below_mean": True,
        "shuffled_error": True,
        "time": True,
    }
    alone = compare(REFERENCES, base=GENERIC)["evidence"]["criteria"]
    assert [mark["name"] for mark in alone] == ["base_format"]


def test_cut_answers_are_counted() -> None:
    """An answer that the token limit cut is counted as unfinished."""
    row = make_row("0", answer(8, 7))
    report = comparison.build(
        rows=[row],
        arms={"base": [make_output(answer(8, 7)[:40], seconds=2.0, finished=False)]},
        train_rows=[],
        base_model="sample",
        lora_path=None,
        validation_data="val.json",
        settings={},
        adapter_hash=None,
    )
    base = report["evidence"]["arms"]["base"]
    assert (base["unfinished"], base["seconds_mean"]) == (1, 2.0)
    assert report["metrics"]["base_model"]["total_inference_time"] == 2.0


def test_latency_is_told_where_it_was_taken() -> None:
    """Median and 95th percentile of seconds, speed and, if the generator took them, its stages."""
    rows = [make_row(str(i), answer(8, 7)) for i in range(3)]

    def base(outputs: list[Output]) -> dict:
        return comparison.build(
            rows=rows,
            arms={"base": outputs},
            train_rows=[],
            base_model="sample",
            lora_path=None,
            validation_data="val.json",
            settings={},
            adapter_hash=None,
        )["evidence"]["arms"]["base"]

    plain = [make_output(answer(8, 7), seconds=s) for s in (1.0, 2.0, 4.0)]
    found = base(plain)
    assert (found["seconds_p50"], found["seconds_p95"]) == (2.0, pytest.approx(3.8))
    assert found["tokens_per_second_p50"] == 50.0
    assert found["first_token_seconds_p50"] is None
    assert found["prefill_seconds_p95"] is None
    timed = [
        replace(output, prefill_seconds=0.1 * i, first_token_seconds=0.2 * i)
        for i, output in enumerate(plain)
    ]
    assert base(timed)["first_token_seconds_p50"] == pytest.approx(0.2)
    assert base(timed)["prefill_seconds_p95"] == pytest.approx(0.19)
    # One answer without its time leaves the percentile unknown rather than of the others alone.
    assert base([*timed[:2], plain[2]])["prefill_seconds_p50"] is None


def test_margins_reach_the_verdict(compare) -> None:
    """What counts as no worse is the caller's, and the report says what it was."""
    change = compare(REFERENCES, base=GENERIC, tuned=NEAR, score_margin=0.5, format_margin=0.1)[
        "evidence"
    ]["change"]
    assert (change["score"]["margin"], change["format"]["margin"]) == (0.5, 0.1)


def test_advice_is_counted_across_photographs(compare) -> None:
    """Two recommendations in all of eight photographs: an eighth of sixteen is distinct."""
    base = compare(REFERENCES, base=GENERIC)["evidence"]["arms"]["base"]
    assert base["distinct_advice"] == base["distinct_advice_reference"] == 2 / 16

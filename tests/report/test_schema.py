"""``comparison_report.json`` keeps the schema in the package, and the schema keeps the promises."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mondrian_ft.data.dataset import Row
from mondrian_ft.evaluation import comparison
from mondrian_ft.evaluation.outputs import Output

from .conftest import critique

SCHEMA: dict[str, Any] = json.loads(
    (resources.files("mondrian_ft.report") / "schema/comparison_report.schema.json").read_text(
        encoding="utf-8"
    )
)


def faults(report: Any) -> list[str]:
    """What a validator has to say against a report, as it is on disk."""
    found = Draft202012Validator(SCHEMA).iter_errors(json.loads(json.dumps(report)))
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_schema_is_one() -> None:
    """It keeps the draft it names."""
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"n": 1},
        {"tuned": ["oops"] * 8},
        {"base": ["oops"] * 8, "tuned": ["oops"] * 8},
        {"tuned_shuffled": [critique(7)] * 8, "tuned_v3": [critique(5)] * 8},
    ],
    ids=["plain", "one", "unreadable", "both unreadable", "more arms"],
)
def test_reports_keep_it(finish, case: dict[str, Any]) -> None:
    """Reports on good, unreadable, single and many answers."""
    assert faults(finish(**case).report) == []


def test_many_arms_keep_it(many) -> None:
    """Failed arms, the constraint's effect, other verdicts and the example's scores as well."""
    assert faults(many.report) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arms_failed", {"production": ""}),
        ("constraint", {"base": {"n": 8}}),
        ("forgetting", {"n": 0, "asked": 13, "prompts": 0, "base_loss": 0.1, "tuned_loss": 0.2}),
        ("forgetting", {"n": 3, "prompts": 1, "base_loss": 0.1, "tuned_loss": 0.2}),
        ("against", {"production": {"verdict": "great", "reason": "", "change": {}}}),
        ("latency", {"n": 8, "ratio": -1.0, "interval": None}),
        ("base", {"name": "sample"}),
        ("judged_part", {"part": "train", "rows": 8, "of": 8}),
    ],
)
def test_what_many_arms_add_is_held_to_it(many, key: str, value: Any) -> None:
    """A reason that says nothing, half an effect, a loss of nothing, a verdict of another word."""
    many.report["evidence"][key] = value
    assert faults(many.report)


def test_one_arm_alone_keeps_it(tmp_path: Path) -> None:
    """Without a tuned arm there is neither change nor detection."""
    report = comparison.build(
        rows=[Row("job-1", "ansel", tmp_path / "1.jpg", "Analyze.", critique(5), "1" * 64)],
        arms={"base": [Output(critique(6), 40, 100, 1.5, finished=True)]},
        train_rows=[],
        base_model="sample",
        lora_path=None,
        validation_data="val.json",
        settings={},
        adapter_hash=None,
    )
    assert "change" not in report["evidence"]
    assert faults(report) == []


@pytest.mark.parametrize(
    "path",
    [
        "summary",
        "sample_results",
        "evidence",
        "evidence.verdict",
        "evidence.capped_by",
        "evidence.latency",
        "evidence.data_lock",
        "evidence.base",
        "evidence.judged_part",
        "evidence.arms.base.n",
        "evidence.arms.tuned.format_strict",
        "evidence.arms.tuned.score_mae",
        "evidence.arms.mean_score.score_mae",
        "evidence.change.score.minimum_detectable_effect",
        "metrics.base_model.format_compliance",
        "metrics.fine_tuned_model.total_inference_time",
        "metrics.improvements.score_delta",
        "sample_results.0.image",
        "sample_results.0.base_model.validation_error",
        "sample_results.0.fine_tuned_model.full_output",
    ],
)
def test_a_promised_key_that_is_missing_is_a_fault(finish, path: str) -> None:
    """Neither the workbook's keys nor the evidence's may go."""
    report = copy.deepcopy(finish(2).report)
    *way, last = path.split(".")
    place: Any = report
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    del place[last]
    assert len(faults(report)) == 1
    assert f"'{last}'" in faults(report)[0]


@pytest.mark.parametrize(
    ("key", "value"), [("verdict", "great"), ("n", -1), ("arms", {}), ("reason", None)]
)
def test_values_are_held_to_it(finish, key: str, value: Any) -> None:
    """Another verdict word, a negative count, no arm at all."""
    report = copy.deepcopy(finish(2).report)
    report["evidence"][key] = value
    assert faults(report)


def test_keys_may_be_added(finish) -> None:
    """The promise is additive: what we do not know is no fault."""
    report = copy.deepcopy(finish(2).report)
    report["evidence"]["new"] = report["new"] = 1
    assert faults(report) == []

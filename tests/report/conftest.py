"""A small finished evaluation: photographs, a comparison, a training log, facts of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.data.dataset import Row
from mondrian_ft.evaluation import comparison
from mondrian_ft.evaluation.outputs import Output


def critique(score: float, words: str = "A lake under hills.") -> str:
    """An answer in the exact format with one score for every dimension."""
    return json.dumps(
        {
            "image_description": words,
            "dimensions": [
                {
                    "name": name,
                    "score": score,
                    "comment": f"The {name.lower()} is calm.",
                    "recommendation": f"Wait for better {name.lower()}.",
                }
                for name in DIMENSIONS
            ],
            "overall_score": score,
            "key_strengths": ["light"],
            "priority_improvements": ["edges"],
            "technical_notes": "Sharp.",
        }
    )


MODELS = ("production", "base_constrained", "tuned_constrained", "base_examples")
"""Arms beside base and tuned, as they may be asked for."""


def widen(report: dict[str, Any]) -> dict[str, Any]:
    """Adds to a report of `MODELS` what an evaluation of many arms has besides; returns it."""
    evidence = report["evidence"]
    arms = evidence["arms"]
    guess = {key: value for key, value in arms["mean_score"].items() if key != "n_train"}
    arms["prompt_example"] = guess | {"score_mae": 1.93, "score_mae_interval": [1.6, 2.3]}
    arms["tuned"]["peak_memory_gb"] = 9.42
    evidence["arms_failed"] = {"production_constrained": "its adapter is of <another> base."}
    change = {"mean": 0.04, "interval": [-0.03, 0.12], "n": 8}
    evidence["constraint"] = {
        arm: {"n": 8, "changed": 3, "score_error_change": change, "seconds_ratio": 1.07}
        for arm in ("base", "tuned")
    }
    evidence["against"] = {
        "production": {
            "verdict": "better",
            "reason": "Better: the score error fell by 0.61 points.",
            "change": evidence["change"],
            "capped_by": [],
            "latency": {"n": 8, "ratio": 1.02, "interval": [0.98, 1.06]},
        }
    }
    return report


@dataclass
class Finished:
    """What a finished run hands to the report."""

    report: dict[str, Any]
    log: Path
    facts: dict[str, Any]
    folder: Path


@pytest.fixture
def many(finish: Callable[..., Finished]) -> Finished:
    """An evaluation of six models and two guesses, with an arm that failed.

    Base cannot be read on the first photograph; production misses most on the third.
    """
    base = ["Sorry, I cannot.", *(critique(8) for _ in range(7))]
    others = {arm: [critique(5 + i % 3) for i in range(8)] for arm in MODELS}
    others["production"][2] = critique(10)
    finished = finish(base=base, tuned_shuffled=[critique(7)] * 8, **others)
    widen(finished.report)
    return finished


@pytest.fixture
def finish(tmp_path: Path) -> Callable[..., Finished]:
    """Builds a finished evaluation of given base and tuned answers."""

    def make(
        n: int = 8,
        base: Sequence[str] | None = None,
        tuned: Sequence[str] | None = None,
        references: Sequence[str] | None = None,
        **others: Sequence[str],
    ) -> Finished:
        rows = []
        for index in range(n):
            path = tmp_path / f"photo-{index}.jpg"
            Image.new("RGB", (60 + 8 * index, 48), (30 * index % 255, 90, 120)).save(path)
            answer = references[index] if references else critique(3 + index % 6)
            rows.append(Row(f"job-{index}", "ansel", path, "Analyze.", answer, f"{index:064x}"))
        arms: dict[str, Sequence[str]] = {"base": base or [critique(8)] * n}
        arms["tuned"] = tuned or [critique(3.4 + index % 6) for index in range(n)]
        arms |= others
        report = comparison.build(
            rows=rows,
            arms={
                name: [Output(text, 40, 100, 1.5, finished=True) for text in texts]
                for name, texts in arms.items()
            },
            train_rows=rows,
            base_model="sample",
            lora_path="adapter",
            validation_data="training_data_ansel_test.json",
            settings={"max_tokens": 300},
            adapter_hash="abc123",
            date="2026-11-24T12:00:00+00:00",
        )
        lines = [{"kind": "eval", "step": 0, "val_loss": 1.0}]
        for step in range(1, 31):
            lines.append({"kind": "step", "step": step, "loss": 1 / step, "learning_rate": 2e-4})
        lines.append({"kind": "eval", "step": 30, "val_loss": 0.2})
        log = tmp_path / "training_log.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        facts = {
            "experiment": "sample",
            "config_hash": "cafe01",
            "seconds": 141.0,
            "warnings": ["trainer.save_every never comes."],
            "provenance": {"git": None, "argv": ["mondrian-ft"], "versions": {"mlx": "1.2.3"}},
            "config": {"lora": {"rank": 16}},
        }
        return Finished(report, log, facts, tmp_path)

    return make

"""The best checkpoint by the right number, of the right weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mondrian_ft.evaluation import monitoring
from mondrian_ft.evaluation.monitoring import AnswerMonitor
from mondrian_ft.evaluation.outputs import Output
from mondrian_ft.model import lora
from mondrian_ft.model.features import FeatureStore

from .test_trainer import Recorder, same


class Given:
    """A monitor that measures what it is told to."""

    def __init__(self, values: list[float | None], larger: bool) -> None:
        self.values = iter(values)
        self.larger = larger

    def __call__(self) -> float | None:
        return next(self.values)


@pytest.mark.parametrize(
    ("values", "losses", "larger", "best", "stopped"),
    [
        # The largest share, though its loss is the highest.
        ([0.2, 0.8, 0.5, 0.4], [1.0, 3.0, 2.0, 2.5], True, 2, 4),
        # The smallest error.
        ([2.0, 1.5, 1.6, 1.7], [1.0, 3.0, 2.0, 2.5], False, 2, 4),
        # Equal shares: the loss decides, and that is getting better too.
        ([1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 1.5, 1.0], True, 3, 5),
        # What could not be measured is never the best, also as the first.
        ([None, None], [1.0, 0.5], False, None, 2),
        ([None, 3.0, None, 3.5], [1.0, 2.0, 0.5, 0.1], False, 2, 4),
    ],
)
def test_a_monitor_ranks_the_checkpoints(
    lab, base, tmp_path, monkeypatch, values, losses, larger, best, stopped
) -> None:
    """Best and patience go by the monitor; the validation loss is measured all the same."""
    lab.attach(base, live=False)
    trainer = lab.trainer(
        base,
        lab.examples(4),
        tmp_path,
        validation=lab.examples(1, "val"),
        monitor=Given(values, larger),
        max_steps=20,
        save_every=1,
        eval_every=1,
        patience=2,
    )
    measured = iter(losses)
    monkeypatch.setattr(trainer, "validation_loss", lambda: next(measured))
    result = trainer.fit()
    assert result.stopped_early
    assert (result.state.best_step, result.state.step) == (best, stopped)
    kept = trainer.checkpointer.best()
    assert (kept and kept.name) == (best and f"step_{best:06d}")
    if best:
        assert result.state.best_value == values[best - 1]
        assert result.state.best_loss == losses[best - 1]
    assert result.state.value == values[stopped - 1]


def test_the_average_is_what_is_evaluated(lab, base, tmp_path) -> None:
    """Equal to a reference in numpy; the validation loss is the average's, training is not."""
    weights: list[dict[str, np.ndarray]] = []

    class Keep(Recorder):
        def on_step(self, state: Any, update: Any) -> None:
            weights.append(lab.weights(base))

    keep = Keep()
    validation = lab.examples(2, "val")
    lab.attach(base, live=False, dropout=0.2)
    plain = lab.trainer(base, lab.examples(4), tmp_path / "plain")
    plain.fit()
    expected = lab.weights(base)
    lora.detach(base.model)
    lab.attach(base, live=False, dropout=0.2)
    trainer = lab.trainer(
        base,
        lab.examples(4),
        tmp_path / "averaged",
        validation=validation,
        callbacks=[keep],
        eval_every=6,
        ema=0.4,
    )
    trainer.fit()
    assert same(expected, lab.weights(base))
    for name, value in trainer.average.values.items():
        wanted = weights[0][name].astype(np.float64)
        for updates, each in enumerate(weights[1:], 2):
            kept = min(0.4, (1 + updates) / (10 + updates))
            wanted = kept * wanted + (1 - kept) * each[name]
        assert np.allclose(np.array(value), wanted, atol=1e-6), name
    own = trainer.validation_loss()
    lora.set_tensors(base.model, trainer.average.values)
    assert keep.evals == [(6, trainer.validation_loss())]
    assert trainer.validation_loss() != own


def critique(score: float) -> str:
    """An answer as the format wants it, with one dimension."""
    dimension = {"name": "Light", "score": score, "comment": "Soft.", "recommendation": "Wait."}
    return json.dumps(
        {
            "image_description": "A ridge.",
            "dimensions": [dimension],
            "overall_score": score,
            "key_strengths": ["Light"],
            "priority_improvements": ["Wait"],
            "technical_notes": "None.",
        }
    )


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("format_compliance", [critique(3), critique(3), "no JSON", critique(3)], 0.75),
        ("score_mae", [critique(3), critique(6), critique(5), critique(5)], 0.75),
        # What cannot be read is charged what the worst scores would have cost, here 5 points.
        ("score_mae", [critique(3), critique(5), critique(5), "no JSON"], 1.75),
    ],
)
def test_a_monitor_measures_answers(lab, base, monkeypatch, name, answers, expected) -> None:
    """The share that keeps the format to the letter, and the mean error of the scores."""
    examples = [
        replace(one, row=replace(one.row, response=critique(5))) for one in lab.examples(4, "val")
    ]
    asked: list[Any] = []

    def generate(base: Any, requests: Any, **options: Any) -> list[Output]:
        asked.append((len(requests), options))
        return [Output(text, 1, 1, 0.0, True) for text in answers]

    monkeypatch.setattr(monitoring, "generate", generate)
    monitor = AnswerMonitor(base, FeatureStore(base.backbone), examples, name, rows=9, batch_size=2)
    assert monitor() == pytest.approx(expected)
    assert monitor.larger == (name == "format_compliance")
    assert asked == [(4, {"max_tokens": monitor.max_tokens, "batch_size": 2})]
    assert monitor.max_tokens > max(one.supervised for one in examples)


def test_a_monitor_asks_rows_from_all_over(lab, base) -> None:
    """A few rows, evenly spread: the first ones may all be one shoot's."""
    examples = lab.examples(7, "val")
    monitor = AnswerMonitor(
        base, FeatureStore(base.backbone), examples, "score_mae", rows=3, batch_size=2
    )
    assert [one.row.job_id for one in monitor.examples] == ["val0", "val2", "val4"]


def test_asking_changes_no_bit(lab, base, tmp_path) -> None:
    """With and without answers in between, dropout on: equal weights, equal losses."""
    results = []
    validation = lab.examples(2, "val")
    for number in range(2):
        lab.attach(base, live=False, dropout=0.2)
        seen = Recorder()
        features = FeatureStore(base.backbone)
        monitor = AnswerMonitor(
            base, features, validation, "format_compliance", rows=2, batch_size=2, max_tokens=8
        )
        trainer = lab.trainer(
            base,
            lab.examples(4),
            tmp_path / str(number),
            validation=validation,
            monitor=monitor if number else None,
            callbacks=[seen],
            max_steps=5,
            eval_every=2,
        )
        trainer.fit()
        results.append((lab.weights(base), seen.evals))
        assert trainer.state.value == (0.0 if number else None)
        lora.detach(base.model)
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]

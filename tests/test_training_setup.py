"""What a training is made of before its first update, and what is told of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mondrian_ft.errors import ConfigError, TrainingError
from mondrian_ft.pipeline import training
from mondrian_ft.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LoraMethod,
    Monitor,
    OptimizerConfig,
    OptimizerName,
    TrainerConfig,
)
from mondrian_ft.training import lock
from mondrian_ft.training.trainer import TrainState


class FakeRun:
    """Takes what a run is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


def test_two_processes_do_not_train_into_one_folder(tmp_path) -> None:
    """The second is refused before it reads a row."""
    run: Any = FakeRun(tmp_path)
    nothing: Any = None
    with (
        lock.held(tmp_path / "adapter", print),
        pytest.raises(TrainingError, match="is being trained into by process"),
    ):
        training.train(Config(), run, nothing, nothing, nothing, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"monitor": Monitor.score_mae}, "trainer.monitor=score_mae goes by validation rows"),
        ({"patience": 2}, "trainer.patience=2 goes by validation rows"),
    ],
)
def test_stopping_by_rows_that_are_not_there_is_refused(settings, told) -> None:
    """Patience without validation rows was once taken and never came into effect."""
    config = Config(trainer=TrainerConfig(**settings))
    nothing: Any = None
    with pytest.raises(TrainingError, match=told):
        training.monitor(config, nothing, nothing, nothing, [])


def test_the_monitor_is_what_the_config_names(lab, base) -> None:
    """By default nothing but the validation loss, which is measured anyway."""
    validation = lab.examples(3, "val")
    parts: Any = SimpleNamespace(train=[])
    features: Any = None
    assert training.monitor(Config(), base, features, parts, validation) is None
    config = Config(
        trainer=TrainerConfig(monitor=Monitor.format_compliance, monitor_rows=2),
        eval=EvalConfig(batch_size=3, max_tokens=20),
    )
    found = training.monitor(config, base, features, parts, validation)
    assert found is not None
    assert found.larger
    assert (len(found.examples), found.batch_size, found.max_tokens) == (2, 3, 20)


def test_a_row_longer_than_the_context_is_left_out_whole(lab, base, tmp_path) -> None:
    """Named with its length and the way to keep it; the others are as they were, none is cut."""
    rows = lab.rows(3)
    run: Any = FakeRun(tmp_path)
    config = Config(data=DataConfig(min_pixels=1024, max_pixels=16384))
    whole = training.encode_rows(config, run, base, rows)
    lengths = [len(one.tokens) for one in whole]
    assert run.warnings == []
    usual = base.backbone.longest
    base.backbone.longest = max(lengths) - 1
    try:
        kept = training.encode_rows(config, run, base, rows)
    finally:
        base.backbone.longest = usual
    longest = lengths.index(max(lengths))
    assert [one.row.job_id for one in kept] == [
        row.job_id for at, row in enumerate(rows) if at != longest
    ]
    assert [len(one.tokens) for one in kept] == [n for n in lengths if n != max(lengths)]
    (warning,) = run.warnings
    assert f"row {rows[longest].job_id} has {max(lengths)} tokens" in warning
    assert f"more than the {max(lengths) - 1} the model takes" in warning


def test_visits_are_written_row_by_row(lab, base, tmp_path) -> None:
    """In the order of the rows, so that two rows of one job are two."""
    run: Any = FakeRun(tmp_path)
    training.write_visits(run, lab.examples(2), TrainState(visits=[3, 0]))
    assert json.loads((tmp_path / "row_visits.json").read_text()) == [
        {"job_id": "row0", "advisor": "ansel", "visits": 3},
        {"job_id": "row1", "advisor": "ansel", "visits": 0},
    ]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LoraConfig(rank=0), "lora.rank is 0"),
        (lambda: LoraConfig(alpha=0.0), "lora.alpha is 0.0"),
        (lambda: LoraConfig(dropout=1.0), "lora.dropout is 1.0"),
        (lambda: LoraConfig(plus=0.5), "lora.plus is 0.5, but it must be 1 or more"),
        (lambda: TrainerConfig(max_bad_steps=-1), "trainer.max_bad_steps is -1"),
        (lambda: TrainerConfig(spike=1.0), "trainer.spike is 1.0, but it must be above 1"),
        (lambda: TrainerConfig(ema=1.0), "trainer.ema is 1.0, but it must be above 0 and below 1"),
        (lambda: TrainerConfig(monitor_rows=0), "trainer.monitor_rows is 0"),
        (
            lambda: OptimizerConfig(name=OptimizerName.adam),
            "optimizer.weight_decay is 0.01, but optimizer.name is adam",
        ),
        (
            lambda: Config(
                lora=LoraConfig(method=LoraMethod.dora),
                optimizer=OptimizerConfig(name=OptimizerName.muon),
            ),
            "optimizer.name is muon, which moves matrices, but lora.method is dora",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, told) -> None:
    """With the key, the value and the rule."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert told in str(caught.value)

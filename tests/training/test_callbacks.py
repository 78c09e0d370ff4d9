"""What is logged is what happened, on a terminal and in a pipe."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mondrian_ft.training.callbacks import Logging, Pace, Progress, Warnings
from mondrian_ft.training.trainer import TrainState, Update

UPDATE = Update(
    loss=1.5,
    grad_norm=0.7,
    learning_rate=1e-3,
    tokens=20,
    total_tokens=100,
    seconds=0.5,
    epoch=1,
    peak_memory=2_500_000_000,
    correct=15,
    slots=125,
    data_seconds=0.25,
)


def test_logging_passes_the_numbers_on() -> None:
    """Keys, units and kinds of the training log."""
    lines: list[tuple[str, int, dict[str, Any]]] = []
    logging = Logging(
        lambda metrics, step, kind: lines.append((kind, step, dict(metrics))), 10, "score_mae"
    )
    state = TrainState(step=3, val_loss=2.0, value=1.25, best_step=3, visits=[1, 2, 0], bad_steps=1)
    logging.on_step(state, UPDATE)
    logging.on_eval(state)
    logging.on_end(state)
    assert [(kind, step) for kind, step, _ in lines] == [("step", 3), ("eval", 3), ("end", 3)]
    assert lines[0][2].pop("padding_share") == pytest.approx(0.2)
    assert lines[0][2] == {
        "epoch": 1,
        "loss": 1.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "tokens_per_second": 200.0,
        "trained_tokens_per_second": 40.0,
        "trained_tokens": 20,
        "data_wait_seconds": 0.25,
        "token_accuracy": 0.75,
        "eta_seconds": 0.75 * 7,
        "bad_steps": 1,
        "peak_memory_gb": 2.5,
        "seconds": 0.5,
    }
    assert lines[1][2] == {"val_loss": 2.0, "best_step": 3, "score_mae": 1.25}
    assert lines[2][2] == {
        "rows_seen": 2,
        "rows": 3,
        "visits_min": 0,
        "visits_max": 2,
        "bad_steps": 1,
    }


def test_what_was_not_counted_is_not_logged() -> None:
    """A figure that nobody measured is absent, not zero."""
    lines: list[dict[str, Any]] = []
    logging = Logging(lambda metrics, step, kind: lines.append(dict(metrics)))
    logging.on_step(TrainState(step=1), replace(UPDATE, correct=None, slots=0))
    logging.on_eval(TrainState(val_loss=2.0))
    assert lines[0].keys().isdisjoint({"token_accuracy", "padding_share", "eta_seconds"})
    assert lines[1].keys() == {"val_loss", "best_step"}


def test_the_time_that_is_left_forgets_the_compiling_as_soon_as_it_can() -> None:
    """A first update had compiled for 90 s, and after the second one, of 0.1 s, three more were
    promised in two minutes and a quarter."""
    pace = Pace()
    pace.take(replace(UPDATE, seconds=90.0, data_seconds=0.0))
    assert pace.left(4) == 360
    pace.take(replace(UPDATE, seconds=0.1, data_seconds=0.0))
    assert pace.left(3) == pytest.approx(0.3)


def test_an_update_that_was_not_applied_is_told_once() -> None:
    """With its rows, and what was wrong with it."""
    told: list[str] = []
    warnings = Warnings(told.append, lambda update: f"has loss {update.loss:g}")
    warnings.on_step(TrainState(step=3), UPDATE)
    assert told == []
    warnings.on_step(TrainState(step=4), replace(UPDATE, applied=False, rows=("a", "b")))
    assert told == ["update 4 has loss 1.5 on rows a, b; it was not applied"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_and_memory(terminal: bool) -> None:
    """A bar on a terminal; in a pipe a line at the first and every tenth of the way."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress(console, 20) as progress:
        for step in range(1, 21):
            state = TrainState(step=step, val_loss=2.25)
            progress.on_step(state, UPDATE)
            progress.on_eval(state)
        progress.on_end(TrainState(step=20))
        if progress.bar:
            progress.bar.refresh()
    text = out.getvalue()
    assert "loss 1.500" in text
    assert "val 2.250" in text
    assert "200 tok/s" in text
    assert "2.5 GB" in text
    assert "right 75%" in text
    if not terminal:
        assert len(text.splitlines()) == 11
        assert "\x1b" not in text
        assert text.splitlines()[1].endswith("left 0:00:14")

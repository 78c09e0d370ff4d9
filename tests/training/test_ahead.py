"""An update that is queued before the last one's figures are read changes no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import DivergedError, Interrupted
from mondrian_ft.model import lora
from mondrian_ft.training import guard

# One row a batch: with two of them a CPU would divide its cores between rows and products
# differently while it waits.
ALONE = {"batch_size": 1}


class Recorder:
    def __init__(self) -> None:
        self.updates: list[Any] = []
        self.steps: list[int] = []
        self.validated: list[int] = []

    def on_step(self, state: Any, update: Any) -> None:
        self.updates.append(update)
        self.steps.append(state.step)

    def on_eval(self, state: Any) -> None:
        self.validated.append(state.step)

    def on_end(self, state: Any) -> None: ...


def fresh(lab: Any, base: Any) -> None:
    lora.detach(base.model)
    lab.attach(base, live=False)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_weights_and_figures_are_those_of_waiting(lab, base, tmp_path) -> None:
    """Bit for bit: adapter, state, and each update's loss, rate, rows and limits, in order."""
    examples, results = lab.examples(5), []
    for ahead in (False, True):
        fresh(lab, base)
        seen = Recorder()
        trainer = lab.trainer(
            base,
            examples,
            tmp_path / str(ahead),
            ahead=ahead,
            validation=examples[:1],
            callbacks=[seen],
            **ALONE,
        )
        trainer.fit()
        told = [
            (one.loss, one.grad_norm, one.learning_rate, one.rows, one.epoch, one.correct)
            for one in seen.updates
        ]
        results.append((lab.weights(base), trainer.state, told, seen))
    waited, ahead = results
    assert same(waited[0], ahead[0])
    assert waited[1:3] == ahead[1:3]
    assert ahead[3].steps == [1, 2, 3, 4, 5, 6]
    assert ahead[3].validated == [3, 6]


def test_the_seconds_of_all_updates_are_those_of_the_run(lab, base, tmp_path) -> None:
    """None of them is counted twice, and none but validation and saving is left out."""
    import time

    lab.attach(base, live=False)
    seen = Recorder()
    options: dict[str, Any] = {"save_every": 100, "eval_every": 100, **ALONE}
    trainer = lab.trainer(base, lab.examples(5), tmp_path, ahead=True, callbacks=[seen], **options)
    started = time.perf_counter()
    trainer.fit()
    taken = time.perf_counter() - started
    told = [one.seconds for one in seen.updates]
    assert 0.5 * taken < sum(told) <= taken
    assert min(told) > 0.1 * max(told[1:])


def test_it_really_is_queued_before_the_last_one_is_read(lab, base, tmp_path, monkeypatch) -> None:
    """And read before it is saved or evaluated: both are due after updates 2, 3, 4 and 6."""
    order: list[str] = []
    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, ahead=True, **ALONE)
    queue, read = trainer._queue, trainer._read
    monkeypatch.setattr(trainer, "_queue", lambda *a: (order.append("queue"), queue(*a))[1])
    monkeypatch.setattr(trainer, "_read", lambda *a: (order.append("read"), read(*a))[1])
    trainer.fit()
    assert "".join(one[0] for one in order) == "qqrr" + "qr" + "qr" + "qqrr"


def test_a_run_that_is_stopped_and_resumed_is_the_straight_one(
    lab, base, tmp_path, monkeypatch
) -> None:
    """Stopped after an update at which nothing was due, with limits that matter."""
    examples = lab.examples(5)
    monkeypatch.setattr(guard, "ENOUGH", 2)
    weights, states = [], []
    for stopped in (False, True):
        fresh(lab, base)
        folder = tmp_path / str(stopped)
        options: dict[str, Any] = {"ahead": True, "spike": 1.01, "max_bad_steps": 9, **ALONE}
        trainer = lab.trainer(base, examples, folder, save_every=100, **options)
        if stopped:
            asked = Recorder()
            trainer.callbacks = [asked]
            stopping(trainer, asked, monkeypatch)
            with pytest.raises(Interrupted, match="after update 5 of 6"):
                trainer.fit()
            monkeypatch.undo()
            monkeypatch.setattr(guard, "ENOUGH", 2)
            fresh(lab, base)
            trainer = lab.trainer(base, examples, folder, save_every=100, **options)
            trainer.checkpointer.restore(trainer, trainer.checkpointer.last())
            assert trainer.state.step == 5
        trainer.fit()
        weights.append(lab.weights(base))
        states.append(trainer.state)
    assert same(*weights)
    assert states[0] == states[1]


def stopping(trainer: Any, asked: Recorder, monkeypatch: Any) -> None:
    """A signal that comes while update 5 is under way, and the fourth has been read."""
    from contextlib import contextmanager

    from mondrian_ft.training import trainer as module

    @contextmanager
    def requested() -> Any:
        yield lambda: len(asked.steps) >= 4

    monkeypatch.setattr(module, "_stop_requested", requested)


def test_a_bad_update_ends_the_run_before_anything_is_saved(
    lab, base, tmp_path, monkeypatch
) -> None:
    """The one after it is under way by then; neither reaches a checkpoint."""
    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, ahead=True, save_every=100, **ALONE)
    read = trainer._read

    def spoilt(*queued: Any) -> Any:
        from dataclasses import replace

        update = read(*queued)
        return replace(update, applied=trainer.state.step != 1, loss=float("nan"))

    monkeypatch.setattr(trainer, "_read", spoilt)
    with pytest.raises(DivergedError, match="update 2 has loss nan"):
        trainer.fit()
    assert trainer.state.step == 1
    assert trainer.checkpointer.last() is None


def test_an_average_waits_for_every_update(lab, base, tmp_path) -> None:
    lab.attach(base, live=False)
    assert not lab.trainer(base, lab.examples(2), tmp_path, ahead=True, ema=0.9).ahead

"""The loop: what an update is, what is saved when, and how a run ends."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.errors import DivergedError, Interrupted
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx
from mondrian_ft.training.trainer import Trainer


class Recorder:
    """Looks on, noisily: it computes, draws no random numbers, and notes what it saw."""

    def __init__(self) -> None:
        self.updates: list[Any] = []
        self.evals: list[tuple[int, float]] = []
        self.ended: list[int] = []

    def on_step(self, state: Any, update: Any) -> None:
        self.updates.append(update)

    def on_eval(self, state: Any) -> None:
        self.evals.append((state.step, state.val_loss))

    def on_end(self, state: Any) -> None:
        self.ended.append(state.step)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_accumulation_is_weighted_by_tokens(lab, base, tmp_path, max_grad_norm) -> None:
    """4×1 = 2×2 = 1×4 on answers of different lengths; a mean of means is 15 % off."""
    examples = lab.examples(4)
    assert len({one.supervised for one in examples}) >= 3
    results = []
    for size in (1, 2, 4):
        lab.attach(base)
        trainer = lab.trainer(base, examples, tmp_path, max_grad_norm=max_grad_norm)
        batches = [
            collate(examples, range(at, at + size), base.pad_token) for at in range(0, 4, size)
        ]
        update = trainer.update(batches)
        results.append((update, lab.weights(base)))
        lora.detach(base.model)
    (first, weights), *others = results
    for update, other in others:
        assert update.loss == pytest.approx(first.loss, rel=1e-5)
        assert update.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
        assert update.tokens == first.tokens == sum(one.supervised for one in examples)
        assert update.total_tokens == sum(len(one.tokens) for one in examples)
        # AdamW's first update is nearly the gradient's sign, so compare where it is not tiny.
        for name, value in weights.items():
            off = np.abs(value - other[name])
            assert np.quantile(off, 0.99) < 2e-5, name


@pytest.mark.parametrize("bound", [0.0, 0.05, 1e6])
def test_the_gradient_is_clipped_to_its_global_norm(lab, base, tmp_path, bound) -> None:
    """Plain descent at rate 1 moves the weights by the clipped norm; 0 clips nothing."""
    from mlx.optimizers import SGD

    lab.attach(base)
    examples = lab.examples(2)
    trainer = lab.trainer(base, examples, tmp_path, max_grad_norm=bound)
    trainer.optimizer = SGD(learning_rate=1.0)
    before = lab.weights(base)
    update = trainer.update([collate(examples, range(2), base.pad_token)])
    after = lab.weights(base)
    moved = math.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before))
    assert update.grad_norm > 0.1
    expected = update.grad_norm if bound in (0.0, 1e6) else bound
    assert moved == pytest.approx(expected, rel=1e-4)


def test_every_row_is_seen_once_an_epoch(lab, base, tmp_path) -> None:
    """Seven rows in batches of two, two micro-batches an update: the tail is not dropped."""
    lab.attach(base, live=False)
    seen: list[tuple[int, ...]] = []
    trainer = lab.trainer(base, lab.examples(7), tmp_path, accumulate=2, max_steps=4)
    original = trainer.update

    def update(batches: Any) -> Any:
        seen.append(tuple(row for batch in batches for row in batch.rows))
        return original(batches)

    trainer.update = update
    result = trainer.fit()
    assert [len(rows) for rows in seen] == [4, 3, 4, 3]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(7))
    assert seen[0] + seen[1] != seen[2] + seen[3]
    assert result.state.visits == [2] * 7
    assert result.state.cursor.epoch == 2
    assert not result.stopped_early


def test_the_loss_falls_and_updates_report_what_was_used(lab, base, tmp_path) -> None:
    """One row over and over is learnt; the rates reported are the schedule's, in updates."""
    lab.attach(base, live=False)
    seen = Recorder()
    trainer = lab.trainer(base, lab.examples(1), tmp_path, rate=2e-2, callbacks=[seen])
    trainer.fit()
    losses = [update.loss for update in seen.updates]
    assert losses[-1] < losses[0] - 0.5
    cosine = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert [update.learning_rate for update in seen.updates] == pytest.approx(
        [1e-2, 2e-2, *[2e-2 * part for part in cosine]], rel=1e-4
    )
    assert [update.epoch for update in seen.updates] == list(range(6))
    assert all(update.grad_norm > 0 and update.peak_memory > 0 for update in seen.updates)


def test_a_dora_step_changes_directions_and_magnitudes(lab, base, tmp_path) -> None:
    """The second step moves A, B and m of every layer (in the first one B is zero, so A has no
    gradient); the loss falls, and what is validated is what was trained."""
    lab.attach(base, live=False, method="dora")
    start = lab.weights(base)
    seen = Recorder()
    examples = lab.examples(1)
    trainer = lab.trainer(
        base, examples, tmp_path, rate=2e-2, callbacks=[seen], validation=examples, max_steps=4
    )
    trainer.fit()
    trained = lab.weights(base)
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_a", "lora_b", "m"}
    assert [name for name, value in trained.items() if np.array_equal(value, start[name])] == []
    assert seen.updates[-1].loss < seen.updates[0].loss - 0.3
    # Validation ran at update 3 and at the end: the norms that were known at 3 are not used at 4.
    assert seen.evals[0][0] == 3
    assert trainer.validation_loss() == pytest.approx(seen.evals[-1][1], rel=1e-6)
    for layer in lora.lora_layers(base.model).values():
        layer["m"] = layer["m"] * 1.5
    assert trainer.validation_loss() != pytest.approx(seen.evals[-1][1], rel=1e-3)


def test_saving_comes_before_evaluating(lab, base, tmp_path, monkeypatch) -> None:
    """An evaluation that fails loses nothing (a too small validation set loses a run elsewhere)."""
    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, validation=lab.examples(1, "val"))
    events: list[tuple[str, int]] = []
    save = trainer.checkpointer.save

    def noted(trainer: Trainer) -> Any:
        events.append(("save", trainer.state.step))
        return save(trainer)

    def failing() -> float:
        events.append(("eval", trainer.state.step))
        raise RuntimeError("no memory")

    monkeypatch.setattr(trainer.checkpointer, "save", noted)
    monkeypatch.setattr(trainer, "validation_loss", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.fit()
    assert events == [("save", 2), ("save", 3), ("eval", 3)]
    assert trainer.checkpointer.last().name == "step_000003"


def test_the_last_update_is_saved_and_evaluated_once(lab, base, tmp_path) -> None:
    """The loop passes once more after the last update, whatever the cadences are."""
    lab.attach(base, live=False)
    seen = Recorder()
    trainer = lab.trainer(
        base,
        lab.examples(4),
        tmp_path,
        validation=lab.examples(2, "val"),
        callbacks=[seen],
        max_steps=5,
        save_every=1000,
        eval_every=3,
    )
    result = trainer.fit()
    assert [step for step, _ in seen.evals] == [3, 5]
    assert seen.ended == [5]
    assert trainer.checkpointer.last().name == "step_000005"
    assert result.state.val_loss == pytest.approx(trainer.validation_loss(), rel=1e-6)


def test_callbacks_change_no_bit(lab, base, tmp_path) -> None:
    """Whatever can change a number is in the loop: with and without onlookers, equal weights."""
    import io

    from rich.console import Console

    from mondrian_ft.training.callbacks import Logging, Progress, Warnings

    results = []
    for number in range(2):
        lab.attach(base, live=False, dropout=0.2)
        console = Console(file=io.StringIO())
        callbacks = [
            Recorder(),
            Logging(lambda *_: None, 4),
            Progress(console, 4),
            Warnings(print, lambda _: ""),
        ]
        trainer = lab.trainer(
            base,
            lab.examples(4),
            tmp_path / str(number),
            validation=lab.examples(2, "val"),
            max_steps=4,
            callbacks=callbacks if number else (),
        )
        trainer.fit()
        results.append(lab.weights(base))
        lora.detach(base.model)
    assert same(*results)


def test_equal_seeds_give_equal_runs_and_others_do_not(lab, base, tmp_path) -> None:
    """Same seed, same weights, with dropout; another seed of layers or of order differs."""
    results = []
    for number, (layers, order) in enumerate([(3, 0), (3, 0), (4, 0), (3, 1)]):
        lab.attach(base, live=False, dropout=0.2, seed=layers)
        trainer = lab.trainer(
            base, lab.examples(5), tmp_path / str(number), seed=order, max_steps=3
        )
        trainer.fit()
        results.append(lab.weights(base))
        lora.detach(base.model)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    assert not same(results[0], results[3])


def test_dropout_is_on_in_training_and_off_in_validation(lab, base, tmp_path) -> None:
    """A validation loss is the same twice, the training loss is not."""
    lab.attach(base, dropout=0.5)
    examples = lab.examples(2)
    trainer = lab.trainer(base, examples, tmp_path, validation=examples)
    assert trainer.validation_loss() == trainer.validation_loss()
    batch = collate(examples, range(2), base.pad_token)
    assert trainer.update([batch]).loss != pytest.approx(trainer.validation_loss(), rel=1e-7)
    assert base.model.training is False


def test_a_gradient_that_is_not_finite_is_not_applied(lab, base, tmp_path) -> None:
    """The error names the update, its rows and the last good checkpoint; weights stay."""
    lab.attach(base, live=False)
    examples = lab.examples(4)
    trainer = lab.trainer(base, examples, tmp_path)
    original, before = trainer.update, {}

    def update(batches: Any) -> Any:
        if trainer.state.step == 3:
            layer = next(iter(lora.lora_layers(base.model).values()))
            layer["lora_b"] = layer["lora_b"] + mx.array(float("nan"))
            before.update(lab.weights(base))
        return original(batches)

    trainer.update = update
    with pytest.raises(DivergedError) as caught:
        trainer.fit()
    message = str(caught.value)
    rows = trainer.batches.order(1)[2:4]
    assert "update 4 has loss nan" in message
    assert all(f"row{row}" in message for row in rows)
    assert "step_000003" in message
    for name, now in lab.weights(base).items():
        assert np.array_equal(before[name], now, equal_nan=True), name
    assert trainer.state.step == 3
    assert sum(trainer.state.visits) == 6
    assert int(trainer.optimizer.step.item()) == 3


def test_an_infinite_gradient_with_a_finite_loss_is_not_applied(
    lab, base, tmp_path, monkeypatch
) -> None:
    """The loss alone does not tell."""
    lab.attach(base)
    trainer = lab.trainer(base, lab.examples(2), tmp_path)
    before = lab.weights(base)
    from mondrian_ft.training import step

    real = step.losses_and_hits

    def planted(backbone: Any, *args: Any, **options: Any) -> Any:
        # 0, with an infinite slope.
        weight = next(iter(lora.lora_layers(backbone.model).values()))["lora_b"][0, 0]
        losses, hits = real(backbone, *args, **options)
        return losses + mx.sqrt(weight - mx.stop_gradient(weight)), hits

    monkeypatch.setattr(step, "losses_and_hits", planted)
    with pytest.raises(DivergedError, match=r"gradient norm inf .* no checkpoint was due yet"):
        trainer.fit()
    assert same(before, lab.weights(base))


def test_a_validation_loss_that_is_not_finite_ends_the_run(
    lab, base, tmp_path, monkeypatch
) -> None:
    """It once went into the state, and the next checkpoint failed on it with a traceback."""
    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, validation=lab.examples(1, "val"))
    monkeypatch.setattr(trainer, "validation_loss", lambda: math.nan)
    with pytest.raises(DivergedError, match="validation loss after update 3 is nan"):
        trainer.fit()


def test_patience_ends_a_run_that_no_longer_improves(lab, base, tmp_path, monkeypatch) -> None:
    """Two evaluations without a better loss; the best checkpoint is kept beside the last."""
    lab.attach(base, live=False)
    seen = Recorder()
    trainer = lab.trainer(
        base,
        lab.examples(4),
        tmp_path,
        validation=lab.examples(1, "val"),
        callbacks=[seen],
        max_steps=20,
        save_every=1,
        eval_every=1,
        patience=2,
    )
    losses = iter([5.0, 4.0, 4.5, 4.0])
    monkeypatch.setattr(trainer, "validation_loss", lambda: next(losses))
    result = trainer.fit()
    assert result.stopped_early
    assert (result.state.step, result.state.best_step) == (4, 2)
    assert seen.ended == [4]
    assert trainer.checkpointer.best().name == "step_000002"
    kept = sorted(path.name for path in trainer.checkpointer.folder.iterdir())
    assert kept == ["best.json", "step_000002", "step_000003", "step_000004"]


def test_a_batch_larger_than_the_data_is_all_of_it(lab, base, tmp_path) -> None:
    """Every row once an epoch, one update each; nothing is repeated to fill the batch."""
    lab.attach(base, live=False)
    seen = Recorder()
    trainer = lab.trainer(
        base, lab.examples(3), tmp_path, batch_size=64, accumulate=4, max_steps=2, callbacks=[seen]
    )
    trainer.fit()
    assert trainer.state.visits == [2, 2, 2]
    assert [update.epoch for update in seen.updates] == [0, 1]
    assert all(len(update.rows) == 3 for update in seen.updates)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_update_with_a_checkpoint(lab, base, tmp_path, which) -> None:
    """Ctrl-C and SIGTERM: the update is finished, saved, and the handlers are put back."""
    before = signal.getsignal(which)

    class Press(Recorder):
        def on_step(self, state: Any, update: Any) -> None:
            if state.step == 3:
                os.kill(os.getpid(), which)

    lab.attach(base, live=False)
    trainer = lab.trainer(
        base, lab.examples(4), tmp_path, callbacks=[Press()], save_every=100, eval_every=100
    )
    with pytest.raises(Interrupted, match="stopped after update 3 of 6") as caught:
        trainer.fit()
    assert caught.value.exit_code == 130
    assert trainer.checkpointer.last().name == "step_000003"
    assert str(trainer.checkpointer.last()) in str(caught.value)
    assert signal.getsignal(which) is before


def test_a_second_signal_acts_at_once(lab, base, tmp_path) -> None:
    """For whoever cannot wait for the update to end."""

    class Press(Recorder):
        def on_step(self, state: Any, update: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, callbacks=[Press()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_a_trainer_without_rows_is_refused(lab, base, tmp_path) -> None:
    """One sentence, rather than an error from numpy in the first update."""
    from mondrian_ft.errors import DataError

    with pytest.raises(DataError, match="no rows to train on"):
        lab.trainer(base, [], tmp_path)


def test_gradient_checkpointing_trains_as_without(lab, base, tmp_path) -> None:
    """The knob is read, and costs time only."""
    results = []
    for flag in (False, True):
        lab.attach(base, live=False)
        trainer = lab.trainer(
            base, lab.examples(4), tmp_path / str(flag), grad_checkpoint=flag, max_steps=3
        )
        trainer.fit()
        results.append(lab.weights(base))
        lora.detach(base.model)
    for name, value in results[0].items():
        assert np.allclose(value, results[1][name], atol=2e-5), name

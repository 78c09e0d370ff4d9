"""Updates that are not applied: which, what is told of them, and when a run gives up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.errors import DivergedError
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx
from mondrian_ft.training.callbacks import Warnings
from mondrian_ft.training.trainer import Update

from .test_trainer import Recorder, same


def spoil(trainer: Any, row: int) -> None:
    """Let one row's picture be NaN, as a damaged cache could make it: loss and gradient are too."""
    get = trainer.features.get
    name = trainer.batches.examples[row].row.image_sha256

    def spoilt(photographs: Any) -> Any:
        found = get(photographs)
        return [
            replace(one, features=one.features * mx.array(math.nan)) if key == name else one
            for (key, _), one in zip(photographs, found, strict=True)
        ]

    trainer.features.get = spoilt


def test_an_update_that_is_not_finite_is_left_out(lab, base, tmp_path) -> None:
    """The run goes on as if those rows had not been there, and says which they were.

    Weights and optimizer are those of a run that did nothing in those updates.
    """
    told: list[str] = []
    results = []
    examples = lab.examples(4)
    for number in range(2):
        lora.detach(base.model)
        lab.attach(base, live=False)
        seen = Recorder()
        trainer = lab.trainer(
            base, examples, tmp_path / str(number), max_bad_steps=3, callbacks=[seen]
        )
        if number:
            update = trainer.update

            def skipping(batches: Any, update: Any = update, trainer: Any = trainer) -> Any:
                if all(2 not in batch.rows for batch in batches):
                    return update(batches)
                return Update(math.nan, math.nan, 0.0, 1, 1, 1.0, 0, 0, applied=False)

            trainer.update = skipping
        else:
            spoil(trainer, 2)
            trainer.callbacks = [seen, Warnings(told.append, trainer.fault)]
        trainer.fit()
        results.append((lab.weights(base), trainer))
    (weights, trainer), (expected, other) = results
    assert same(weights, expected)
    assert all(np.isfinite(value).all() for value in weights.values())
    # Six updates are three epochs of two, each with one update of row 2 and its neighbour.
    assert trainer.state == other.state
    assert trainer.state.step == 6
    assert (trainer.state.bad_steps, sum(trainer.state.visits)) == (3, 6)
    assert trainer.state.visits[2] == 0
    assert int(trainer.optimizer.step.item()) == 3
    assert len(told) == 3
    assert all("has loss nan" in sentence and "row2" in sentence for sentence in told)


def test_too_many_bad_updates_in_a_row_end_the_run(lab, base, tmp_path) -> None:
    """All rows are bad: after as many as may be, one more says so and names the last checkpoint."""
    lab.attach(base, live=False)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, max_bad_steps=2, save_every=1)
    for row in range(4):
        spoil(trainer, row)
    before = lab.weights(base)
    with pytest.raises(DivergedError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert message.startswith("update 3 has loss nan and gradient norm nan on rows row")
    assert "neither was what came before it (2 in a row)" in message
    assert "step_000002" in message
    assert same(before, lab.weights(base))
    assert trainer.state.bad_in_row == 2


def test_a_spike_is_left_out(lab, base, tmp_path) -> None:
    """A loss far above those before it: finite, yet not applied, and the sentence says why."""
    lab.attach(base)
    trainer = lab.trainer(base, lab.examples(2), tmp_path, spike=3.0, max_grad_norm=0.0)
    batch = collate(trainer.batches.examples, range(2), base.pad_token)
    before = lab.weights(base)
    trainer.state.losses, trainer.state.norms = [0.5] * 30, [1e6] * 30
    update = trainer.update([batch])
    assert update.loss > 1.5
    assert not update.applied
    assert same(before, lab.weights(base))
    assert int(trainer.optimizer.step.item()) == 0
    assert "far above those before it (limits 1.5 and 3e+06)" in trainer.fault(update)
    trainer.state.losses, trainer.state.norms = [1e6] * 30, [1e-6] * 30
    assert not trainer.update([batch]).applied
    # A gradient that is not even clipped is none, however small those before it were.
    trainer.max_grad_norm = 1e6
    assert trainer.update([batch]).applied
    assert not same(before, lab.weights(base))


def test_what_a_spike_is_judged_by_is_kept(lab, base, tmp_path) -> None:
    """The latest applied updates, and no more of them than are needed; a checkpoint has them."""
    from mondrian_ft.training import guard

    lab.attach(base, live=False)
    seen = Recorder()
    trainer = lab.trainer(base, lab.examples(2), tmp_path, callbacks=[seen])
    trainer.state.losses = trainer.state.norms = [9.0] * guard.WINDOW
    trainer.fit()
    assert len(trainer.state.losses) == len(trainer.state.norms) == guard.WINDOW + 1
    assert trainer.state.losses[-6:] == [update.loss for update in seen.updates]
    other = lab.trainer(base, lab.examples(2), tmp_path)
    other.checkpointer.restore(other, other.checkpointer.last())
    assert other.state == trainer.state

"""Where a run stands, what an update did, and who may look on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..data.batches import Cursor
from . import guard


@dataclass
class TrainState:
    """Where a run stands; with the adapter and the optimizer, all that a resume needs.

    Attributes:
        step: updates done, those that were not applied among them.
        cursor: where the batch stream stands.
        best_loss, best_step: validation loss at the best evaluation so far, and its step.
        best_value: what the monitor measured there; None without a monitor.
        val_loss: the latest validation loss, None before the first.
        value: what the monitor measured last, None without one or where it could not.
        stale: evaluations since the best one.
        visits: how often each training row was trained on.
        losses, norms: of the latest applied updates, :data:`guard.WINDOW` and one more at most.
        bad_steps: updates that were not applied.
        bad_in_row: those of them since the last applied one.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_loss: float = math.inf
    best_step: int | None = None
    best_value: float | None = None
    val_loss: float | None = None
    value: float | None = None
    stale: int = 0
    visits: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bad_steps: int = 0
    bad_in_row: int = 0

    def observe(self, loss: float) -> None:
        """Take note of a validation loss measured at this step."""
        self.val_loss = loss
        self._rank(loss < self.best_loss)

    def observe_value(self, loss: float, value: float | None, *, larger: bool) -> None:
        """Take note of what the monitor measured at this step, and of the validation loss.

        The loss decides between equal values, such as answers that all keep the format. A value
        that could not be measured is never the best.

        Args:
            larger: whether a larger value is a better one.
        """
        self.val_loss, self.value = loss, value
        better = False
        if value is not None:
            sign = -1 if larger else 1
            best = math.inf if self.best_value is None else sign * self.best_value
            better = (sign * value, loss) < (best, self.best_loss)
        self._rank(better)

    def _rank(self, better: bool) -> None:
        if better and self.val_loss is not None:
            self.best_loss, self.best_step, self.stale = self.val_loss, self.step, 0
            self.best_value = self.value
        else:
            self.stale += 1

    def advance(self, update: Update, rows: Sequence[int], cursor: Cursor) -> None:
        """Take note of an update on these rows; the stream stands at ``cursor`` after it."""
        self.step += 1
        self.cursor = cursor
        if not update.applied:
            self.bad_steps += 1
            self.bad_in_row += 1
            return
        self.bad_in_row = 0
        for row in rows:
            self.visits[row] += 1
        # One more than is looked at: see Trainer.limits.
        self.losses = [*self.losses, update.loss][-guard.WINDOW - 1 :]
        self.norms = [*self.norms, update.grad_norm][-guard.WINDOW - 1 :]


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        loss: mean cross-entropy of the trained tokens, in nats, before the update.
        grad_norm: global norm of the gradient before clipping.
        learning_rate: of this update.
        tokens: trained tokens; total_tokens: all real tokens.
        seconds: wall time; of one with another queued behind it, until that one was begun.
        epoch: from 0.
        peak_memory: bytes, the most MLX has held since the run began.
        applied: whether the weights were changed; not where loss or gradient was not finite or
            above the limits of :meth:`Trainer.limits`.
        correct: trained tokens that were the most likely ones, None if they were not counted.
        slots: tokens of the batches, padding among them; 0 if not counted.
        data_seconds: wall time spent waiting for the batches, before ``seconds``; 0 of one that was
            queued while another ran, as the device did not wait.
        rows: job ids of its rows.
        limits: the highest loss and gradient norm it might have.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    total_tokens: int
    seconds: float
    epoch: int
    peak_memory: int
    applied: bool = True
    correct: int | None = None
    slots: int = 0
    data_seconds: float = 0.0
    rows: tuple[str, ...] = ()
    limits: tuple[float, float] = (math.inf, math.inf)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its final state, and whether patience ended it early."""

    state: TrainState
    stopped_early: bool
    seconds: float


class Callback(Protocol):
    """Looks on. Nothing a callback does may change a number of the run."""

    def on_step(self, state: TrainState, update: Update) -> None: ...
    def on_eval(self, state: TrainState) -> None: ...
    def on_end(self, state: TrainState) -> None: ...


class Monitor(Protocol):
    """Measures the model as it is now, and says which of two values is better.

    ``larger`` is whether the larger one is. A value that could not be measured is None. It may
    change no number of the run: neither weights nor random state.
    """

    @property
    def larger(self) -> bool: ...
    def __call__(self) -> float | None: ...

"""The loop.

Whatever can change a number stands here; callbacks only look on. The loop passes once more after
the last update, so that the final checkpoint and evaluation happen in the same place as all
others, and it always saves before it evaluates: an evaluation that fails loses nothing.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..data.batches import Batch, BatchStream, Cursor, Example, in_order
from ..data.rooms import Rooms
from ..errors import DivergedError, Interrupted
from ..model import lanes
from ..model.backend import ON_CPU, mx, number
from ..model.features import FeatureStore
from ..model.lora_layers import summed
from ..model.qwen3_vl import Qwen3VL
from . import guard
from .average import Average
from .loss import device_parts, evaluating, token_losses
from .step import UpdateStep


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
        losses, norms: of the latest applied updates, :data:`guard.WINDOW` at most.
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
        self.losses = [*self.losses, update.loss][-guard.WINDOW :]
        self.norms = [*self.norms, update.grad_norm][-guard.WINDOW :]


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        loss: mean cross-entropy of the trained tokens, in nats, before the update.
        grad_norm: global norm of the gradient before clipping.
        learning_rate: of this update.
        tokens: trained tokens; total_tokens: all real tokens.
        seconds: wall time.
        epoch: from 0.
        peak_memory: bytes, the most MLX has held since the run began.
        applied: whether the weights were changed; not where loss or gradient was not finite or
            above the limits of :meth:`Trainer.limits`.
        correct: trained tokens that were the most likely ones, None if they were not counted.
        slots: tokens of the batches, padding among them; 0 if not counted.
        data_seconds: wall time spent waiting for the batches, before ``seconds``.
        rows: job ids of its rows.
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


class Checkpointer(Protocol):
    """Keeps the state of a run on disk; see ``training.checkpoint``."""

    def save(self, trainer: Trainer) -> Path: ...
    def mark_best(self, step: int) -> None: ...
    def last(self) -> Path | None: ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its final state, and whether patience ended it early."""

    state: TrainState
    stopped_early: bool
    seconds: float


class Trainer:
    """Trains the LoRA layers that are in a backbone's model.

    Args:
        backbone: the forward; its model carries the LoRA layers and is otherwise frozen.
        optimizer: an MLX optimizer whose rate is a schedule of updates.
        batches: where micro-batches come from.
        features: each photograph through the tower once.
        validation: rows for the validation loss; may be empty, then there is none.
        checkpointer: keeps checkpoints.
        max_steps: updates in all, 1 or more.
        accumulate: micro-batches of an update.
        max_grad_norm: global norm the gradient is clipped to; 0 leaves it as it is.
        save_every, eval_every: in updates.
        patience: evaluations without improvement that end the run; None never does.
        monitor: what an evaluation is ranked by; None for the validation loss.
        max_bad_steps: updates in a row that may be left out as not finite or a spike; one more
            ends the run.
        spike: see :func:`guard.limits`; None knows no spikes.
        ema: decay of the average of the adapter that is evaluated and kept, None for none.
        grad_checkpoint: recompute layers in the backward pass to save memory.
        callbacks: who looks on.
    """

    def __init__(
        self,
        backbone: Qwen3VL,
        optimizer: Any,
        batches: BatchStream,
        features: FeatureStore,
        validation: Sequence[Example],
        checkpointer: Checkpointer,
        *,
        max_steps: int,
        accumulate: int = 1,
        max_grad_norm: float = 1.0,
        save_every: int,
        eval_every: int,
        patience: int | None = None,
        monitor: Monitor | None = None,
        max_bad_steps: int = 0,
        spike: float | None = None,
        ema: float | None = None,
        grad_checkpoint: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.backbone = backbone
        self.model = backbone.model
        self.optimizer = optimizer
        self.batches = batches
        self.features = features
        self.validation = validation
        self.checkpointer = checkpointer
        self.max_steps = max_steps
        self.accumulate = accumulate
        self.max_grad_norm = max_grad_norm
        self.save_every = save_every
        self.eval_every = eval_every
        self.patience = patience
        self.monitor = monitor
        self.max_bad_steps = max_bad_steps
        self.spike = spike
        self.average = None if ema is None else Average(ema)
        self.grad_checkpoint = grad_checkpoint
        self.callbacks = callbacks
        self.state = TrainState(visits=[0] * len(batches.examples))
        self._step: UpdateStep | None = None
        self._rooms: Rooms | None = None

    def fit(self) -> TrainResult:
        """Train from the present state to the end.

        Raises:
            DivergedError: more than ``max_bad_steps`` updates in a row were not finite, or spikes;
                none of them was applied. Or the validation loss is not finite.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole update was written.
        """
        state, started = self.state, time.perf_counter()
        self.batches.cursor = state.cursor
        with _stop_requested() as stop:
            while True:
                last = state.step == self.max_steps
                evaluate = last or self._due(self.eval_every)
                if evaluate or self._due(self.save_every):
                    self.checkpointer.save(self)
                if evaluate and self.validation:
                    self._evaluate()
                early = self.patience is not None and state.stale >= self.patience
                if last or early:
                    for callback in self.callbacks:
                        callback.on_end(state)
                    return TrainResult(state, early and not last, time.perf_counter() - started)
                if stop():
                    path = self.checkpointer.save(self)
                    raise Interrupted(
                        f"training was stopped after update {state.step} of {self.max_steps}; "
                        f"everything up to there is in {path}"
                    )
                self._advance()

    def _evaluate(self) -> None:
        """Validation loss and monitor, of the average if there is one."""
        state = self.state
        with self.average.worn(self.model) if self.average else nullcontext():
            loss = self.validation_loss()
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the validation loss after update {state.step} is {loss:g}, so the model can "
                    "no longer be used; lower optimizer.learning_rate and start again, or go on "
                    f"from an earlier checkpoint than step {state.step}"
                )
            if self.monitor is None:
                state.observe(loss)
            else:
                state.observe_value(loss, self.monitor(), larger=self.monitor.larger)
        if state.best_step == state.step:
            self.checkpointer.mark_best(state.step)
        for callback in self.callbacks:
            callback.on_eval(state)

    def _advance(self) -> None:
        """One update on the next rows, applied or not."""
        state, asked = self.state, time.perf_counter()
        batches = self.batches.update(self.accumulate)
        waited = time.perf_counter() - asked
        names = tuple(example.row.job_id for batch in batches for example in batch.examples)
        update = replace(self.update(batches), data_seconds=waited, rows=names)
        if not update.applied and state.bad_in_row >= self.max_bad_steps:
            raise self._diverged(update)
        state.advance(update, [row for batch in batches for row in batch.rows], self.batches.cursor)
        if self.average is not None and update.applied:
            self.average.take(self.model, state.step - state.bad_steps)
        for callback in self.callbacks:
            callback.on_step(state, update)

    def limits(self) -> tuple[float, float]:
        """The highest loss and gradient norm the next update may have to be applied."""
        return guard.limits(
            self.state.losses, self.state.norms, factor=self.spike, floor=self.max_grad_norm
        )

    def update(self, micro_batches: Sequence[Batch]) -> Update:
        """One update from one or more micro-batches, weighted by their trained tokens.

        The gradient is that of the mean over all trained tokens of the update, however they are
        divided into micro-batches. An update that is not finite, or above :meth:`limits`, changes
        neither weights nor optimizer.
        """
        started = time.perf_counter()
        count = sum(batch.supervised for batch in micro_batches)
        rooms = self._shapes()
        prepared = [
            device_parts(batch, self.backbone, self.features, rooms.of(batch) if rooms else None)
            for batch in micro_batches
        ]
        step = self._stepper()
        with evaluating(max(len(parts) for parts in prepared)):
            done = step(prepared, count, self.limits())
            # One wait for everything: the figures cost no other.
            mx.eval(step.arrays(), done.loss, done.grad_norm, done.applied, done.correct)
        return Update(
            loss=number(done.loss),
            grad_norm=number(done.grad_norm),
            learning_rate=number(self.optimizer.learning_rate),
            tokens=count,
            total_tokens=sum(
                len(example.tokens) for batch in micro_batches for example in batch.examples
            ),
            seconds=time.perf_counter() - started,
            epoch=self.state.cursor.epoch,
            peak_memory=mx.get_peak_memory(),
            applied=bool(done.applied.item()),
            correct=int(number(done.correct)),
            slots=sum(batch.tokens.size for batch in micro_batches),
        )

    def _shapes(self) -> Rooms | None:
        """The shapes of this run's batches where steps are compiled."""
        if self._rooms is None and not ON_CPU:
            self._rooms = Rooms(self.batches.examples, self.batches.batch_size)
        return self._rooms

    def _stepper(self) -> UpdateStep:
        if self._step is None or self._step.optimizer is not self.optimizer:
            self._step = UpdateStep(
                self.backbone,
                self.optimizer,
                max_grad_norm=self.max_grad_norm,
                checkpoint=self.grad_checkpoint,
            )
        return self._step

    def validation_loss(self) -> float:
        """Mean cross-entropy (nats) over all trained tokens of all validation rows."""
        self.model.eval()
        return mean_loss(
            self.backbone,
            in_order(self.validation, self.batches.batch_size, self.batches.pad_token),
            self.features,
        )

    def _due(self, every: int) -> bool:
        return self.state.step > 0 and self.state.step % every == 0

    def _diverged(self, update: Update) -> DivergedError:
        saved = self.checkpointer.last()
        back = f"the last good checkpoint is {saved}" if saved else "no checkpoint was due yet"
        before = self.state.bad_in_row
        so_far = f", and neither was what came before it ({before} in a row)" if before else ""
        return DivergedError(
            f"update {self.state.step + 1} {self.fault(update)} on rows {', '.join(update.rows)}; "
            f"it was not applied{so_far}, and {back}; lower optimizer.learning_rate or leave those "
            "rows out"
        )

    def fault(self, update: Update) -> str:
        """What is wrong with an update that was not applied, as part of a sentence."""
        told = f"has loss {update.loss:g} and gradient norm {update.grad_norm:g}"
        if math.isfinite(update.loss) and math.isfinite(update.grad_norm):
            loss, norm = self.limits()
            told += f", far above those before it (limits {loss:.3g} and {norm:.3g})"
        return told


def mean_loss(backbone: Qwen3VL, batches: Iterator[Batch], features: FeatureStore) -> float:
    """Mean cross-entropy (nats) over all trained tokens of some batches."""
    total, count = 0.0, 0
    for batch in batches:
        parts = device_parts(batch, backbone, features)
        at_a_time, sums = lanes.count(len(parts)), []
        with summed(backbone.model):
            for at, part in enumerate(parts):
                with lanes.lane(at, at_a_time):
                    sums.append(token_losses(backbone, *part).sum())
        with evaluating(len(parts)):
            mx.eval(sums)
        total += sum(number(one) for one in sums)
        count += batch.supervised
    return total / count


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag that the loop reads between two updates.

    A second signal acts at once, for whoever cannot wait for the update to end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    for one in before:
        signal.signal(one, note)
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

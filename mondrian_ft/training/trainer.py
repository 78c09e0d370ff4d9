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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..data.batches import Batch, BatchStream, Cursor, Example, in_order
from ..data.rooms import Rooms
from ..errors import DivergedError, Interrupted
from ..model.backend import ON_CPU, mx, number
from ..model.features import FeatureStore
from ..model.qwen3_vl import Qwen3VL
from .loss import device_parts, evaluating, token_losses
from .step import UpdateStep


@dataclass
class TrainState:
    """Where a run stands; with the adapter and the optimizer, all that a resume needs.

    Attributes:
        step: updates done.
        cursor: where the batch stream stands.
        best_loss, best_step: lowest validation loss so far, and the step it was measured at.
        val_loss: the latest validation loss, None before the first.
        stale: evaluations since the best one.
        visits: how often each training row was seen.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_loss: float = math.inf
    best_step: int | None = None
    val_loss: float | None = None
    stale: int = 0
    visits: list[int] = field(default_factory=list)

    def observe(self, loss: float) -> None:
        """Take note of a validation loss measured at this step."""
        self.val_loss = loss
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
        else:
            self.stale += 1


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
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    total_tokens: int
    seconds: float
    epoch: int
    peak_memory: int


class Callback(Protocol):
    """Looks on. Nothing a callback does may change a number of the run."""

    def on_step(self, state: TrainState, update: Update) -> None: ...
    def on_eval(self, state: TrainState) -> None: ...
    def on_end(self, state: TrainState) -> None: ...


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
        self.grad_checkpoint = grad_checkpoint
        self.callbacks = callbacks
        self.state = TrainState(visits=[0] * len(batches.examples))
        self._step: UpdateStep | None = None
        self._rooms: Rooms | None = None

    def fit(self) -> TrainResult:
        """Train from the present state to the end.

        Raises:
            DivergedError: a loss or gradient is not finite; that update was not applied. Or the
                validation loss is not.
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
                    loss = self.validation_loss()
                    if not math.isfinite(loss):
                        raise DivergedError(
                            f"the validation loss after update {state.step} is {loss:g}, so the "
                            "model can no longer be used; lower optimizer.learning_rate and start "
                            f"again, or go on from an earlier checkpoint than step {state.step}"
                        )
                    state.observe(loss)
                    if state.best_step == state.step:
                        self.checkpointer.mark_best(state.step)
                    for callback in self.callbacks:
                        callback.on_eval(state)
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
                update = self.update(self.batches.update(self.accumulate))
                state.step += 1
                state.cursor = self.batches.cursor
                for callback in self.callbacks:
                    callback.on_step(state, update)

    def update(self, micro_batches: Sequence[Batch]) -> Update:
        """One update from one or more micro-batches, weighted by their trained tokens.

        The gradient is that of the mean over all trained tokens of the update, however they are
        divided into micro-batches.

        Raises:
            DivergedError: loss or gradient norm is not finite. Nothing was changed.
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
            done = step(prepared, count)
            # Weights and optimizer are as they were if loss or norm is not finite.
            mx.eval(step.arrays(), done.loss, done.grad_norm)
        mean, norm = number(done.loss), number(done.grad_norm)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise self._diverged(micro_batches, mean, norm)
        for batch in micro_batches:
            for row in batch.rows:
                self.state.visits[row] += 1
        return Update(
            loss=mean,
            grad_norm=norm,
            learning_rate=number(self.optimizer.learning_rate),
            tokens=count,
            total_tokens=sum(
                len(example.tokens) for batch in micro_batches for example in batch.examples
            ),
            seconds=time.perf_counter() - started,
            epoch=self.state.cursor.epoch,
            peak_memory=mx.get_peak_memory(),
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

    def _diverged(self, micro_batches: Sequence[Batch], loss: float, norm: float) -> DivergedError:
        rows = [example.row.job_id for batch in micro_batches for example in batch.examples]
        saved = self.checkpointer.last()
        back = f"the last good checkpoint is {saved}" if saved else "no checkpoint was due yet"
        return DivergedError(
            f"update {self.state.step + 1} has loss {loss:g} and gradient norm {norm:g} on rows "
            f"{', '.join(rows)}; it was not applied, and {back}; lower optimizer.learning_rate or "
            "leave those rows out"
        )


def mean_loss(backbone: Qwen3VL, batches: Iterator[Batch], features: FeatureStore) -> float:
    """Mean cross-entropy (nats) over all trained tokens of some batches."""
    total, count = 0.0, 0
    for batch in batches:
        parts = device_parts(batch, backbone, features)
        with evaluating(len(parts)):
            sums = [token_losses(backbone, *part).sum() for part in parts]
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

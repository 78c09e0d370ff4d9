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
from .parallel import ALONE, World
from .state import Callback, Monitor, TrainResult, TrainState, Update
from .step import Stepped, UpdateStep


@dataclass(frozen=True)
class _Queued:
    """An update under way: what is known of it before the device has answered."""

    told: Update
    done: Stepped
    learning_rate: mx.array
    started: float
    rows: tuple[int, ...] = ()
    cursor: Cursor = field(default_factory=Cursor)


class Checkpointer(Protocol):
    """Keeps the state of a run on disk; see ``training.checkpoint``."""

    def save(self, trainer: Trainer) -> Path: ...
    def mark_best(self, step: int) -> None: ...
    def last(self) -> Path | None: ...


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
        ahead: queue an update before the figures of the one before it are read, so that a GPU is
            never without work; None for yes on a GPU that has the memory for it.
        callbacks: who looks on.
        world: the processes that train together.
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
        ahead: bool | None = None,
        callbacks: Sequence[Callback] = (),
        world: World = ALONE,
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
        # On a CPU an update takes the cores that would queue the next one. An average is taken of
        # every update's weights, when it is known whether they are new.
        self.ahead = ema is None and world.size == 1 and (not ON_CPU if ahead is None else ahead)
        self.callbacks = callbacks
        self.world = world
        self.state = TrainState(visits=[0] * len(batches.examples))
        self._step: UpdateStep | None = None
        self._rooms: Rooms | None = None
        self._queued: _Queued | None = None

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
                at = state.step + (self._queued is not None)
                last, stopping = at == self.max_steps, self.world.stopping(stop())
                evaluate = last or _due(at, self.eval_every)
                save = evaluate or _due(at, self.save_every)
                if save or stopping:
                    self._settle()
                if save:
                    self.checkpointer.save(self)
                if evaluate and self.validation:
                    self._evaluate()
                early = self.patience is not None and state.stale >= self.patience
                if last or early:
                    for callback in self.callbacks:
                        callback.on_end(state)
                    return TrainResult(state, early and not last, time.perf_counter() - started)
                if stopping:
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
                value = self.world.from_first(self.monitor)
                state.observe_value(loss, value, larger=self.monitor.larger)
        if state.best_step == state.step:
            self.checkpointer.mark_best(state.step)
        for callback in self.callbacks:
            callback.on_eval(state)

    def _advance(self) -> None:
        """One update on the next rows, applied or not; queued only, where ``ahead`` says so."""
        asked = time.perf_counter()
        batches = self.batches.update(self.accumulate)
        waited = time.perf_counter() - asked
        rows = [row for batch in batches for row in batch.rows]
        names = tuple(example.row.job_id for batch in batches for example in batch.examples)
        cursor = self.batches.cursor
        if not self.ahead:
            self._take(replace(self.update(batches), data_seconds=waited, rows=names), rows, cursor)
            return
        busy = self._queued is not None
        queued = self._queue(batches)
        told = replace(queued.told, data_seconds=0.0 if busy else waited, rows=names)
        # While the device works on this one, the figures of the one before are read.
        self._settle(queued.started)
        self._queued = replace(queued, told=told, rows=tuple(rows), cursor=cursor)

    def _settle(self, following: float | None = None) -> None:
        """Wait for the update that is under way, if one is.

        Args:
            following: when the one after it was begun; None where that waits for this one.
        """
        if self._queued is not None:
            queued, self._queued = self._queued, None
            self._take(self._read(queued, following), queued.rows, queued.cursor)

    def _take(self, update: Update, rows: Sequence[int], cursor: Cursor) -> None:
        """Take note of an update."""
        state = self.state
        if not update.applied and state.bad_in_row >= self.max_bad_steps:
            raise self._diverged(update)
        state.advance(update, rows, cursor)
        if self.average is not None and update.applied:
            self.average.take(self.model, state.step - state.bad_steps)
        for callback in self.callbacks:
            callback.on_step(state, update)

    def limits(self) -> tuple[float, float]:
        """The highest loss and gradient norm the next update may have to be applied.

        With ``ahead`` those of the update before it do not count: they are not always known yet,
        and a run that was stopped and resumed there must not differ.
        """
        state = self.state
        losses, norms = state.losses, state.norms
        if self.ahead and self._queued is None and losses and not state.bad_in_row:
            losses, norms = losses[:-1], norms[:-1]
        return guard.limits(
            losses[-guard.WINDOW :],
            norms[-guard.WINDOW :],
            factor=self.spike,
            floor=self.max_grad_norm,
        )

    def update(self, micro_batches: Sequence[Batch]) -> Update:
        """One update from one or more micro-batches, weighted by their trained tokens.

        The gradient is that of the mean over all trained tokens of the update, however they are
        divided into micro-batches. An update that is not finite, or above :meth:`limits`, changes
        neither weights nor optimizer.
        """
        return self._read(self._queue(micro_batches))

    def _queue(self, micro_batches: Sequence[Batch]) -> _Queued:
        """Start an update; the device may still be at the one before."""
        started, limits = time.perf_counter(), self.limits()
        count = sum(batch.supervised for batch in micro_batches)
        rooms, stream = self._shapes(), self.batches
        most = self.world.most(stream.batch_size, self.accumulate)
        prepared = [
            device_parts(batch, self.backbone, self.features, rooms.of(batch) if rooms else None)
            for batch in self.world.share(micro_batches, stream.examples, most, stream.pad_token)
        ]
        step = self._stepper()
        self.world.step = self.state.step
        self.world.seed(stream.seed, self.state.step)
        with evaluating(max((len(parts) for parts in prepared), default=1)):
            done = step(prepared, count, limits)
            # One wait for everything: the figures cost no other.
            wait = mx.async_eval if self.ahead else mx.eval
            wait(step.arrays(), done.loss, done.grad_norm, done.applied, done.correct)
        told = Update(
            loss=math.nan,
            grad_norm=math.nan,
            learning_rate=math.nan,
            tokens=count,
            total_tokens=sum(
                len(example.tokens) for batch in micro_batches for example in batch.examples
            ),
            seconds=math.nan,
            epoch=self.state.cursor.epoch if self._queued is None else self._queued.cursor.epoch,
            peak_memory=0,
            slots=sum(batch.tokens.size for batch in micro_batches),
            limits=limits,
        )
        # The optimizer's own is the next update's as soon as that is queued.
        return _Queued(told, done, mx.array(self.optimizer.learning_rate), started)

    def _read(self, queued: _Queued, following: float | None = None) -> Update:
        """The figures of an update, waited for."""
        done = queued.done
        loss = number(done.loss)
        return replace(
            queued.told,
            loss=loss,
            grad_norm=number(done.grad_norm),
            learning_rate=number(queued.learning_rate),
            # Begun to begun: when the device ends with one of two that are queued nobody sees.
            seconds=(following or time.perf_counter()) - queued.started,
            peak_memory=mx.get_peak_memory(),
            applied=bool(done.applied.item()),
            correct=int(number(done.correct)),
        )

    def _shapes(self) -> Rooms | None:
        """The shapes of this run's batches where steps are compiled."""
        if self._rooms is None and not ON_CPU:
            most = self.world.most(self.batches.batch_size, self.accumulate)
            self._rooms = Rooms(self.batches.examples, most)
        return self._rooms

    def _stepper(self) -> UpdateStep:
        if self._step is None or self._step.optimizer is not self.optimizer:
            self._step = UpdateStep(
                self.backbone,
                self.optimizer,
                max_grad_norm=self.max_grad_norm,
                checkpoint=self.grad_checkpoint,
                summed=self.world.summed,
            )
        return self._step

    def validation_loss(self) -> float:
        """Mean cross-entropy (nats) over all trained tokens of all validation rows."""
        self.model.eval()
        mine = self.validation[self.world.rank :: self.world.size]
        batches = in_order(mine, self.batches.batch_size, self.batches.pad_token)
        return self.world.mean(*summed_loss(self.backbone, batches, self.features))

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
            loss, norm = update.limits
            told += f", far above those before it (limits {loss:.3g} and {norm:.3g})"
        return told


def _due(step: int, every: int) -> bool:
    return step > 0 and step % every == 0


def mean_loss(backbone: Qwen3VL, batches: Iterator[Batch], features: FeatureStore) -> float:
    """Mean cross-entropy (nats) over all trained tokens of some batches."""
    total, count = summed_loss(backbone, batches, features)
    return total / count


def summed_loss(
    backbone: Qwen3VL, batches: Iterator[Batch], features: FeatureStore
) -> tuple[float, int]:
    """Sum of the cross-entropy (nats) of some batches' trained tokens, and their number."""
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
    return total, count


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
            # Ignored, another process was lost and the launcher is not to cut short what follows.
            if signal.getsignal(one) is note:
                signal.signal(one, handler)

"""Those who look on: the log and the progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from statistics import median_low
from typing import TYPE_CHECKING, Any

from .trainer import TrainState, Update

if TYPE_CHECKING:
    from rich.console import Console

Log = Callable[[Mapping[str, Any], int, str], None]
"""``log(metrics, step, kind)``, kind being ``step`` or ``eval``."""


class Pace:
    """How long updates take, by the median of the latest: the first one compiles, for a minute on
    some GPUs, so that of two the shorter one counts."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=50)

    def take(self, update: Update) -> None:
        """Take note of an update."""
        self._seconds.append(update.seconds + update.data_seconds)

    def left(self, updates: int) -> float:
        """Seconds that so many updates will take; evaluations are not in it."""
        return median_low(self._seconds) * updates


class Logging:
    """Sends every update and every evaluation to a tracker.

    Args:
        log: where to.
        total: updates of the whole run, for the time that is left; None leaves that out.
        monitor: what the monitor measures, to call its figure by.
    """

    def __init__(self, log: Log, total: int | None = None, monitor: str | None = None) -> None:
        self.log = log
        self.total = total
        self.monitor = monitor
        self.pace = Pace()

    def on_step(self, state: TrainState, update: Update) -> None:
        self.pace.take(update)
        metrics: dict[str, float | int | None] = {
            "epoch": update.epoch,
            "loss": update.loss,
            "learning_rate": update.learning_rate,
            "grad_norm": update.grad_norm,
            "tokens_per_second": update.total_tokens / update.seconds,
            "trained_tokens_per_second": update.tokens / update.seconds,
            "trained_tokens": update.tokens,
            "data_wait_seconds": update.data_seconds,
            "peak_memory_gb": update.peak_memory / 1e9,
            "seconds": update.seconds,
            "bad_steps": state.bad_steps,
        }
        if update.correct is not None:
            metrics["token_accuracy"] = update.correct / update.tokens
        if update.slots:
            metrics["padding_share"] = 1 - update.total_tokens / update.slots
        if self.total is not None:
            metrics["eta_seconds"] = self.pace.left(self.total - state.step)
        self.log(metrics, state.step, "step")

    def on_eval(self, state: TrainState) -> None:
        metrics = {"val_loss": state.val_loss, "best_step": state.best_step}
        if self.monitor is not None:
            metrics[self.monitor] = state.value
        self.log(metrics, state.step, "eval")

    def on_end(self, state: TrainState) -> None:
        seen = [count for count in state.visits if count]
        self.log(
            {
                "rows_seen": len(seen),
                "rows": len(state.visits),
                "visits_min": min(state.visits),
                "visits_max": max(state.visits),
                "bad_steps": state.bad_steps,
            },
            state.step,
            "end",
        )


class Warnings:
    """Says which updates were not applied, and on which rows.

    Args:
        warn: called with a sentence.
        fault: what was wrong with an update; ``Trainer.fault``.
    """

    def __init__(self, warn: Callable[[str], None], fault: Callable[[Update], str]) -> None:
        self.warn = warn
        self.fault = fault

    def on_step(self, state: TrainState, update: Update) -> None:
        if not update.applied:
            self.warn(
                f"update {state.step} {self.fault(update)} on rows {', '.join(update.rows)}; it "
                "was not applied"
            )

    def on_eval(self, state: TrainState) -> None:
        pass

    def on_end(self, state: TrainState) -> None:
        pass


class Reporting:
    """Tells a search how a trial is doing, after every evaluation.

    ``report`` may raise ``Pruned``, which ends the run as an error would: nothing it computed is
    changed, and the checkpoint of this evaluation is already written.

    Args:
        report: called with the figure, the update, and which evaluation it is, from 1.
        every: updates between evaluations.
        monitored: whether the monitor's figure is reported, and not the validation loss.
    """

    def __init__(
        self, report: Callable[[float | None, int, int], None], *, every: int, monitored: bool
    ) -> None:
        self.report = report
        self.every = every
        self.monitored = monitored

    def on_step(self, state: TrainState, update: Update) -> None:
        pass

    def on_eval(self, state: TrainState) -> None:
        value = state.value if self.monitored else state.val_loss
        # Not counted: a run that goes on evaluates the update of its checkpoint once more.
        self.report(value, state.step, -(-state.step // self.every))

    def on_end(self, state: TrainState) -> None:
        pass


class Progress:
    """A progress bar with loss, speed, peak memory and the time that is left.

    Into a file or pipe, where a bar is noise, a line every tenth of the way instead.

    Args:
        console: where to draw.
        total: updates of the whole run.
        start: updates done before.
    """

    def __init__(self, console: Console, total: int, start: int = 0) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = console
        self.total = total
        self.val = ""
        self.pace = Pace()
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("training", total=total, completed=start, figures="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def on_step(self, state: TrainState, update: Update) -> None:
        self.pace.take(update)
        accuracy = ""
        if update.correct is not None:
            accuracy = f"  right {update.correct / update.tokens:.0%}"
        figures = (
            f"loss {update.loss:.3f}{self.val}{accuracy}  "
            f"{update.total_tokens / update.seconds:,.0f} tok/s  "
            f"{update.peak_memory / 1e9:.1f} GB"
        )
        if self.bar:
            self.bar.update(self.task, completed=state.step, figures=figures)
        elif state.step % max(1, self.total // 10) == 0 or state.step == 1:
            left = timedelta(seconds=round(self.pace.left(self.total - state.step)))
            line = f"  update {state.step}/{self.total}  {figures}  left {left}"
            self.console.print(line, highlight=False)

    def on_eval(self, state: TrainState) -> None:
        self.val = f"  val {state.val_loss:.3f}"

    def on_end(self, state: TrainState) -> None:
        pass

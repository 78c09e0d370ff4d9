"""Those who look on: the log and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .trainer import TrainState, Update

if TYPE_CHECKING:
    from rich.console import Console

Log = Callable[[Mapping[str, Any], int, str], None]
"""``log(metrics, step, kind)``, kind being ``step`` or ``eval``."""


class Logging:
    """Sends every update and every evaluation to a tracker.

    Args:
        log: where to.
    """

    def __init__(self, log: Log) -> None:
        self.log = log

    def on_step(self, state: TrainState, update: Update) -> None:
        self.log(
            {
                "epoch": update.epoch,
                "loss": update.loss,
                "learning_rate": update.learning_rate,
                "grad_norm": update.grad_norm,
                "tokens_per_second": update.total_tokens / update.seconds,
                "trained_tokens": update.tokens,
                "peak_memory_gb": update.peak_memory / 1e9,
                "seconds": update.seconds,
            },
            state.step,
            "step",
        )

    def on_eval(self, state: TrainState) -> None:
        self.log({"val_loss": state.val_loss, "best_step": state.best_step}, state.step, "eval")

    def on_end(self, state: TrainState) -> None:
        seen = [count for count in state.visits if count]
        self.log(
            {"rows_seen": len(seen), "rows": len(state.visits), "visits_min": min(state.visits)},
            state.step,
            "end",
        )


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
        figures = (
            f"loss {update.loss:.3f}{self.val}  {update.total_tokens / update.seconds:,.0f} tok/s  "
            f"{update.peak_memory / 1e9:.1f} GB"
        )
        if self.bar:
            self.bar.update(self.task, completed=state.step, figures=figures)
        elif state.step % max(1, self.total // 10) == 0 or state.step == 1:
            self.console.print(f"  update {state.step}/{self.total}  {figures}", highlight=False)

    def on_eval(self, state: TrainState) -> None:
        self.val = f"  val {state.val_loss:.3f}"

    def on_end(self, state: TrainState) -> None:
        pass

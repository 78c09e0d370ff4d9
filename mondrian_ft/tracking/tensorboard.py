"""TensorBoard's event files, written by tensorboardX: no TensorFlow and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..registry import Version
    from ..report.tables import Table
    from . import Number


class TensorBoardTracker:
    """The numbers as scalars ``train/loss``, ``eval/val_loss``, … over updates.

    The writer has a thread of its own. A resumed training writes a further file into a folder of
    its own; TensorBoard shows both.

    Args:
        folder: where the event files go.
        warn: called once, with a sentence, if they cannot be written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._writer: Any = None
        self._failed = False

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Writes each number of ``metrics`` that is one."""
        prefix = "train" if kind == "step" else kind

        def write(writer: Any) -> None:
            for key, value in metrics.items():
                if value is not None:
                    writer.add_scalar(f"{prefix}/{key}", value, step)

        self._guarded(write)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes the numbers among the closing figures, without an axis."""

        def write(writer: Any) -> None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"summary/{key}", value, 0)

        self._guarded(write)

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Does nothing: the page shows more than TensorBoard could."""

    def takes(
        self, name: str, kind: str, files: Sequence[Path], facts: Mapping[str, Any], alias: str
    ) -> None:
        """Does nothing: TensorBoard keeps no files."""

    def publish(self, name: str, version: Version) -> None:
        """Does nothing: TensorBoard keeps no files."""

    def follow(self, folder: Path, start: Path | None) -> None:
        """Does nothing: the axis goes on by itself."""

    def close(self, ok: bool = True) -> None:
        """Writes what is left and closes the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except OSError as error:
                self._give_up(error)

    def _guarded(self, write: Callable[[Any], None]) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                from tensorboardX import SummaryWriter

                self._writer = SummaryWriter(str(self._folder))
            write(self._writer)
        except (ImportError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        if isinstance(error, ImportError):
            self._warn(
                "tracking.tensorboard=true needs tensorboardX, which is not installed: "
                "pip install 'mondrian_ft[tensorboard]'; training_log.jsonl has every number."
            )
        else:
            self._warn(
                f"TensorBoard's files can no longer be written ({error}); training_log.jsonl has "
                "every number."
            )

"""Where the numbers of a run go: always a JSONL file, and Weights & Biases when it can.

A run never waits for, asks for, or fails with W&B. Whatever goes wrong there becomes one warning,
and the JSONL file, which has the same numbers, goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import MondrianError
from ..login import asked_offline, logged_in, wandb_mode
from .weights_and_biases import WandbTracker

if TYPE_CHECKING:
    from ..registry import Version
    from ..report.tables import Table
    from ..run import Run
    from ..schema import TrackingConfig

__all__ = [
    "JsonlTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "logged_in",
    "make_tracker",
    "wandb_mode",
]

Number = float | int | None
# Made once: json.dumps would make an encoder for every line.
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


class Tracker(Protocol):
    """Takes the numbers of a run; observes, and changes nothing of it."""

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Records ``metrics`` of update ``step``; ``kind`` is ``step`` or ``eval``."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Records the closing figures of the run."""
        ...

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Records the evaluation's tables, made only where they are wanted, and its page."""
        ...

    def takes(
        self, name: str, kind: str, files: Sequence[Path], facts: Mapping[str, Any], alias: str
    ) -> None:
        """Keeps a copy of files that the run works on.

        Args:
            name: what they are kept under; their versions are counted.
            kind: what they are: ``manifest`` or ``split``.
            files: the files, whose names differ.
            facts: what tells them from other versions, JSON types.
            alias: what this version is called besides.
        """
        ...

    def publish(self, name: str, version: Version) -> None:
        """Keeps a copy of a version registered under ``name``, or moves its copy's channels."""
        ...

    def follow(self, folder: Path, start: Path | None) -> None:
        """Notes a training whose checkpoints go into ``folder``, before its first number.

        ``start`` is the checkpoint it goes on from, of a training that was stopped, or None.
        """
        ...

    def close(self, ok: bool = True) -> None:
        """Flushes and lets go; safe to call twice. ``ok`` says whether the run did its task."""
        ...


class JsonlTracker:
    """One JSON object a line: ``{"kind": "step", "step": 3, "loss": 1.25, …}``.

    Each line is out as soon as it is written, so the file can be followed while training. A number
    that is not finite is written as null, since JSON has no other form for it. The closing
    figures are not part of the log; they stand in run.json.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: Any = None

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Appends one line; the file is made when the first one is written.

        Raises:
            MondrianError: the file cannot be written, for one because the disk is full.
        """
        line = {"kind": kind, "step": step} | {key: _finite(v) for key, v in metrics.items()}
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a line is out when this returns, and a full disk leaves nothing
                # behind that closing would trip over again.
                self._file = self.path.open("ab", buffering=0)
            self._file.write((_ENCODE(line) + "\n").encode())
        except OSError as error:
            raise MondrianError(
                f"cannot write {self.path}: {error.strerror or error}; free some space or choose "
                "another run folder with hydra.run.dir=…"
            ) from error

    def summary(self, values: Mapping[str, Any]) -> None:
        """Does nothing; see the class."""

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Does nothing: tables and page are files of the run already."""

    def takes(
        self, name: str, kind: str, files: Sequence[Path], facts: Mapping[str, Any], alias: str
    ) -> None:
        """Does nothing: they are files already."""

    def publish(self, name: str, version: Version) -> None:
        """Does nothing: the registry is files already."""

    def follow(self, folder: Path, start: Path | None) -> None:
        """Does nothing: a checkpoint holds the log up to it."""

    def close(self, ok: bool = True) -> None:
        """Closes the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class Trackers:
    """Several trackers as one, told in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.log(metrics, step, kind)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.summary(values)

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.show(tables, page)

    def takes(
        self, name: str, kind: str, files: Sequence[Path], facts: Mapping[str, Any], alias: str
    ) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.takes(name, kind, files, facts, alias)

    def publish(self, name: str, version: Version) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.publish(name, version)

    def follow(self, folder: Path, start: Path | None) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.follow(folder, start)

    def close(self, ok: bool = True) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close(ok)


def make_tracker(tracking: TrackingConfig, run: Run) -> Tracker:
    """Builds the trackers of ``run``: the JSONL file, W&B unless disabled, TensorBoard if asked."""
    trackers: list[Tracker] = [JsonlTracker(run.folder / "training_log.jsonl")]
    if tracking.tensorboard:
        from .tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(run.folder / "tensorboard", run.warn))
    mode, warning = wandb_mode(str(tracking.mode), os.environ)
    if warning:
        run.warn(warning)
    if mode != "disabled":
        trackers.append(_wandb(tracking, run, mode))
    return Trackers(*trackers)


def _wandb(tracking: TrackingConfig, run: Run, mode: str) -> WandbTracker:
    settings = {
        "project": tracking.project,
        "entity": tracking.entity,
        "group": tracking.group or run.group,
        "job_type": run.resolved["task"]["name"],
        "name": run.name,
        "tags": list(tracking.tags) or None,
        "config": {**run.resolved, "config_hash": run.config_hash},
    }
    return WandbTracker(
        mode,
        run.folder,
        settings,
        run.warn,
        say=lambda sentence: run.console.print(sentence, soft_wrap=True, markup=False),
        record=lambda facts: run.record(wandb=facts),
        # Whoever has no key, and did not ask for W&B, waits for it nowhere but in a training.
        versions_alone=mode == "online" or asked_offline(str(tracking.mode), os.environ),
    )


def _finite(value: Number) -> Number:
    return None if isinstance(value, float) and not math.isfinite(value) else value

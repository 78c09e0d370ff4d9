"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..data.batches import Cursor
from ..errors import MondrianError, TrainingError
from ..files import atomic_write_bytes, atomic_write_json, atomic_write_text, publish_dir
from ..model import lora
from ..model.backend import mx
from .trainer import Trainer, TrainState

_STEP = "step_{:06d}"
_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_BEST, _LOG, _AVERAGE = "best.json", "training_log.jsonl", "average.safetensors"


class CheckpointDir:
    """Checkpoints of one run in ``<output_dir>/checkpoints/step_000002/`` and so on.

    Each is written under another name and renamed when it is whole. The last ``keep`` are kept,
    and the best by validation loss.

    Args:
        folder: the ``checkpoints`` folder.
        identity: what must be equal for a run to go on from here (config, data lock, base); a
            flat mapping of names to JSON values.
        keep: how many of the last to keep.
        log: the run's training log. What it holds goes into each checkpoint, so that the log of a
            run that goes on from there tells of all updates, not only of its own.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], *, keep: int = 2, log: Path | None = None
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.keep = keep
        self.log = log

    def save(self, trainer: Trainer) -> Path:
        """Write the trainer's state; a step that is there already is not written again."""
        final = self.folder / _STEP.format(trainer.state.step)
        if _whole(final):
            return final
        temporary = self.folder / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            _save_tensors(temporary / _ADAPTER, lora.tensors(trainer.model))
            _save_tensors(temporary / _OPTIMIZER, _optimizer_tensors(trainer.optimizer))
            if trainer.average is not None and trainer.average.values:
                _save_tensors(temporary / _AVERAGE, trainer.average.values)
            state = asdict(trainer.state)
            state["best_loss"] = None if trainer.state.best_step is None else state["best_loss"]
            atomic_write_json(temporary / _STATE, {"identity": self.identity, "state": state})
            if self.log is not None and self.log.is_file():
                shutil.copyfile(self.log, temporary / _LOG)
            publish_dir(temporary, final, replace=True)
        except (OSError, RuntimeError, MondrianError) as error:
            raise TrainingError(
                f"checkpoint {final} could not be written ({_reason(error)}); the one before it "
                "is untouched, so free some space and go on with trainer.resume=auto"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune()
        return final

    def mark_best(self, step: int) -> None:
        """Remember which step has the lowest validation loss."""
        atomic_write_text(self.folder / _BEST, json.dumps({"step": step}) + "\n")
        self._prune()

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, None before the first evaluation."""
        marker = self.folder / _BEST
        if not marker.is_file():
            return None
        path = self.folder / _STEP.format(json.loads(marker.read_text())["step"])
        return path if _whole(path) else None

    def last(self) -> Path | None:
        """The newest whole checkpoint, None if there is none."""
        steps = self._steps()
        return steps[-1] if steps else None

    def restore(self, trainer: Trainer, path: Path) -> None:
        """Put a checkpoint back into a trainer.

        Raises:
            TrainingError: it is no whole checkpoint, or config, data or base differ, naming what.
        """
        if not _whole(path):
            raise TrainingError(f"{path} is no whole checkpoint; choose another or start afresh")
        try:
            content = json.loads((path / _STATE).read_text())
            theirs, state = content["identity"], dict(content["state"])
            tensors = _load_tensors(path / _ADAPTER)
            moments = _load_tensors(path / _OPTIMIZER)
            averaged = _load_tensors(path / _AVERAGE) if (path / _AVERAGE).is_file() else {}
            mx.eval(tensors, moments, averaged)
            state["cursor"] = Cursor(**state["cursor"])
            state["best_loss"] = float("inf") if state["best_loss"] is None else state["best_loss"]
            restored = TrainState(**state)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"checkpoint {path} is damaged ({_reason(error)}); name an earlier one with "
                "trainer.resume, or start afresh with trainer.resume=never"
            ) from error
        if differing := self._differing(theirs):
            raise TrainingError(
                f"{path} belongs to another run: {'; '.join(differing)}; set it back, or start "
                "afresh with trainer.resume=never and another task.output_dir"
            )
        lora.set_tensors(trainer.model, tensors)
        _set_optimizer(trainer.optimizer, moments)
        trainer.state = restored
        if trainer.average is not None:
            trainer.average.values = averaged
        if self.log is not None and (path / _LOG).is_file():
            atomic_write_bytes(self.log, (path / _LOG).read_bytes())

    def adopt(self, path: Path) -> None:
        """Copy a checkpoint of another folder, and the best one beside it, into this one.

        A run that goes on in a folder of its own can then be stopped and resumed there.
        """
        if path.parent.absolute() == self.folder.absolute():
            return
        theirs = CheckpointDir(path.parent, {}, keep=self.keep)
        best = theirs.best()
        if best is not None and best.name > path.name:
            best = None  # found after the point that is gone on from
        try:
            for one in {path, best} - {None}:
                temporary = self.folder / f".tmp-{one.name}"
                shutil.copytree(one, temporary)
                # Copied with its time, it would look as old as the run that it comes from.
                temporary.touch()
                publish_dir(temporary, self.folder / one.name, replace=True)
        except OSError as error:
            raise TrainingError(
                f"checkpoint {path} could not be copied to {self.folder} ({_reason(error)}); free "
                "some space, or go on in its own folder with task.output_dir"
            ) from error
        if best is not None:
            self.mark_best(int(best.name.removeprefix("step_")))

    def differences(self, path: Path) -> list[str]:
        """What keeps a checkpoint from being one of this run, each as ``x was 1 and is 2``.

        Raises:
            OSError, ValueError, KeyError: it cannot be read.
        """
        theirs = json.loads((path / _STATE).read_text())["identity"]
        return self._differing(theirs)

    def _differing(self, theirs: dict[str, Any]) -> list[str]:
        return [
            f"{name} was {theirs.get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if theirs.get(name) != value
        ]

    def load_adapter(self, path: Path, model: Any) -> None:
        """Put a checkpoint's adapter, and nothing else of it, into a model.

        Where the run keeps an average, that is its adapter.
        """
        averaged = path / _AVERAGE
        lora.set_tensors(model, _load_tensors(averaged if averaged.is_file() else path / _ADAPTER))

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step_*") if _whole(path))

    def _prune(self) -> None:
        best = self.best()
        for path in self._steps()[: -self.keep]:
            if path != best:
                shutil.rmtree(path)
        # What a kill left behind in the middle of writing or of removing.
        for path in [*self.folder.glob(".tmp-step_*"), *self.folder.glob("step_*")]:
            if not _whole(path) or path.name.startswith("."):
                shutil.rmtree(path)


def _reason(error: BaseException) -> str:
    """Why a file could not be written; a full disk's reason may lie below our own sentence."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return getattr(cause, "strerror", None) or str(cause)


def _whole(path: Path) -> bool:
    return all((path / name).is_file() for name in (_ADAPTER, _OPTIMIZER, _STATE))


def _optimizer_tensors(optimizer: Any) -> dict[str, mx.array]:
    """Moments, step and rate of the optimizer, and the random state, which dropout draws from."""
    from mlx.utils import tree_flatten

    state: dict[str, mx.array] = dict(tree_flatten(optimizer.state))  # pyright: ignore
    return state | {"random": mx.random.state[0]}  # pyright: ignore


def _set_optimizer(optimizer: Any, values: dict[str, mx.array]) -> None:
    from mlx.utils import tree_unflatten

    high, low = np.array(values.pop("random")).tolist()
    # The state can be read but not assigned; it is the two halves of a seed.
    mx.random.seed(high << 32 | low)
    optimizer.state = tree_unflatten(list(values.items()))


def _save_tensors(path: Path, values: dict[str, mx.array]) -> None:
    mx.eval(values)
    mx.save_safetensors(str(path), values)


def _load_tensors(path: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(path))
    if not isinstance(loaded, dict):
        raise TrainingError(f"{path} holds no named tensors")
    return loaded

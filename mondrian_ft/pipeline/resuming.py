"""Which checkpoint a training goes on from, and what has to agree for that."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..model import adapter as adapters
from ..model.base import Base
from ..report import screen
from ..training import lock
from ..training.checkpoint import CheckpointDir
from .rows import Parts

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run

CHECKPOINTS = "checkpoints"
_WRITTEN = (
    adapters.WEIGHTS,
    adapters.CONFIG,
    adapters.MANIFEST,
    "training_args.json",
    "training_log.jsonl",
    "README.md",
    CHECKPOINTS,
    "evaluation",
)
"""What a run leaves in its adapter directory."""


def identity(
    run: Run, base: Base, parts: Parts, pixels: str, *, processes: int = 1
) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint: recipe, rows, base and pixels.

    The number of processes that train together counts only where each draws random numbers.
    """
    plain = run.resolved
    recipe = {
        f"{group}.{key}": value
        for group in ("lora", "optimizer", "trainer")
        for key, value in plain[group].items()
        if key not in ("resume", "peer_timeout")
    }
    return recipe | {
        "data lock": parts.lock,
        "base weights": base.identity.weights,
        "base quantisation": base.identity.quantization,
        "base type": base.identity.dtype,
        "tokenizer and chat template": base.encoder.fingerprint,
        "pixels": pixels,
        "processes, each with dropout of its own": (
            processes if processes > 1 and run.config.lora.dropout else None
        ),
    }


def checkpoint(
    config: Config, run: Run, checkpoints: CheckpointDir, folder: Path, *, named: bool
) -> Path | None:
    """Where to go on from, None to start afresh; an earlier run's files are moved aside.

    Args:
        folder: the adapter directory that is trained into.
        named: whether it was chosen by a person; else it is this run's own, and new.

    Raises:
        TrainingError: there is no such checkpoint, or the run that could be gone on with is still
            being trained or another one.
    """
    wish = config.trainer.resume
    if wish == "never":
        _move_aside(run, checkpoints, folder)
        return None
    if wish == "auto":
        last = checkpoints.last()
        return last if last is not None or named else _unfinished(run, checkpoints, folder)
    path = Path(wish)
    if not path.is_dir():
        raise TrainingError(f"trainer.resume={wish} is no folder; give never, auto or a checkpoint")
    return path


def _move_aside(run: Run, checkpoints: CheckpointDir, folder: Path) -> None:
    # Only what a run writes is moved: the folder may hold, or be, something else as well.
    earlier = [folder / name for name in _WRITTEN if (folder / name).exists()]
    if not ((folder / adapters.MANIFEST).exists() or checkpoints.folder.exists()):
        return
    aside = folder / f"before-{datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"
    aside.mkdir(parents=True)
    for path in earlier:
        shutil.move(path, aside / path.name)
    run.warn(f"{folder} held an earlier run, which is now in {aside}")


def _unfinished(run: Run, checkpoints: CheckpointDir, folder: Path) -> Path | None:
    """The last checkpoint of the newest earlier run of this identity, if that is not finished.

    Of another identity, only the newest run counts, and only where runs are started one by one: a
    sweep's jobs differ from each other by design.
    """
    newest = True
    for other, last in _earlier(run, folder):
        finished = (other / adapters.MANIFEST).is_file()
        try:
            differing = checkpoints.differences(last)
        except (OSError, ValueError, KeyError, TypeError) as error:
            run.warn(f"{last} cannot be read ({error}) and is passed over")
            continue
        if not differing:
            if finished:
                run.console.print(
                    f"{screen.near(other)} is finished, so this starts afresh.", markup=False
                )
                return None
            if process := lock.holder(other):
                raise TrainingError(
                    f"{other} is still being trained by process {process}; wait for it or end it, "
                    "or start another run with trainer.resume=never"
                )
            return last
        if newest and not finished and run.group is None:
            raise TrainingError(
                f"the newest run of this experiment that is not finished, {last}, cannot be gone "
                f"on with: {'; '.join(differing)}; set it back, or start afresh with "
                "trainer.resume=never"
            )
        newest = False
    return None


def _earlier(run: Run, folder: Path) -> list[tuple[Path, Path]]:
    """Adapter directories of earlier runs with their last checkpoint, newest first.

    They lie where this one does: beside it, or at the same depth of a sweep or of repeats.
    """
    below = folder.relative_to(run.folder) if folder.is_relative_to(run.folder) else Path("adapter")
    if run.folder.parent.name == "repeats":
        root, pattern = run.folder.parents[2], "*/repeats/*"
    elif run.group is not None:
        root, pattern = run.folder.parents[1], "*/*"
    else:
        root, pattern = run.folder.parent, "*"
    found = []
    for other in root.glob(f"{pattern}/{below}/{CHECKPOINTS}"):
        last = CheckpointDir(other, {}).last()
        if other.parent != folder and last is not None:
            found.append((last.stat().st_mtime_ns, other.parent, last))
    return [(other, last) for _, other, last in sorted(found, reverse=True)]

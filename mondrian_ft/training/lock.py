"""One process works on a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import TrainingError

NAME = "training.lock"


@contextmanager
def held(
    folder: Path,
    notice: Callable[[str], None],
    *,
    name: str = NAME,
    doing: str = "trained into",
    key: str = "task.output_dir",
) -> Iterator[None]:
    """Hold a folder for this process for as long as the block lasts.

    The operating system lets go of the lock of a process that dies, however it dies; the file that
    it leaves behind only says who it was.

    Args:
        folder: made if it is missing.
        notice: called with a sentence if an earlier process died here.
        name: of the lock's file.
        doing: what is being done to the folder, for the sentences.
        key: what chooses another folder.

    Raises:
        TrainingError: another process holds it, or the folder cannot be written.
    """
    path = folder / name
    handle = _taken(path, folder, doing, key)
    try:
        if earlier := _holder(handle):
            notice(
                f"{folder} was being {doing} by process {earlier}, which ended without "
                "cleaning up; its lock is taken over"
            )
        _write(handle)
        yield
    finally:
        # While it is held: whoever opened the file meanwhile sees that it is no longer there.
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            folder.rmdir()  # only where nothing came of it


def holder(folder: Path, name: str = NAME) -> str | None:
    """Who holds a folder now, in words; None if nobody does."""
    try:
        handle = os.open(folder / name, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return _holder(handle) or "unknown"
    else:
        return None
    finally:
        os.close(handle)


def _taken(path: Path, folder: Path, doing: str, key: str) -> int:
    """A handle of the lock's file with the lock on it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise TrainingError(
                f"cannot write {path}: {error.strerror or error}; choose a folder you may write to "
                f"with {key}"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = _holder(handle) or "unknown"
            os.close(handle)
            raise TrainingError(
                f"{folder} is being {doing} by process {other}; wait for it or end it, or "
                f"choose another {key}"
            ) from None
        # The one who held it before may have removed the file between the two calls.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)


def _write(handle: int) -> None:
    facts = {
        "process": os.getpid(),
        "machine": platform.node(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(facts) + "\n").encode(), 0)


def _holder(handle: int) -> str:
    """Process, machine and time as the file tells them; blank if it tells nothing."""
    try:
        facts: dict[str, Any] = json.loads(os.pread(handle, 4096, 0))
        return f"{facts['process']} on {facts['machine']} since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return ""

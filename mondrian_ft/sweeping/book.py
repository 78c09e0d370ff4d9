"""``sweep.json``: which jobs a sweep's folder holds, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import MondrianError, SweepError, TrainingError
from ..files import PUT_ASIDE, SWEEP_BOOK, atomic_write_json
from ..training import lock
from .jobs import Job

NAME = SWEEP_BOOK
LOCK = "sweep.lock"


class Book:
    """The jobs of a sweep's folder, by identity, and their folders' names.

    Args:
        folder: of the sweep; made if it is missing.
        kind: ``grid`` or ``search``.

    Raises:
        SweepError: the folder holds a sweep of another kind, or cannot be written.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        content = read(folder)
        if content and content.get("kind") != kind:
            raise SweepError(
                f"{folder} holds a {content.get('kind')}, and this is a {kind}; choose another "
                "folder with hydra.sweep.dir=…"
            )
        self.content: dict[str, Any] = content or {"kind": kind}
        self.names: dict[str, str] = self.content.setdefault("names", {})
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(_unwritable(folder, error.strerror or str(error))) from error

    def name(self, job: Job) -> str:
        """The number that a job has in this folder; a new job gets the next one."""
        if job.identity not in self.names:
            taken = {int(name) for name in self.names.values() if name.isdigit()}
            there = {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
            self.names[job.identity] = str(max(taken | there, default=-1) + 1)
        return self.names[job.identity]

    def write(self, **facts: Any) -> None:
        """Adds facts and writes the file.

        Raises:
            SweepError: it cannot be written.
        """
        self.content |= facts
        try:
            atomic_write_json(self.folder / NAME, self.content)
        except MondrianError as error:
            cause = error.__cause__
            reason = getattr(cause, "strerror", None) or str(error)
            raise SweepError(_unwritable(self.folder, reason)) from error


def read(folder: Path) -> dict[str, Any] | None:
    """A folder's sweep.json; None where there is none.

    Raises:
        SweepError: it is damaged.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise SweepError(_unwritable(folder, error.strerror or str(error))) from error
    except (OSError, ValueError) as error:
        raise SweepError(
            f"{path} cannot be read ({error}); choose another folder with hydra.sweep.dir=…"
        ) from error
    return content if isinstance(content, dict) else {}


def earlier(parent: Path, kind: str, identity: str) -> Path | None:
    """The newest sweep in ``parent`` of that kind and identity."""
    found = []
    for path in parent.glob(f"*/{NAME}"):
        try:
            content = read(path.parent) or {}
        except SweepError:
            continue  # not a sweep that could be gone on with
        if (content.get("kind"), content.get("identity")) == (kind, identity):
            found.append((path.stat().st_mtime_ns, path.parent))
    return max(found)[1] if found else None


@contextmanager
def held(folder: Path, notice: Callable[[str], None], name: str = LOCK) -> Iterator[None]:
    """Hold a sweep's folder, or one job's, for this process.

    Raises:
        SweepError: another process holds it, or it cannot be written.
    """
    holding = lock.held(folder, notice, name=name, doing="swept into", key="hydra.sweep.dir")
    try:
        holding.__enter__()
    except TrainingError as error:
        raise SweepError(str(error)) from error
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


def aside(folder: Path, keep: Sequence[str] = ()) -> Path:
    """Move what a job left that did not finish out of the way of its next start."""
    place = folder.parent / PUT_ASIDE / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    place.mkdir(parents=True)
    for path in list(folder.iterdir()):
        if path.name not in keep:
            path.rename(place / path.name)
    return place


def digest(identities: Sequence[str]) -> str:
    """What a set of jobs is known by, in whatever order they were named."""
    import hashlib

    return hashlib.sha256("".join(sorted(identities)).encode()).hexdigest()


def _unwritable(folder: Path, reason: str) -> str:
    return f"cannot write {folder}: {reason}; choose another folder with hydra.sweep.dir=…"

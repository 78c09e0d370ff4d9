"""Every combination of some values: what is finished is kept, what failed stops nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ..config import Config
from ..errors import SweepError
from ..report.screen import near
from ..report.wording import count
from ..sweepers import GridSettings
from ..tasks import Experiment, Train
from . import book, screen
from .jobs import ENDED, Job, Outcome, differing, outcome, read_facts
from .kept import Standing

Launch = Callable[[Sequence[tuple[str, Sequence[str]]]], None]
"""Runs jobs, each a folder's name and its overrides."""


class Place(Protocol):
    """Where a sweep lies and how it runs; see ``composing.Composer``."""

    folder: Path
    named: bool

    def launch(self, jobs: Sequence[tuple[str, Sequence[str]]]) -> None: ...


def run(place: Place, jobs: Sequence[Job], settings: GridSettings) -> list[Outcome]:
    """Run the jobs that are not finished, and print and write what all of them came to.

    Raises:
        SweepError: the folder cannot be used, or jobs failed.
    """
    jobs = list({job.identity: job for job in jobs}.values())
    identity = book.digest([job.identity for job in jobs])
    folder = place.folder
    if not place.named and not settings.repeat and _trainings(jobs):
        folder = book.earlier(folder.parent, "grid", identity) or folder
    place.folder = folder
    with ExitStack() as stack:
        stack.enter_context(book.held(folder, _warn))
        pages = book.Book(folder, "grid")
        names = [pages.name(job) for job in jobs]
        pages.write(identity=identity, command=command(), status="running", started=_now())
        kept = _kept(folder, names, jobs, settings)
        if kept:
            print(f"Going on in {near(folder)}: {len(kept)} of {len(jobs)} jobs are done.")
        waiting = []
        for name, job in zip(names, jobs, strict=True):
            if job.error is not None:
                print(f"error: job {name}: {job.error}", file=sys.stderr)
            elif name not in kept:
                waiting.append((name, [*job.overrides, *again(folder / name, job)]))
        try:
            place.launch(waiting)
        except KeyboardInterrupt:
            found = _outcomes(folder, names, jobs, settings, kept)
            _write(pages, found, "interrupted")
            print(f"{screen.summary(found)} Type the same command to go on.", file=sys.stderr)
            raise
        found = _outcomes(folder, names, jobs, settings, kept)
        failed = [one for one in found if one.status not in ENDED]
        _write(pages, found, "failed" if failed else "done")
    _show(found, folder)
    if failed:
        raise SweepError(failure(failed, len(found)), exit_code(failed))
    return found


def again(folder: Path, job: Job, keep: Sequence[str] = ()) -> list[str]:
    """Makes room for a job that is started again; returns what it is to be told besides.

    One that left a checkpoint goes on from there, as ``trainer.resume=auto`` does, unless its data
    or base have changed; then, and without one, it starts afresh. ``keep`` names files that stay.
    """
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {*keep}:
        return []
    checkpoints = folder / "adapter" / "checkpoints"
    config, facts = job.config, read_facts(folder)
    if any(checkpoints.glob("step_*")) and config is not None and facts is not None:
        given = any(word.startswith("trainer.resume=") for word in job.overrides)
        wished = not given or config.trainer.resume == "auto"
        if wished and _unchanged(folder, config, facts):
            return ["trainer.resume=auto"]
    left = book.aside(folder, keep)
    _warn(f"job {folder.name} starts afresh; what it had left is in {near(left)}")
    return []


def failure(failed: Sequence[Outcome], total: int) -> str:
    """The closing sentence."""
    told = f"{len(failed)} of {count(total, 'job')} failed"
    return f"{told}; the others are done." if len(failed) < total else f"{told}."


def exit_code(failed: Sequence[Outcome]) -> int:
    """2 where a config was wrong, else 1."""
    return max(1 if one.job.error is None else one.job.error.exit_code for one in failed)


def _unchanged(folder: Path, config: Config, facts: dict[str, Any]) -> bool:
    return Standing(folder.parent).changed(config, facts | {"adapter": None}) is None


def _kept(
    folder: Path, names: Sequence[str], jobs: Sequence[Job], settings: GridSettings
) -> set[str]:
    """The jobs that are finished, and still stand."""
    standing, found = Standing(folder), set()
    for name, job in zip(names, jobs, strict=True):
        facts = read_facts(folder / name)
        if job.config is None or facts is None or facts.get("status") != "done":
            continue
        reason = "hydra.sweeper.repeat=true" if settings.repeat else None
        if reason := reason or standing.changed(job.config, facts):
            if isinstance(job.config.task, Experiment | Train):
                print(f"job {name} is run again: {reason}", file=sys.stderr)
            book.aside(folder / name)
        else:
            found.add(name)
    return found


def _outcomes(
    folder: Path,
    names: Sequence[str],
    jobs: Sequence[Job],
    settings: GridSettings,
    kept: set[str],
) -> list[Outcome]:
    return [
        outcome(name, job, folder / name, settings.rank_by, kept=name in kept)
        for name, job in zip(names, jobs, strict=True)
    ]


def _write(pages: book.Book, found: Sequence[Outcome], status: str) -> None:
    keys = differing([one.job for one in found])
    order = [one for one in screen.ranked(found) if one.value is not None]
    pages.write(
        status=status,
        ended=_now(),
        metric=order[0].metric if order else None,
        keys=keys,
        jobs=[one.record(keys) for one in found],
        ranking=[one.name for one in order],
        best=order[0].name if order else None,
    )


def _show(found: Sequence[Outcome], folder: Path) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    screen.show(Console(width=width, highlight=False), found, folder)
    print(screen.summary(found))


def _trainings(jobs: Sequence[Job]) -> bool:
    return all(
        job.config is None or isinstance(job.config.task, Experiment | Train) for job in jobs
    )


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


def command() -> list[str]:
    """The words that were typed."""
    from ..run import without_secret

    return [without_secret(word) for word in sys.argv[1:]]


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")

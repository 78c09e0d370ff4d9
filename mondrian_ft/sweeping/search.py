"""A search: trials of a study, run here or by whoever shares it, and the best of them repeated.

A trial's folder is its number. It is held by the process that runs it, so that one whose process
was killed is known by its lock, and goes on from its last checkpoint under the same number.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import SweepError
from ..files import atomic_write_json
from ..report.screen import near
from ..report.wording import count
from ..sweepers import RankBy, RepeatOver, SearchSettings
from ..training import lock
from . import book, clean, grid, promotion, screen
from .bound import Repeated, choose, judge
from .jobs import Job, Outcome, differing, larger_is_better, outcome, read_facts
from .kept import Standing
from .space import Space
from .study import Study, open_storage, refused

JOURNAL = "study.journal"
TRIAL_LOCK = "trial.lock"
STUDY_LOCK = "study.lock"


class Search:
    """One process's part in a search.

    Args:
        place: where it lies and how it runs.
        space: what is searched.
        fixed: what is not, as words.
        compose: words to a job.
        settings: ``hydra.sweeper``.
    """

    def __init__(
        self,
        place: grid.Place,
        space: Space,
        fixed: Sequence[str],
        compose: Callable[[Sequence[str]], Job],
        settings: SearchSettings,
    ) -> None:
        settings.check()
        self.place = place
        self.space = space
        self.fixed = list(fixed)
        self.compose = compose
        self.settings = settings
        base = compose(self.fixed)
        if base.error is not None or base.config is None:
            raise base.error or SweepError("the config does not validate", 2)
        self.base: Config = base.config
        for key, one in space.items():
            for word in one.ends():
                compose([*self.fixed, f"{key}={word}"])  # of a wrong kind, it is told at once
        self.metric = _metric(self.base, settings.rank_by)
        self.larger = larger_is_better(self.metric)
        fixed_keys = {key: value for key, value in base.keys.items() if key not in space}
        self.identity = Job(tuple(fixed), None).identity + book.digest(list(space))
        place.folder = self._folder(fixed_keys)
        self.folder = place.folder
        self.pages = book.Book(self.folder, "search")
        self.where = settings.storage or str(self.folder / JOURNAL)
        self.held: dict[int, ExitStack] = {}
        with refused(self.where):
            name = settings.study_name or self.folder.name
            self.study = Study(open_storage(self.where), name, settings)
            with self._alone():
                self.study.claim(space, fixed_keys | self._standing(), self.metric)
                worker = int(self.study.study.user_attrs.get("workers", 0))
                self.study.study.set_user_attr("workers", worker + 1)
        self.study.sample_as(worker)
        self.name = name
        self.pages.write(identity=self.identity, command=grid.command(), study=name)

    def run(self) -> list[Outcome]:
        """Run what is left of the study, repeat the best, and print and write what came of it.

        Raises:
            SweepError: it cannot be kept, or no trial came to a figure.
        """
        try:
            with refused(self.where):
                self._trials()
                repeated = self._repeats()
        except KeyboardInterrupt:
            self._let_go()
            print("Stopped; type the same command to go on with the study.", file=sys.stderr)
            raise
        finally:
            self._let_go()
        return self._close(repeated)

    # --- trials

    def _trials(self) -> None:
        told = self.study.trials()
        if told:
            print(f"Going on with {near(self.folder)}: {count(len(told), 'trial')} so far.")
        while batch := list(self._batch()):
            waiting: list[tuple[str, Sequence[str]]] = []
            for trial, job in batch:
                folder = self.folder / str(trial.number)
                words = [*job.overrides, *self._from_checkpoint(trial, job)]
                atomic_write_json(folder / clean.TRIAL, self._reporting(trial.number))
                waiting.append((str(trial.number), words))
            self.place.launch(waiting)
            for trial, job in batch:
                self._ended(trial, job)

    def _batch(self) -> Iterator[tuple[Any, Job]]:
        """Trials to launch together, held; those that need no training are ended here."""
        found = 0
        while found < self.settings.n_jobs and (trial := self._next()) is not None:
            words = [
                *self.fixed,
                *(f"{key}={one.word(trial.params[key])}" for key, one in self.space.items()),
            ]
            job = self.compose(words)
            trial.set_user_attr("overrides", words)
            trial.set_user_attr("identity", job.identity)
            if job.error is not None:
                print(f"error: trial {trial.number}: {job.error}", file=sys.stderr)
                self.study.tell(trial, None, "FAIL", error=str(job.error))
                self._let_go(trial.number)
            elif promotion.CONTINUES not in trial.user_attrs and (same := self._same(trial, job)):
                self._repeat_of(trial, same)
                self._let_go(trial.number)
            else:
                found += 1
                yield trial, job

    def _next(self) -> Any | None:
        """A trial whose process is gone, else a new one while there are trials left; held."""
        with self._alone():
            for frozen in self.study.trials("RUNNING"):
                if frozen.number not in self.held and self._left(frozen):
                    if self._folder_of(frozen) == self._own(frozen.number):
                        self._hold(frozen.number)
                        print(f"trial {frozen.number} was left by its process, and goes on")
                        return self.study.running(frozen)
                    self.study.begin_anew(frozen)
                    print(f"trial {frozen.number} was left by its process, and is begun anew")
            waiting = self.study.trials("WAITING") or self.study.promote()
            if not waiting and self.study.count() >= self.settings.n_trials:
                return None
            trial = self.study.ask(self.space)
            earlier = trial.user_attrs.get(promotion.CONTINUES)
            if earlier is not None:
                print(f"trial {earlier} is among the best now, and goes on as trial {trial.number}")
            trial.set_user_attr("machine", platform.node())
            trial.set_user_attr("folder", str(self._own(trial.number)))
            self._hold(trial.number)
        return trial

    def _from_checkpoint(self, trial: Any, job: Job) -> list[str]:
        """What has a trial go on from its own checkpoint, or from that of the one it continues.

        Where that is out of reach it starts afresh: training again gives the same bits.
        """
        words = grid.again(self._own(trial.number), job, keep=(TRIAL_LOCK,))
        earlier = trial.user_attrs.get(promotion.CONTINUES)
        given = any(word.startswith("trainer.resume=") for word in job.overrides)
        if words or earlier is None or given:
            return words
        folder = self._folder_of(self.study.trial(earlier))
        found = sorted(folder.glob("adapter/checkpoints/step_*")) if folder else []
        if not found:
            return words
        path = str(found[-1]).replace("\\", "\\\\").replace("'", "\\'")
        return [f"trainer.resume='{path}'"]

    def _own(self, number: int) -> Path:
        return (self.folder / str(number)).absolute()

    def _folder_of(self, frozen: Any) -> Path | None:
        """Where a trial is run, if that can be looked at from here and is there."""
        known = frozen.user_attrs.get("folder")
        return Path(known) if known and Path(known).is_dir() else None

    def _left(self, frozen: Any) -> bool:
        """Whether a running trial's process is gone."""
        folder = self._folder_of(frozen)
        if folder is not None:
            return lock.holder(folder, TRIAL_LOCK) is None
        if "machine" not in frozen.user_attrs:
            # Asked for, and killed before it could say so; or about to.
            return (datetime.now() - frozen.datetime_start).total_seconds() > 60
        return frozen.user_attrs["machine"] == platform.node() and "folder" in frozen.user_attrs

    def _same(self, trial: Any, job: Job) -> Any | None:
        """A trial that ended, and was this very job; a finished one rather than one given up."""
        for frozen in [*self.study.trials("COMPLETE"), *self.study.trials("PRUNED")]:
            if frozen.number != trial.number and frozen.user_attrs.get("identity") == job.identity:
                return frozen
        return None

    def _repeat_of(self, trial: Any, same: Any) -> None:
        """End a trial as the one that was the same ended: training again gives the same bits.

        Its curve is not reported. Counted once more with every repetition, the best point's curve
        would become the median that all others are given up by.
        """
        self.study.tell(
            trial,
            same.value,
            same.state.name,
            same_as=same.user_attrs.get("same_as", same.number),
            reason=same.user_attrs.get("reason"),
        )
        print(f"trial {trial.number} is trial {same.number} once more, and is not trained again")

    def _ended(self, trial: Any, job: Job) -> None:
        """Tell the study what became of a trial."""
        folder = self.folder / str(trial.number)
        found = outcome(str(trial.number), job, folder, self.settings.rank_by)
        if found.status == "done" and found.value is not None:
            value = -found.value if self.larger else found.value
            self.study.tell(trial, value, "COMPLETE")
        elif found.status == "pruned":
            self.study.tell(trial, None, "PRUNED", reason=found.error)
        elif found.status != "interrupted":
            self.study.tell(trial, None, "FAIL", error=found.error or "it came to no figure")
        self._let_go(trial.number)

    def _reporting(self, number: int) -> dict[str, Any]:
        kept = (
            "n_trials",
            "n_startup_trials",
            "n_warmup_steps",
            "keep_fraction",
            "reduction_factor",
        )
        return {
            "storage": self.where if "://" in self.where else str(Path(self.where).absolute()),
            "study": self.name,
            "trial": number,
            "settings": {"pruner": str(self.settings.pruner)}
            | {name: getattr(self.settings, name) for name in kept},
            "metric": _metric(self.base, RankBy.monitor),
            "larger": larger_is_better(_metric(self.base, RankBy.monitor)),
        }

    # --- repeats

    def _repeats(self) -> dict[int, Repeated]:
        """The best configs over seeds or folds of their own; by number of trial."""
        if self.study.trials("RUNNING"):
            return {}
        best: dict[str, Any] = {}
        for frozen in sorted(self.study.trials("COMPLETE"), key=lambda one: one.value):
            best.setdefault(frozen.user_attrs["identity"], frozen)
        chosen = list(best.values())[: self.settings.candidates]
        jobs: list[tuple[int, str, Job]] = []
        for frozen in chosen:
            for suffix, words in self._different():
                job = self.compose([*frozen.user_attrs["overrides"], *words])
                jobs.append((frozen.number, f"{frozen.number}-{suffix}", job))
        waiting: list[tuple[str, Job]] = []
        standing = Standing(self.folder)
        for _, name, job in jobs:
            facts = read_facts(self.folder / name)
            done = facts is not None and facts.get("status") == "done"
            if job.config is None or (done and not standing.changed(job.config, facts or {})):
                continue
            waiting.append((name, job))
        if waiting:
            print(
                f"\nThe best {count(len(chosen), 'config')}, trained {self.settings.repeats} times "
                f"each with {'other seeds' if self._seeds else 'other folds'}: "
                f"{count(len(waiting), 'training')} to do."
            )
        size = self.settings.n_jobs
        for start in range(0, len(waiting), size):
            self._launch_repeats(waiting[start : start + size])
        values: dict[int, list[float]] = {frozen.number: [] for frozen in chosen}
        for number, name, job in jobs:
            found = outcome(name, job, self.folder / name, self.settings.rank_by)
            if found.value is not None:
                values[number].append(found.value)
        return {
            number: judge(each, self.settings.confidence, larger=self.larger)
            for number, each in values.items()
            if each
        }

    def _launch_repeats(self, part: Sequence[tuple[str, Job]]) -> None:
        """Train those that nobody else is training."""
        with ExitStack() as stack:
            mine: list[tuple[str, Sequence[str]]] = []
            for name, job in part:
                try:
                    stack.enter_context(book.held(self.folder / name, _quiet, TRIAL_LOCK))
                except SweepError:
                    print(f"job {name} is being trained by another process", file=sys.stderr)
                    continue
                words = grid.again(self.folder / name, job, keep=(TRIAL_LOCK,))
                mine.append((name, [*job.overrides, *words]))
            self.place.launch(mine)

    @property
    def _seeds(self) -> bool:
        return self.settings.repeat_over == RepeatOver.seeds

    def _different(self) -> Iterator[tuple[str, list[str]]]:
        for number in range(self.settings.repeats):
            if self._seeds:
                # Not the trial's own seed: it is among the best for that one already.
                seed = self.base.trainer.seed + 1 + number
                yield f"seed-{seed}", [f"trainer.seed={seed}"]
            else:
                folds = self.settings.repeats
                yield f"fold-{number}", [f"data.folds={folds}", f"data.fold={number}"]

    # --- the end

    def _close(self, repeated: dict[int, Repeated]) -> list[Outcome]:
        from rich.console import Console

        found = [self._outcome(frozen) for frozen in self.study.trials()]
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        screen.show(console, found, self.folder)
        print(screen.summary(found).replace(" job", " trial", 1))
        if more := sum(promotion.CONTINUES in one.user_attrs for one in self.study.trials()):
            print(f"Going on under another number is no new trial: {more} of them did.")
        winner = choose(repeated, larger=self.larger)
        complete = self.study.trials("COMPLETE")
        if winner is None and complete:
            winner = min(complete, key=lambda one: one.value).number
        screen.show_repeats(console, repeated, winner, self.metric, self.settings, found)
        self._write(found, repeated, winner)
        running = len(self.study.trials("RUNNING"))
        if running:
            print(
                f"{count(running, 'trial')} still run by another process, which goes on from here."
            )
        elif winner is None:
            raise SweepError("no trial came to a figure, so there is nothing to choose from")
        return found

    def _outcome(self, frozen: Any) -> Outcome:
        name = str(frozen.number)
        words = frozen.user_attrs.get("overrides")
        job = self.compose(words) if words else Job((), None)
        same = frozen.user_attrs.get("same_as")
        known = next(
            (each for each in self.study.trials() if each.number == same), frozen
        ).user_attrs.get("folder")
        folder = Path(known) if known else self.folder / name
        one = outcome(name, job, folder, self.settings.rank_by)
        reason = frozen.user_attrs.get("reason") or frozen.user_attrs.get("error")
        for each in self.study.trials():
            if each.user_attrs.get(promotion.CONTINUES) == frozen.number:
                reason = f"went on as trial {each.number}"
        status = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}.get(
            frozen.state.name, "waiting"
        )
        facts = dict(one.facts or {}) | ({"error": reason} if reason else {})
        value = frozen.value if status == "done" else None  # a pruned one's is its last report
        if value is not None and self.larger:
            value = -value
        if same is not None:
            facts["seconds"] = 0.0
        return replace(
            one, status=status, value=value, metric=self.metric, facts=facts, kept=same is not None
        )

    def _write(
        self, found: Sequence[Outcome], repeated: dict[int, Repeated], winner: int | None
    ) -> None:
        keys = differing([one.job for one in found])
        order = [one for one in screen.ranked(found) if one.value is not None]
        self.pages.write(
            status="done" if not self.study.trials("RUNNING") else "running",
            metric=self.metric,
            keys=keys,
            jobs=[one.record(keys) for one in found],
            ranking=[one.name for one in order],
            repeated={
                str(number): {"values": one.values, "mean": one.mean, "bound": one.bound}
                for number, one in repeated.items()
            },
            confidence=self.settings.confidence,
            best=None if winner is None else str(winner),
        )

    # --- folders and locks

    def _folder(self, fixed_keys: dict[str, Any]) -> Path:
        """The sweep's folder: a chosen one, that of a study that this command began, or a new."""
        folder = self.place.folder
        if self.place.named or self.settings.storage is not None:
            return folder
        return book.earlier(folder.parent, "search", self.identity) or folder

    def _standing(self) -> dict[str, Any]:
        """What the data and the base are, where neither is searched."""
        if any(key.split(".")[0] in ("data", "model", "task", "experiment") for key in self.space):
            return {}
        return Standing(self.folder).now(self.base)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While a process chooses, no other does."""
        import fcntl

        try:
            handle = (self.folder / STUDY_LOCK).open("a")
        except OSError as error:
            raise SweepError(
                f"cannot write {self.folder}: {error.strerror or error}; choose another folder "
                "with hydra.sweep.dir=…"
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _hold(self, number: int) -> None:
        stack = ExitStack()
        stack.enter_context(book.held(self.folder / str(number), _quiet, TRIAL_LOCK))
        self.held[number] = stack

    def _let_go(self, number: int | None = None) -> None:
        for each in [number] if number is not None else list(self.held):
            if stack := self.held.pop(each, None):
                stack.close()


def _metric(config: Config, rank_by: RankBy) -> str:
    """The name of the figure, before anything has been measured."""
    if rank_by == RankBy.monitor:
        return str(config.trainer.monitor)
    return str(rank_by)


def _quiet(sentence: str) -> None:
    """A lock that is taken over is told in other words."""

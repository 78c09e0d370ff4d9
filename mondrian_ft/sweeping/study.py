"""An Optuna study: what it is of, its trials, and which of them are given up, for which reason.

Every figure is stored so that smaller is better; what is told has its own sign.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Pruned, SweepError
from ..sweepers import Pruner, Sampler, SearchSettings
from . import promotion
from .space import Space, told

LATER = "a database's URL such as postgresql://…, or a path you may write to"


def optuna() -> Any:
    """The library, quiet.

    Raises:
        SweepError: it is not installed.
    """
    try:
        import optuna as library
    except ImportError:
        raise SweepError(
            "hydra/sweeper=optuna needs Optuna, which is not installed; install it with: pip "
            "install 'mondrian_ft[sweep]'"
        ) from None
    library.logging.set_verbosity(logging.WARNING)
    return library


def open_storage(where: str) -> Any:
    """The storage of a study: a database's URL, or the path of a journal file.

    Raises:
        SweepError: it cannot be written or read.
    """
    library = optuna()
    try:
        if "://" in where:
            return library.storages.RDBStorage(where)
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = library.storages.journal.JournalFileBackend(str(path))
        _mend(path)
        return library.storages.JournalStorage(backend)
    except ImportError as error:
        raise SweepError(
            f"hydra.sweeper.storage: {error.name} is not installed, which this kind of database "
            "needs; install it, or leave the key out."
        ) from error
    except Exception as error:
        # SQLAlchemy, its drivers and the file system each have their own.
        first = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or first
        raise SweepError(
            f"the study cannot be kept in {where}: {reason}; give hydra.sweeper.storage {LATER}"
        ) from error


def _mend(path: Path) -> None:
    """Cut off the last line of a journal that was killed in the middle of writing it.

    Optuna would write the next line behind it, and then read neither.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    # Also the first attempt to write where it is to lie.
    with path.open("r+b") as file:
        lock.acquire()
        try:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
        finally:
            lock.release()


class Study:
    """A study that is open.

    Args:
        storage: see :func:`open_storage`.
        name: of the study.
        settings: of the search.
    """

    def __init__(self, storage: Any, name: str, settings: SearchSettings) -> None:
        library = optuna()
        self.settings = settings
        self.study = library.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            sampler=library.samplers.RandomSampler(),
            pruner=pruner_of(settings),
        )

    def claim(self, space: Space, base: Mapping[str, Any], metric: str) -> None:
        """Make the study one of this space, base config and figure, or see that it is.

        Raises:
            SweepError: it is of another, naming each difference.
        """
        from optuna.distributions import distribution_to_json

        mine = {
            "space": {key: distribution_to_json(one.distribution) for key, one in space.items()},
            "base": json.loads(json.dumps(dict(base))),
            "metric": metric,
        }
        theirs = self.study.user_attrs
        if "space" not in theirs:
            for key, value in mine.items():
                self.study.set_user_attr(key, value)
            return
        if found := _differences(theirs, mine):
            raise SweepError(
                f"the study {self.study.study_name} is another one: {'; '.join(found)}; set it "
                "back, or begin another with hydra.sweep.dir=… or hydra.sweeper.study_name=…",
                2,
            )

    def sample_as(self, worker: int) -> None:
        """Choose as the process of that number, so that no two choose alike."""
        samplers = optuna().samplers
        seed = self.settings.seed + 10_007 * worker
        if self.settings.sampler == Sampler.random:
            self.study.sampler = samplers.RandomSampler(seed=seed)
        else:
            self.study.sampler = samplers.TPESampler(
                seed=seed, n_startup_trials=self.settings.n_startup_trials, constant_liar=True
            )

    def trials(self, *states: str) -> list[Any]:
        """Trials in these states, ``RUNNING`` and so on; all of them without."""
        chosen = tuple(optuna().trial.TrialState[state] for state in states) or None
        return self.study.get_trials(deepcopy=False, states=chosen)

    def ask(self, space: Space) -> Any:
        """The next trial; one that goes on from a waiting one has what that one reported."""
        trial = self.study.ask({key: one.distribution for key, one in space.items()})
        earlier = trial.user_attrs.get(promotion.CONTINUES)
        if earlier is not None:
            for evaluation, value in self.trial(earlier).intermediate_values.items():
                trial.report(value, evaluation)
        return trial

    def trial(self, number: int) -> Any:
        """The trial of that number."""
        return next(one for one in self.trials() if one.number == number)

    def promote(self) -> bool:
        """Have a waiting trial that is to go on be the next that is asked for, if there is one."""
        if self.settings.pruner != Pruner.promote:
            return False
        found = promotion.next_to_go_on(self.trials(), self.settings, self.count())
        if found is None:
            return False
        self.study.enqueue_trial(found.params, user_attrs={promotion.CONTINUES: found.number})
        return True

    def running(self, frozen: Any) -> Any:
        """A trial that somebody began, to go on with."""
        return optuna().trial.Trial(self.study, frozen._trial_id)

    def count(self) -> int:
        """Trials that were begun; one that was begun anew, or waited and went on, counts once."""
        return sum(
            one.state.name != "WAITING"
            and "left" not in one.user_attrs
            and promotion.CONTINUES not in one.user_attrs
            for one in self.trials()
        )

    def begin_anew(self, frozen: Any) -> None:
        """Fail a trial whose process is gone, and have its point be the next that is asked for."""
        if frozen.params:
            known = frozen.user_attrs
            kept = {key: known[key] for key in (promotion.CONTINUES,) if key in known}
            self.study.enqueue_trial(frozen.params, user_attrs=kept)
        self.tell(self.running(frozen), None, "FAIL", left=True, error="its process is gone")

    def tell(self, trial: Any, value: float | None, state: str, **facts: Any) -> None:
        """End a trial: ``COMPLETE`` with its figure, ``PRUNED`` or ``FAIL``."""
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        chosen = optuna().trial.TrialState[state]
        value = value if state == "COMPLETE" else None
        self.study.tell(trial, value, state=chosen, skip_if_finished=True)


class Reporter:
    """Told by the training loop how a trial is doing; gives it up where the study would.

    Args:
        storage: as :func:`open_storage` takes it.
        study: its name.
        trial: the trial's number there.
        settings: of the search that the pruner needs.
        metric: the figure's name.
        larger: whether a larger figure is the better one.
    """

    def __init__(
        self,
        storage: Any,
        study: str,
        trial: int,
        settings: Mapping[str, Any],
        metric: str,
        larger: bool,
    ) -> None:
        kept = SearchSettings(**{**settings, "pruner": Pruner[settings["pruner"]]})
        where = open_storage(storage) if isinstance(storage, str) else storage
        self.study = Study(where, study, kept)
        self.metric = metric
        self.sign = -1.0 if larger else 1.0
        number = {one.number: one for one in self.study.trials()}
        if trial not in number:
            raise SweepError(f"the study {study} has no trial {trial}")
        self.trial = self.study.running(number[trial])

    def __call__(self, value: float | None, update: int, evaluation: int) -> None:
        """Report an evaluation.

        Raises:
            Pruned: with the reason.
        """
        if value is None:
            return  # the monitor could not measure
        with warnings.catch_warnings():
            # A trial that goes on reports its last evaluation again.
            warnings.simplefilter("ignore", UserWarning)
            self.trial.report(self.sign * value, evaluation)
        if self.study.settings.pruner == Pruner.promote:
            self._wait(update)
        elif self.trial.should_prune():
            raise Pruned(self._reason(value, update, evaluation))

    def _wait(self, update: int) -> None:
        """Have the trial wait unless it is among the best."""
        settings, trials = self.study.settings, self.study.trials()
        mine = next(one for one in trials if one.number == self.trial.number)
        at = promotion.place(mine, trials, settings, self.study.count())
        if at.goes_on or at.evaluation <= settings.n_warmup_steps:
            return
        figure = (
            f"its best {self.metric} up to there, {self.sign * at.best:.4f} after update {update} "
            f"(evaluation {at.evaluation})"
        )
        if at.early:
            raise Pruned(
                f"{figure}, waits for others: {at.trials} of {settings.n_startup_trials} trials "
                "are measured before any goes on"
            )
        raise Pruned(
            f"{figure}, is the {_ordinal(at.rank)} of {at.reached} there, and of "
            f"{at.trials} trials the best {at.quota} go on"
        )

    def _reason(self, value: float, update: int, evaluation: int) -> str:
        place = f"after update {update} (evaluation {evaluation})"
        if self.study.settings.pruner == Pruner.asha:
            mine, others = self.sign * value, []
            rung = _rung(evaluation, self.study.settings.reduction_factor)
            for one in self.study.trials():
                reached = one.system_attrs.get(f"completed_rung_{rung}")
                if reached is not None and one.number != self.trial.number:
                    others.append(reached)
            rank = 1 + sum(other < mine for other in others)
            return (
                f"its {self.metric} {place}, {value:.4f}, is the {_ordinal(rank)} of "
                f"{len(others) + 1} there, and the best 1 in "
                f"{self.study.settings.reduction_factor} goes on"
            )
        frozen = next(one for one in self.study.trials() if one.number == self.trial.number)
        best = self.sign * min(frozen.intermediate_values.values())
        others = [
            self.sign * one.intermediate_values[evaluation]
            for one in self.study.trials("COMPLETE")
            if evaluation in one.intermediate_values
        ]
        from statistics import median

        side = "below" if self.sign < 0 else "above"
        return (
            f"its best {self.metric} up to there, {best:.4f} {place}, is {side} "
            f"{median(others):.4f}, the median of the {len(others)} finished trials"
        )


@contextmanager
def refused(where: str) -> Any:
    """What a storage says within the block, in a sentence.

    Raises:
        SweepError: it could not be read or written.
    """
    try:
        yield
    except (SweepError, ConfigError):
        raise
    except OSError as error:
        raise SweepError(
            f"the study cannot be kept in {where}: {error.strerror or error}; give "
            f"hydra.sweeper.storage {LATER}"
        ) from error


def pruner_of(settings: SearchSettings) -> Any:
    """Optuna's pruner; its steps are evaluations, from 1, whatever an epoch is of each trial."""
    pruners = optuna().pruners
    if settings.pruner == Pruner.asha:
        return pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=settings.reduction_factor
        )
    if settings.pruner in (Pruner.none, Pruner.promote):
        # ``promote`` is no pruner of Optuna's: what it gives up may go on.
        return pruners.NopPruner()
    return pruners.MedianPruner(
        # Without one finished trial there is no median.
        n_startup_trials=max(1, settings.n_startup_trials),
        # Of Optuna, the first step at which it may prune.
        n_warmup_steps=settings.n_warmup_steps + 1,
    )


def _rung(evaluation: int, factor: int) -> int:
    """The highest rung that an evaluation has reached: 0 at the 1st, 1 at the ``factor``-th, …"""
    rung = 0
    while factor ** (rung + 1) <= evaluation:
        rung += 1
    return rung


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What tells two studies apart, each as ``x was 1 and is 2``."""
    from optuna.distributions import json_to_distribution

    found = []
    for key in sorted({*theirs["space"], *mine["space"]}):
        was, now = theirs["space"].get(key), mine["space"].get(key)
        if was != now:
            told_was = told(json_to_distribution(was)) if was else "not searched"
            told_now = told(json_to_distribution(now)) if now else "not searched"
            found.append(f"{key} was {told_was} and is {told_now}")
    searched = {*theirs["space"], *mine["space"]}
    for key in sorted({*theirs["base"], *mine["base"]} - searched):
        was, now = theirs["base"].get(key), mine["base"].get(key)
        if was != now:
            found.append(f"{key} was {was!r} and is {now!r}")
    if theirs["metric"] != mine["metric"]:
        found.append(f"it made {theirs['metric']} best and this makes {mine['metric']} best")
    return found

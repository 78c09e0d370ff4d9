"""Which trials go on, where those that do not are kept waiting: successive halving with promotion.

Optuna's pruners end a trial for good, by what is known at that moment. Early in a search little is
known, and which config is best shows late. Here a trial that does not go on waits at its
checkpoint, and goes on as soon as it is among the best, as in Li et al., "A System for Massively
Parallel Hyperparameter Tuning" (MLSys 2020), with a rung at every evaluation and a quota of all
trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..sweepers import SearchSettings

CONTINUES = "continues"
"""What a trial has that goes on from a waiting one: that one's number."""


@dataclass(frozen=True)
class Place:
    """Where a trial stands at its last evaluation.

    Attributes:
        evaluation: which one that is, from 1.
        best: its best figure up to there, smaller being better.
        rank: by that, from 1.
        reached: trials that came as far, itself among them.
        trials: all that have been measured.
        quota: how many of them go on.
        early: fewer have been measured than are to be before any goes on.
    """

    evaluation: int
    best: float
    rank: int
    reached: int
    trials: int
    quota: int
    early: bool

    @property
    def goes_on(self) -> bool:
        """Whether it does."""
        return not self.early and self.rank <= self.quota


def compared(trials: Sequence[Any]) -> list[Any]:
    """Trials with figures; of one that went on under another number only that other."""
    followed = {
        one.user_attrs[CONTINUES]
        for one in trials
        if CONTINUES in one.user_attrs and "left" not in one.user_attrs
    }
    return [
        one
        for one in trials
        if one.intermediate_values and one.state.name != "FAIL" and one.number not in followed
    ]


def place(frozen: Any, trials: Sequence[Any], settings: SearchSettings, begun: int) -> Place:
    """Where a trial with figures stands.

    Args:
        frozen: the trial.
        trials: of the study.
        settings: of the search.
        begun: trials of the study that were begun; with the last of ``n_trials`` nothing more is
            to be waited for.
    """
    evaluation = max(frozen.intermediate_values)
    others = [one for one in compared(trials) if one.number != frozen.number]
    reached = [one for one in others if max(one.intermediate_values) >= evaluation]
    best = _best(frozen, evaluation)
    count = len(others) + 1
    return Place(
        evaluation=evaluation,
        best=best,
        rank=1 + sum(_best(one, evaluation) < best for one in reached),
        reached=len(reached) + 1,
        trials=count,
        quota=max(1, int(settings.fraction * count)),
        early=count < settings.n_startup_trials and begun < settings.n_trials,
    )


def next_to_go_on(trials: Sequence[Any], settings: SearchSettings, begun: int) -> Any | None:
    """The waiting trial that goes on next: of those that do, the furthest, then the best."""
    ready: list[tuple[int, float, int, Any]] = []
    for one in compared(trials):
        if one.state.name == "PRUNED":
            at = place(one, trials, settings, begun)
            if at.goes_on:
                ready.append((-at.evaluation, at.best, one.number, one))
    return min(ready)[3] if ready else None


def _best(one: Any, evaluation: int) -> float:
    # Without a figure that early (its monitor could not measure), what it had first.
    values = [value for at, value in one.intermediate_values.items() if at <= evaluation]
    return min(values) if values else one.intermediate_values[min(one.intermediate_values)]

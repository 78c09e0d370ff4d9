"""The keys of ``hydra.sweeper``: how a sweep goes through its jobs, and how it ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .errors import ConfigError


class RankBy(StrEnum):
    """What ranks the jobs.

    ``monitor``: what ``trainer.monitor`` names, measured on validation rows. ``val_loss``: the
    validation loss. ``score_mae``: the tuned model's score error in the evaluation.
    """

    monitor = "monitor"
    val_loss = "val_loss"
    score_mae = "score_mae"


class Sampler(StrEnum):
    """How a search chooses: by a tree-structured Parzen estimator, or at random."""

    tpe = "tpe"
    random = "random"


class Pruner(StrEnum):
    """Which trials are given up.

    ``promote``: those outside the best ``keep_fraction``; they wait, and go on once they are among
    them. ``median``: those behind the median of the finished ones. ``asha``: those outside the best
    of every rung, for good. ``none``.
    """

    promote = "promote"
    median = "median"
    asha = "asha"
    none = "none"


class RepeatOver(StrEnum):
    """What the repeats of a promising config differ in."""

    seeds = "seeds"
    folds = "folds"


@dataclass
class GridSettings:
    """Every combination of the values, one job each."""

    _target_: str = "hydra_plugins.mondrian_ft_sweepers.GridSweeper"
    params: dict[str, Any] | None = None
    """Values to sweep, as a preset gives them: {lora.rank: "4,8,16"}; the command line adds."""
    rank_by: RankBy = RankBy.monitor
    """What ranks the jobs."""
    repeat: bool = False
    """Run finished jobs again, in a folder of their own."""


@dataclass
class SearchSettings:
    """A search by Optuna."""

    _target_: str = "hydra_plugins.mondrian_ft_sweepers.OptunaSweeper"
    params: dict[str, Any] | None = None
    """What to search, as a preset gives it; the command line adds."""
    rank_by: RankBy = RankBy.monitor
    """What is made best."""
    n_trials: int = 20
    """Trials of the study, by all processes together, 1 or more."""
    n_jobs: int = 1
    """Trials that this process hands to its launcher at once, 1 or more."""
    storage: str | None = None
    """Where the study lies: a journal file, or a database's URL that Optuna takes; null is
    ``study.journal`` in the sweep's folder."""
    study_name: str | None = None
    """Its name there; null is the sweep folder's."""
    sampler: Sampler = Sampler.tpe
    """How the next point is chosen."""
    pruner: Pruner = Pruner.promote
    """Which trials are given up."""
    seed: int = 0
    """Seed of the sampler, 0 or more; each further process adds its number."""
    n_startup_trials: int = 5
    """Trials chosen at random before the sampler chooses; also measured before ``promote`` lets any
    go on, and finished before ``median`` gives up any, 0 or more."""
    n_warmup_steps: int = 0
    """Evaluations before ``promote`` or ``median`` gives up a trial, 0 or more."""
    keep_fraction: float | None = None
    """``promote`` lets this part of all trials go on at every evaluation, above 0 and below 1; null
    is a quarter of 32 trials or more, and of fewer 8, at the most half of them."""
    reduction_factor: int = 3
    """``asha`` lets one trial in so many go on at its 1st, 3rd, 9th, … evaluation, 2 or more."""
    candidates: int = 3
    """Best configs that are repeated before one is chosen, 0 or more; 0 repeats none."""
    repeats: int = 3
    """Trainings of each of them, 2 or more."""
    repeat_over: RepeatOver = RepeatOver.seeds
    """Seeds after the trial's own, or as many folds of the data."""
    confidence: float = 0.9
    """Of the bound they are chosen by, one-sided, above 0.5 and below 1."""

    @property
    def fraction(self) -> float:
        """What ``keep_fraction`` comes to."""
        if self.keep_fraction is not None:
            return self.keep_fraction
        return max(0.25, min(0.5, 8 / self.n_trials))

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            ConfigError: naming the key.
        """
        least = {
            "n_trials": 1,
            "n_jobs": 1,
            "seed": 0,
            "n_startup_trials": 0,
            "n_warmup_steps": 0,
            "reduction_factor": 2,
            "candidates": 0,
            "repeats": 2,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value < lowest:
                raise ConfigError(
                    f"hydra.sweeper.{name} is {value}, but it must be {lowest} or more."
                )
        if self.keep_fraction is not None and not 0 < self.keep_fraction < 1:
            raise ConfigError(
                f"hydra.sweeper.keep_fraction is {self.keep_fraction}, but it must be above 0 and "
                "below 1; pruner=none gives up no trial."
            )
        if not 0.5 < self.confidence < 1:
            raise ConfigError(
                f"hydra.sweeper.confidence is {self.confidence}, but it must be above 0.5 and "
                "below 1."
            )


SWEEPERS: dict[str, type] = {"grid": GridSettings, "optuna": SearchSettings}
"""What ``hydra/sweeper`` may be, besides Hydra's own."""

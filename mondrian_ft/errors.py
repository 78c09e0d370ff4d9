"""Everything this package refuses to do, as exceptions that speak to the person who has to act.

A message is one sentence: what is wrong, the value that is wrong, and what to do next. The entry
point prints that sentence and exits with ``exit_code``; a traceback is for faults, not for these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MondrianError(Exception):
    """A failure the reader can act on; ``str(error)`` is the sentence to print.

    Attributes:
        exit_code: what the process exits with, 1 unless a child says otherwise.
        common: whether all processes that train together raise it alike, so that one tells it.
    """

    exit_code: int = 1
    common: bool = False


class ConfigError(MondrianError):
    """A config that does not compose or validate (exit code 2)."""

    exit_code = 2


class DataError(MondrianError):
    """A database, photograph, analysis or prepared file that cannot be used."""


class ModelError(MondrianError):
    """A base model that cannot be found, loaded or run."""


class AdapterError(MondrianError):
    """An adapter that cannot be read, does not fit its base, or changes nothing."""


class TrainingError(MondrianError):
    """A training run that cannot start or go on."""


class DivergedError(TrainingError):
    """The loss or the gradient is no longer finite."""

    common = True


class PeerLost(TrainingError):
    """Another process that trains with this one has ended, or cannot be reached.

    Attributes:
        aloud: whether a process that is not the first says so too, as the first may be the one
            that is lost.
    """

    aloud: bool = False


class PeersDiffer(TrainingError):
    """The processes that train together were given different things to do."""

    common = True


class JudgeError(MondrianError):
    """A judge of the answers that cannot be asked; the evaluation goes on without it."""


class Interrupted(TrainingError):
    """Training stopped by Ctrl-C or SIGTERM, after its checkpoint was written (exit code 130)."""

    exit_code = 130
    common = True


class Pruned(TrainingError):
    """A trial of a search that was given up, as its curve is behind the others'; no failure."""


class SweepError(MondrianError):
    """A sweep or a study that cannot be run in its folder, or jobs of it that failed.

    Args:
        sentence: what to print.
        exit_code: what the process exits with.
    """

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        # Both are arguments, as it travels between processes.
        super().__init__(sentence, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class EvaluationError(MondrianError):
    """An evaluation that is not whole: an arm could not answer, or a report not be put in place."""


class RegistryError(MondrianError):
    """A version, channel or history entry of the registry that is missing or inconsistent."""


class ServerError(MondrianError):
    """A local server that cannot be started."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Returns the one of ``choices`` that ``word`` was probably meant to be, or None.

    Case does not count. A choice is near when difflib's ratio is 0.6 or more, so an unrelated
    word suggests nothing rather than something misleading.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None

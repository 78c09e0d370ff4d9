"""Which of a few configs is best, judged by how bad each might be and not by its luckiest run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Repeated:
    """A config's figures over several trainings.

    Attributes:
        values: one of each training.
        mean: of them.
        bound: what the expected figure is no worse than, with the confidence asked for: Student's
            one-sided bound, from the spread of these trainings. None with fewer than two.
    """

    values: tuple[float, ...]
    mean: float
    bound: float | None


def judge(values: Sequence[float], confidence: float, *, larger: bool) -> Repeated:
    """Mean and bound of some figures, at least one."""
    mean = fmean(values)
    if len(values) < 2:
        return Repeated(tuple(values), mean, None)
    from scipy.stats import t

    room = float(t.ppf(confidence, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Repeated(tuple(values), mean, mean - room if larger else mean + room)


def choose(judged: Mapping[int, Repeated], *, larger: bool) -> int | None:
    """The number whose bound is best; None where none has one."""
    bounds = {number: one.bound for number, one in judged.items() if one.bound is not None}
    if not bounds:
        return None
    return (max if larger else min)(bounds, key=lambda number: bounds[number])

"""What a search may choose from: words of the command line to Optuna's distributions, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Dimension:
    """One searched key: its distribution, and the words of its choices where it has choices."""

    distribution: Any
    words: Mapping[Any, str] = field(default_factory=dict)

    def word(self, value: Any) -> str:
        """The value as a command line gives it."""
        return self.words.get(value, repr(value) if isinstance(value, float) else str(value))

    def ends(self) -> list[str]:
        """Every choice, or the two ends of a range, as a command line gives them."""
        if self.words:
            return list(self.words.values())
        return [self.word(self.distribution.low), self.word(self.distribution.high)]


Space = dict[str, Dimension]


def split(overrides: Sequence[Any]) -> tuple[Space, list[str]]:
    """Parsed overrides as what is searched, and the words of what is fixed.

    ``a=1,2,3``, ``choice(1,2,3)`` and a glob are choices; ``range(1,9,2)`` a stepped range;
    ``interval(1e-4,1e-2)`` a continuous one, whole numbers as ``int(interval(1,16))``, by orders of
    magnitude as ``tag(log, interval(1e-4,1e-2))``. A key given twice is what it was given last.

    Raises:
        ConfigError: nothing is searched, or a range is none.
    """
    space: Space = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            space[key] = _dimension(key, override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search; give a key several values, as in "
            "lora.rank=4,8,16 or 'optimizer.learning_rate=tag(log,interval(1e-4,1e-2))'."
        )
    return space, list(fixed.values())


def _dimension(key: str, override: Any) -> Dimension:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    try:
        if override.is_interval_sweep():
            log = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int):
                # int(interval(…)); without int() Hydra gives floats.
                return Dimension(IntDistribution(value.start, value.end, log=log))
            return Dimension(FloatDistribution(float(value.start), float(value.end), log=log))
        if override.is_range_sweep():
            numbers = list(value.range())
            first, last, step = numbers[0], numbers[-1], value.step
            if isinstance(first, int) and isinstance(step, int):
                return Dimension(IntDistribution(first, last, step=step))
            return Dimension(FloatDistribution(first, last, step=float(step)))
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{override.input_line} is no range to search: {error}.") from error
    words = list(dict.fromkeys(override.sweep_string_iterator()))
    return Dimension(
        CategoricalDistribution([_plain(word) for word in words]),
        {_plain(word): word for word in words},
    )


def _plain(word: str) -> Any:
    """A choice as a number where it is one, for whoever plots the study."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def told(distribution: Any) -> str:
    """A distribution in a few words."""
    name = type(distribution).__name__
    if name == "CategoricalDistribution":
        return "one of " + ", ".join(map(str, distribution.choices))
    step = f" in steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
    kind = "whole numbers " if name == "IntDistribution" else ""
    log = ", by orders of magnitude" if distribution.log else ""
    return f"{kind}{distribution.low:g} to {distribution.high:g}{step}{log}"

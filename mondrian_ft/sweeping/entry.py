"""What ``hydra_plugins.mondrian_ft_sweepers`` calls."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ..errors import ConfigError
from ..sweepers import GridSettings, SearchSettings
from . import grid as grids
from .composing import Composer, settings_of
from .search import Search
from .space import split
from .study import optuna


def grid(
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    given: dict[str, Any],
    arguments: list[str],
) -> Any:
    """Sweep every combination of the arguments' values."""
    settings = settings_of(GridSettings, given)
    place = Composer(config, context, task)
    words = [f"{key}={value}" for key, value in (settings.params or {}).items()] + arguments
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(words)
    for one in parsed:
        if one.is_sweep_override() and not one.is_discrete_sweep():
            raise ConfigError(
                f"{one.input_line} has no end of values, so it can only be searched; add "
                "hydra/sweeper=optuna, or name the values: "
                f"{one.get_key_element()}=a,b,c"
            )
    (lists,) = BasicSweeper.split_arguments(parsed, None)
    return grids.run(place, [place.compose(overrides) for overrides in lists], settings)


def search(
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    given: dict[str, Any],
    arguments: list[str],
) -> Any:
    """Search among the arguments' values.

    Raises:
        SweepError: Optuna is not installed.
    """
    settings = settings_of(SearchSettings, given)
    optuna()
    place = Composer(config, context, task)
    words = [f"{key}={value}" for key, value in (settings.params or {}).items()] + arguments
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(words)
    space, fixed = split(parsed)
    return Search(place, space, fixed, place.compose, settings).run()

"""Hydra finds sweepers in this namespace only; what they do is in ``mondrian_ft.sweeping``.

Importing this costs no other program in the environment anything.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _OurSweeper(Sweeper):
    """Keeps what Hydra hands over."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # The launcher waits until it is known in which folder the sweep goes on.
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config


class GridSweeper(_OurSweeper):
    """Every combination of the values, one job each."""

    def sweep(self, arguments: list[str]) -> Any:
        from mondrian_ft.sweeping import entry

        assert self.config is not None
        assert self.hydra_context is not None
        return entry.grid(
            self.config, self.hydra_context, self.task_function, self.settings, arguments
        )


class OptunaSweeper(_OurSweeper):
    """A search by Optuna."""

    def sweep(self, arguments: list[str]) -> Any:
        from mondrian_ft.sweeping import entry

        assert self.config is not None
        assert self.hydra_context is not None
        return entry.search(
            self.config, self.hydra_context, self.task_function, self.settings, arguments
        )

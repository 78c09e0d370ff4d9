"""Hydra's side of a sweep: words of the command line to jobs, and jobs to a launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ..config import load
from ..errors import ConfigError
from .jobs import Job


class Composer:
    """Composes the jobs of one sweep, and hands them to Hydra's launcher.

    Args:
        config: the sweep's own composed config, with ``hydra`` in it.
        context: how Hydra composes.
        task: what a job calls.

    Raises:
        ConfigError: ``hydra.sweep.subdir`` was changed.
    """

    def __init__(self, config: DictConfig, context: HydraContext, task: TaskFunction) -> None:
        self.config = config
        self.context = context
        self.task = task
        raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        assert isinstance(raw, dict)
        if raw["subdir"] != "${hydra.job.num}":
            raise ConfigError(
                f"hydra.sweep.subdir is {raw['subdir']}, but the jobs of a sweep are numbered; "
                "leave it out."
            )
        self.named = "${now:" not in str(raw["dir"])
        """Whether the sweep's folder was chosen, and is not a time."""
        self.cwd = Path(config.hydra.runtime.cwd)
        self.folder = Path(config.hydra.sweep.dir)
        self.launched = 0

    def compose(self, overrides: Sequence[str]) -> Job:
        """The job of these overrides; one that does not validate says why.

        Raises:
            HydraException, OmegaConfBaseException: they do not compose.
        """
        composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        try:
            return Job(tuple(overrides), load(composed, self.cwd))
        except ConfigError as error:
            return Job(tuple(overrides), None, error)

    def launch(self, jobs: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Run jobs, each a folder's name and its overrides; what came of them is in their folders.

        One whose process died says so by its folder, like any other.
        """
        if not jobs:
            return
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(self.folder)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task, config=self.config
        )
        words = [
            [*overrides, f"hydra.sweep.dir={quoted(str(self.folder))}", f"hydra.sweep.subdir={name}"]
            for name, overrides in jobs
        ]
        try:
            launcher.launch(words, initial_job_idx=self.launched)
        except Exception as error:
            # Raised for a process that died; which one, its folder says. What it says itself is
            # for whoever looks for the reason.
            print(f"warning: the launcher says {type(error).__name__}: {error}", file=sys.stderr)
        self.launched += len(jobs)


def quoted(value: str) -> str:
    """A value as Hydra's grammar reads it back."""
    slashed = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{slashed}'"


def settings_of(kind: type, given: dict[str, Any]) -> Any:
    """The keys of ``hydra.sweeper`` as their dataclass, enums as members."""
    import typing
    from enum import Enum

    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        wanted = hints[name]
        if isinstance(wanted, type) and issubclass(wanted, Enum) and not isinstance(value, wanted):
            value = wanted[str(value)]
        values[name] = value
    return kind(**values)

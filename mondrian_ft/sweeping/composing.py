"""Hydra's side of a sweep: words of the command line to jobs, and jobs to a launcher."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
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
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Job:
        """The job of these overrides; one that does not validate says why.

        Raises:
            HydraException, OmegaConfBaseException: they do not compose.
        """
        choices, values = self._parted(overrides)
        if choices not in self._bases:
            base = self.context.config_loader.load_sweep_config(self.config, list(choices))
            with read_write(base), open_dict(base):
                del base["hydra"]
            self._bases[choices] = base
        composed = copy.deepcopy(self._bases[choices])
        # As Hydra does it after composing, which takes some ten times as long.
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        try:
            return Job(tuple(overrides), load(composed, self.cwd))
        except ConfigError as error:
            return Job(tuple(overrides), None, error)

    def _parted(self, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[Override]]:
        """What chooses files, or is Hydra's own, as words; and what only sets values."""
        exists = self.context.config_loader.repository.group_exists  # pyright: ignore
        choices, values = [], []
        for one in OverridesParser.create().parse_overrides(list(overrides)):
            grouped = exists(one.key_or_group) and not isinstance(one.value(), dict)
            if grouped or one.is_hydra_override() or one.is_delete():
                choices.append(str(one.input_line))
            else:
                values.append(one)
        return tuple(choices), values

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
            [
                *overrides,
                f"hydra.sweep.dir={quoted(str(self.folder))}",
                f"hydra.sweep.subdir={name}",
            ]
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

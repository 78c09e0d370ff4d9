"""Numbered adapters: where a run's adapter goes, and what a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import registry

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


def register(config: Config, run: Run, folder: Path) -> str:
    """Copy an adapter directory into the registry; returns its version."""
    version = registry.register(
        Path(config.registry.root),
        registry_name(config),
        folder,
        facts={"run": str(run.folder), "config_hash": run.config_hash},
    )
    run.record(registered={"name": registry_name(config), "version": version.version})
    run.console.print(f"Registered as {registry_name(config)} {version.version}.", markup=False)
    return version.version


def registry_name(config: Config) -> str:
    """What this config's versions are counted under."""
    if config.registry.name is not None:
        return config.registry.name
    model = "sample" if config.model.path is None else Path(config.model.path).name
    return f"{model}-{config.data.advisor or 'all'}".lower()


def find_adapter(name: str, config: Config) -> Path:
    """An adapter directory, or a version or channel of the registry."""
    if Path(name).exists() or "/" in name:
        return Path(name)
    return registry.resolve(Path(config.registry.root), registry_name(config), name)

"""From YAML to the dataclasses of ``schema``: finding the files, composing, checking, hashing.

Hydra composes YAML over the schemas; ``load`` turns the result into the dataclasses, so code past
this point sees plain Python objects and never a ``DictConfig``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os.path
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .keys import unknown_key
from .schema import GROUPS, Config
from .sweepers import SWEEPERS
from .tasks import TASKS

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "Config",
    "absolute_paths",
    "as_dict",
    "conf_dir",
    "config_hash",
    "job_identity",
    "load",
    "register_schemas",
    "secret_keys",
]

_OUTSIDE_IDENTITY = ("tracking", "registry", "serve", "task", "experiment_name")
_PLACES = ("data.output_dir", "eval.report", "task.output_dir")
"""Where results are put, which is no part of what they are."""


def conf_dir() -> str:
    """Where Hydra finds the YAML files: ``conf/`` of a checkout, else the copy in the package."""
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file() and (root / "conf" / "config.yaml").is_file():
        return str(root / "conf")
    return "pkg://mondrian_ft.conf"


def register_schemas() -> None:
    """Makes the dataclasses known to Hydra: ``schema`` in each group, ``schema_<name>`` in task."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schema in GROUPS.items():
        store.store(group=group, name="schema", node=schema)
    for name, task in TASKS.items():
        store.store(group="task", name=f"schema_{name}", node=task)
    for name, sweeper in SWEEPERS.items():
        store.store(group="hydra/sweeper", name=name, node=sweeper)


def load(cfg: DictConfig, cwd: str | Path | None = None) -> Config:
    """Turns a composed config into dataclasses and checks all of it.

    Args:
        cfg: what Hydra composed.
        cwd: the folder the command was typed in, which relative paths are taken from; null is the
            current one.

    Returns:
        The config, every path in it absolute.

    Raises:
        ConfigError: a key no schema declares (Hydra lets ``+lora.rnk=4`` through), a value out of
            range, or keys that contradict each other.
        omegaconf.errors.OmegaConfBaseException: an interpolation that does not resolve.
    """
    from omegaconf import OmegaConf

    for key in _undeclared(cfg):
        raise unknown_key(key, OmegaConf.get_type(cfg, "task"))
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, Config):
        raise ConfigError(
            "the composed config lacks its schema; a config.yaml of your own must start its "
            "defaults list with 'schema'."
        )
    absolute_paths(config, Path.cwd() if cwd is None else Path(cwd))
    return config


def absolute_paths(config: Config, cwd: Path) -> None:
    """Makes every path of ``config`` absolute, in place; the one spot where that happens.

    ``~`` is expanded. A key that takes a path or a name (``model.path``: a folder or a hub id) is
    taken as a path when it is written as one (``/…``, ``./…``, ``~…``) or something lies there.
    """

    def resolve(value: Any, kind: str) -> Any:
        if isinstance(value, list):
            return [resolve(item, kind) for item in value]
        if value is None:
            return None
        path = cwd / Path(value).expanduser()
        written = value.startswith(("/", "./", "../", "~")) or value in (".", "..")
        if kind == "or_name" and not written and (value in _WORDS or not path.exists()):
            return value
        # Not Path.resolve: a symbolic link stays what was typed.
        return os.path.normpath(path)

    for owner, item in _fields(config):
        if kind := item.metadata.get("path"):
            setattr(owner, item.name, resolve(getattr(owner, item.name), kind))


_WORDS = ("never", "auto")


def as_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain JSON types, for run.json, training_args.json and W&B.

    Secrets are told only to be there.
    """
    plain = _plain(dataclasses.asdict(config))
    for group, _, name in (key.partition(".") for key in secret_keys()):
        if plain[group][name] is not None:
            plain[group][name] = "***"
    names = {task: name for name, task in TASKS.items()}
    plain["task"] = {"name": names.get(type(config.task), type(config.task).__name__)} | plain[
        "task"
    ]
    return plain


def secret_keys() -> list[str]:
    """The keys, dotted, whose values are shown and written nowhere."""
    return [
        f"{group}.{item.name}"
        for group, schema in GROUPS.items()
        for item in dataclasses.fields(schema)
        if item.metadata.get("secret")
    ]


def config_hash(config: Config) -> str:
    """SHA-256, in hexadecimal, of every key that can change a number.

    Left out are paths (data and base are identified by what they hold, not by where they lie),
    the task, the run's name, tracking, registry, the service and ``trainer.resume``: a run that is
    resumed, or moved to another folder, keeps its hash.
    """
    kept: dict[str, Any] = {}
    for group in GROUPS:
        if group in _OUTSIDE_IDENTITY:
            continue
        owner = getattr(config, group)
        kept[group] = {
            item.name: getattr(owner, item.name)
            for item in dataclasses.fields(owner)
            if not item.metadata.get("path") and not item.metadata.get("aside")
        }
    text = json.dumps(_plain(kept), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def job_identity(config: Config) -> dict[str, Any]:
    """What makes a job of a sweep the job it is: every key, dotted, that changes what it does.

    More than ``config_hash`` covers: the task with its keys, and the paths that are read. Left out
    are where results are put, what only names, places or continues a run (``aside`` in the schema),
    tracking, registry and the service.
    """
    kept: dict[str, Any] = {}
    for group in (*GROUPS, "task"):
        if group in _OUTSIDE_IDENTITY and group != "task":
            continue
        owner = getattr(config, group)
        for item in dataclasses.fields(owner):
            key = f"{group}.{item.name}"
            if not item.metadata.get("aside") and key not in _PLACES:
                kept[key] = _plain(getattr(owner, item.name))
    names = {task: name for name, task in TASKS.items()}
    return {"task": names.get(type(config.task), type(config.task).__name__)} | kept


def _undeclared(cfg: DictConfig) -> Iterator[str]:
    """Dotted keys of ``cfg`` that no dataclass declares, at any depth."""
    from omegaconf import DictConfig, OmegaConf

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        schema = OmegaConf.get_type(node)
        declared = {item.name for item in _of(schema)} if _is_schema(schema) else set()
        for key in node:
            dotted = f"{prefix}{key}"
            if key not in declared:
                yield dotted
                continue
            child = node._get_node(key)
            if isinstance(child, DictConfig) and _is_schema(OmegaConf.get_type(child)):
                yield from walk(child, f"{dotted}.")

    return walk(cfg, "")


def _of(schema: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(schema)


def _is_schema(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _fields(owner: Any) -> Iterator[tuple[Any, dataclasses.Field[Any]]]:
    """Every (dataclass instance, field) pair below ``owner``."""
    for item in dataclasses.fields(owner):
        value = getattr(owner, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _fields(value)
        else:
            yield owner, item


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

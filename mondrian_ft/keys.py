"""The names of the keys, and what a name that is none was probably meant to be."""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import ConfigError, nearest
from .schema import GROUPS
from .tasks import TASKS, Task


def keys(task: type[Task] | None = None) -> list[str]:
    """Every key a command may set, dotted; the task's own are those of ``task``, or of all."""
    found = [key for group, schema in GROUPS.items() for key in _below(group, schema)]
    tasks = TASKS.values() if task is None else [task]
    for kind in tasks:
        found += [f"task.{item.name}" for item in _of(kind)]
    return [*dict.fromkeys(found), "experiment_name"]


ALIASES = {
    "lr": "optimizer.learning_rate",
    "warmup": "optimizer.warmup_steps",
    "r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "targets": "lora.target_modules",
    "save_freq": "trainer.save_every",
    "save_steps": "trainer.save_every",
    "eval_steps": "trainer.eval_every",
    "num_epochs": "trainer.epochs",
    "gradient_accumulation_steps": "trainer.accumulate",
    "steps": "trainer.max_steps",
    "base_model": "model.path",
    "model_path": "model.path",
    "lora_path": "task.adapter",
    "adapter_path": "task.adapter",
    "output_report": "eval.report",
}
"""What neighbours call our keys: the workbook's flags, PEFT's and mlx-vlm's names."""


def suggest_key(key: str, task: type[Task] | None = None) -> str | None:
    """The declared key that ``key`` was probably meant to be, or None.

    A word without a dot may be a group. A key is looked for in its own group first, then among
    the names other tools use, then in a group spelled nearly so, then by its last part anywhere.
    """
    known = keys(task)
    group, _, leaf = key.rpartition(".")
    if key.count(".") > 1:
        if found := nearest(key, [each for each in known if each.count(".") > 1]):
            return found
        # lora.rank.x: the nearest thing is the key it hangs from, or the group's nearest.
        group, leaf = key.split(".")[:2]
    if not group and leaf in ALIASES:
        return ALIASES[leaf]
    if not group and (owner := nearest(leaf, [*GROUPS, "task", "experiment"])):
        return "+experiment=NAME" if owner == "experiment" else owner
    inside = {k.partition(".")[2]: k for k in known if "." in k and k.partition(".")[0] == group}
    if found := nearest(leaf, inside):
        return inside[found]
    if leaf in ALIASES:
        return ALIASES[leaf]
    if group and group not in (*GROUPS, "task") and (owner := nearest(group, [*GROUPS, "task"])):
        return suggest_key(f"{owner}.{leaf}", task)
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    if found := nearest(leaf, leaves):
        return leaves[found]
    return None


def unknown_key(key: str, task: type[Task] | None = None, where: str = "") -> ConfigError:
    """The error for a key that no schema declares; ``where`` names the file it stands in."""
    known = suggest_key(key, task)
    group = key.partition(".")[0]
    start = f"{where}: " if where else ""
    if group == "task" and task is not None:
        names = {kind: name for name, kind in TASKS.items()}
        name = names.get(task, task.__name__)
        mine = [item.name for item in _of(task)]
        takes = (
            f"it takes {', '.join(f'task.{item}' for item in mine)}" if mine else "it takes none"
        )
        hint = f"did you mean {known}?" if known and known.startswith("task.") else f"{takes}."
        return ConfigError(f"{start}task={name} has no key {key}; {hint}")
    if known:
        return ConfigError(f"{start}there is no key {key}; did you mean {known}?")
    if group in GROUPS and "." in key:
        listing = ", ".join(item.name for item in _of(GROUPS[group]))
        return ConfigError(f"{start}there is no key {key}; {group} has {listing}.")
    listing = ", ".join([*GROUPS, "task", "experiment_name"])
    return ConfigError(f"{start}there is no key {key}; the config has {listing}.")


def _below(name: str, schema: Any) -> list[str]:
    """The keys of a group, and after each one those inside it."""
    found = []
    for item in _of(schema):
        found.append(f"{name}.{item.name}")
        if isinstance(inner := item.default_factory, type) and dataclasses.is_dataclass(inner):
            found += _below(found[-1], inner)
    return found


def _of(schema: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(schema)

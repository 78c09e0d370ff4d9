"""What Hydra and OmegaConf say, in the words of this project: one sentence, and what to do next.

Only the entry point uses this.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError
from yaml.error import MarkedYAMLError

from .errors import ConfigError, nearest
from .help import config_dirs, options
from .keys import ALIASES, keys, suggest_key, unknown_key
from .schema import GROUPS, Config
from .sweepers import SWEEPERS
from .tasks import TASKS, Task

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
"""What composing a config may raise, besides plain ValueErrors."""

_GROUP_NAMES = (*GROUPS, "task", "experiment", "sweep", "recipe")
_ADDED = ("experiment", "sweep")
"""Groups of which nothing is chosen unless it is added, with a plus."""


def explain(error: Exception, argv: Sequence[str] = ()) -> ConfigError:
    """Returns the sentence for what went wrong while a config was composed.

    Args:
        error: what Hydra, OmegaConf or the YAML parser raised.
        argv: the command line's arguments; some of Hydra's messages do not say which of them
            they mean.
    """
    folders = config_dirs(argv)
    overrides = [argument for argument in argv if not argument.startswith("-")]
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, YAMLError):
        return _yaml(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, folders)
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, SearchPathException):
        missing = _after(r"'([^']+)' not found", str(error)) or "the folder"
        return ConfigError(f"--config-dir: there is no folder {missing}; name one that exists.")
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += "\n" + str(error.__cause__)
    named = re.match(r"In '([^']+)': (?:\w+ raised while composing config:\s*)?", text)
    where = f"{named[1]}.yaml" if named and named[1] != "config" else ""
    start = f"{where}: " if where else ""
    if named:
        text = text[named.end() :]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else type(error).__name__
    full_key = _after(r"full_key: (\S+)", text)
    owner = _after(r"object_type=(\w+)", text)

    if owner == "Config" and full_key == "experiment" and where:
        return ConfigError(
            f"{start}an experiment's first line must be '# @package _global_' (and it must set "
            "something); without that line its keys do not reach the config."
        )
    if full_key and re.search(r"^Key '.*' not in ", text, re.MULTILINE):
        if owner not in _schemas():
            return _not_ours(full_key, error, start)
        schema = _schemas()[owner]
        return unknown_key(full_key, schema if issubclass(schema, Task) else None, where)
    if several := _after(r"Ambiguous value for argument '([^']+)'", text):
        key, _, values = several.partition("=")
        return ConfigError(
            f"{several} is several values; sweep them with -m, or write a list: {key}=[{values}]"
        )
    if taken := _after(r"An item is already at '([^']+)'", text):
        return ConfigError(f"{taken} is there already; write {taken}=…, without the plus.")
    if group := _after(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return _no_such_group(group, start, overrides)
    if full_key and _is_type_error(text):
        typed = _after(r"Error merging override ([^\n]+)", text)
        return _wrong_type(full_key, typed, _after(r"value '([^']*)'", text, re.IGNORECASE), start)
    if mapped := re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", text):
        return _not_a_group(mapped[1], mapped[2], start)
    if "Config group override must be a string" in text:
        for override in overrides:
            group, _, value = override.partition("=")
            if group.lstrip("+~") in _GROUP_NAMES and re.fullmatch(r"[-+.\d]+|true|false", value):
                name = group.lstrip("+~")
                return _not_an_option(name, value, options(name, folders))
    if "InterpolationKey" in type(error).__name__ or "Interpolation" in first:
        return ConfigError(f"{start}{full_key or 'a key'}: {_lower(first)}; correct the ${{…}}.")
    if "does not support deletion" in text:
        return ConfigError(
            f"{full_key} cannot be removed; set it to null if it may be empty, or leave it alone."
        )
    return ConfigError(f"{start}{first}; see the keys and their values with --cfg job.")


def flag(argv: Sequence[str]) -> ConfigError | None:
    """The error for a ``--key value`` of the scripts this program replaces, if there is one."""
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys())} | ALIASES
    for place, argument in enumerate(argv):
        name, _, value = argument.removeprefix("--").replace("-", "_").partition("=")
        if argument.startswith("--") and name in leaves:
            if not value and place + 1 < len(argv) and not argv[place + 1].startswith("-"):
                value = argv[place + 1]
            return ConfigError(
                f"{argument.partition('=')[0]} is not an option here; keys are given as key=value: "
                f"{leaves[name]}={value or '…'}"
            )
    return None


def _yaml(error: YAMLError) -> ConfigError:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return ConfigError(
            f"{mark.name} is not valid YAML: {error.problem} at line {mark.line + 1}, column "
            f"{mark.column + 1}; correct that line."
        )
    return ConfigError(f"a config file is not valid YAML: {' '.join(str(error).split())}")


def _unreadable(override: str, folders: Sequence[Path]) -> ConfigError:
    if "=" not in override:
        for group in ("task", *_ADDED):
            plus = "+" if group in _ADDED else ""
            if found := nearest(override, options(group, folders)):
                return ConfigError(
                    f"{override} is not key=value; did you mean {plus}{group}={found}?"
                )
        if known := suggest_key(override):
            return ConfigError(f"{override} has no value; write {known}=…")
        return ConfigError(f"{override} is not key=value; see --help for the keys and examples.")
    return ConfigError(
        f"cannot read {override}: a list is written key=[a,b], and text with spaces, commas, "
        "brackets or '=' needs both quotes: 'key=\"some text\"'."
    )


def _missing(error: MissingConfigException) -> ConfigError:
    named = re.match(r"In '([^']+)': ", str(error))
    where = f"{named[1]}.yaml: " if named and named[1] != "config" else ""
    wanted = error.missing_cfg_file or ""
    group, _, option = wanted.rpartition("/")
    if not group:
        first = str(error).splitlines()[0].rstrip(".")
        return ConfigError(f"{first}; leave --config-name away, or name a file that is there.")
    if group.startswith("experiment/") and where:
        rest = wanted.removeprefix("experiment/").replace("/", ": ")
        return ConfigError(
            f"{where}its defaults name {wanted}, which does not exist; write 'override /{rest}'."
        )
    return _not_an_option(group, option, error.options or [], where)


def _not_an_option(group: str, option: str, known: Sequence[str], where: str = "") -> ConfigError:
    offered = _shown(known)
    plus = "+" if group in _ADDED else ""
    start = f"{where}there is no {plus}{group}={option}; "
    if found := nearest(option, offered):
        return ConfigError(f"{start}did you mean {plus}{group}={found}?")
    if not offered:
        return ConfigError(f"{start}there is no group {group} with such files.")
    hint = f" (or set a key: {group}.key=value)" if group in GROUPS else ""
    return ConfigError(f"{start}{group} is one of {', '.join(offered)}{hint}.")


def _no_such_group(group: str, start: str, overrides: Sequence[str]) -> ConfigError:
    if group in _ADDED and not start:
        asked = next((o for o in overrides if o.startswith(f"{group}=")), f"{group}=NAME")
        article = "an" if group == "experiment" else "a"
        return ConfigError(f"{article} {group} is added with a plus: +{asked}")
    if found := nearest(group, _GROUP_NAMES):
        return ConfigError(f"{start}there is no group {group}; did you mean {found}?")
    return ConfigError(f"{start}there is no group {group}; there are {', '.join(_GROUP_NAMES)}.")


def _not_ours(full_key: str, error: Exception, start: str) -> ConfigError:
    """A key below ``hydra.``, whose schemas are Hydra's own."""
    cause = error.__cause__
    schema = getattr(cause, "object_type", None)
    group, _, leaf = full_key.rpartition(".")
    names = [item.name for item in dataclasses.fields(schema)] if is_dataclass(schema) else []
    if found := nearest(leaf, names):
        return ConfigError(f"{start}there is no key {full_key}; did you mean {group}.{found}?")
    return ConfigError(f"{start}there is no key {full_key}; see Hydra's with --cfg hydra.")


def _not_a_group(schema: str, value: str, start: str) -> ConfigError:
    for group, kind in GROUPS.items():
        if kind.__name__ == schema:
            first = dataclasses.fields(kind)[0].name
            return ConfigError(
                f"{start}{group} is {value}, but it is a group; set its keys, such as "
                f"{group}.{first}."
            )
    return ConfigError("task chooses one task, as in task=link; for several, sweep them with -m.")


def _is_type_error(text: str) -> bool:
    return any(
        mark in text
        for mark in (
            "could not be converted to",
            "expected one of",
            "is not Optional",
            "is not a ListConfig",
            "is not a valid",
            "is incompatible with",
            "Unexpected type",
            "Cannot convert",
        )
    )


def _wrong_type(key: str, typed: str | None, value: str | None, start: str) -> ConfigError:
    """``key`` has a value of the wrong type; ``typed`` is the override as it was typed."""
    plain = re.sub(r"\[\d+\]$", "", key)
    if typed:
        asked, _, value = typed.lstrip("+~").partition("=")
        if asked.startswith(f"{plain}."):
            return unknown_key(asked)
    annotation = _annotation(plain)
    if annotation is None:
        return ConfigError(f"{start}{plain} cannot be {value}; see its value with --cfg job.")
    shown = f" is {value}" if value not in (None, "") else " has the wrong kind of value"
    message = f"{start}{plain}{shown}, but it must be {_described(annotation)}"
    choices = _choices(annotation)
    last = (value or "").strip("[] ").split(",")[-1].strip()
    if found := nearest(last, choices):
        return ConfigError(f"{message}; did you mean {found}?")
    return ConfigError(f"{message}.")


def _annotation(key: str) -> Any:
    """The declared type of a dotted key, or None if no schema declares it."""
    group, _, leaf = key.rpartition(".")
    owners = TASKS.values() if group == "task" else [GROUPS.get(group, Config)]
    if group == "hydra.sweeper":
        owners = SWEEPERS.values()
    for owner in owners:
        if found := typing.get_type_hints(owner).get(leaf):
            return found
    return None


def _described(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return " or ".join([*(_described(kind) for kind in kinds), "null"])
    if origin is list:
        names = _choices(annotation)
        return f"a list of {_joined(names, 'and')}" if names else "a list, written [a,b]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _joined([member.name for member in annotation], "or")
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return plain.get(annotation, "a group's option")


def _choices(annotation: Any) -> list[str]:
    """Every enum member's name that the type admits."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.name for member in annotation]
    return [name for kind in typing.get_args(annotation) for name in _choices(kind)]


def _joined(names: Sequence[str], word: str) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def _schemas() -> dict[str, type]:
    return {kind.__name__: kind for kind in (*GROUPS.values(), *TASKS.values(), Config)}


def _shown(known: Sequence[str]) -> list[str]:
    """A group's options without the schemas, which are there for the YAML files only."""
    return [o for o in known if o != "schema" and not o.startswith("schema_")]


def _after(pattern: str, text: str, flags: int = 0) -> str | None:
    found = re.search(pattern, text, flags)
    return found[1] if found else None


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]

"""A job of a sweep, and what became of it, read from its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, job_identity
from ..errors import ConfigError
from ..sweepers import RankBy

ENDED = ("done", "pruned")
"""States after which a job is not run again."""


@dataclass(frozen=True)
class Job:
    """One point of a sweep.

    Attributes:
        overrides: what it changes, as on the command line.
        config: what they compose to; None where that does not validate.
        error: why it does not.
    """

    overrides: tuple[str, ...]
    config: Config | None
    error: ConfigError | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """Every key that makes it this job."""
        return {} if self.config is None else job_identity(self.config)

    @property
    def identity(self) -> str:
        """64 hexadecimal digits: equal where the same would be done."""
        found = self.keys or {"overrides": sorted(self.overrides)}
        text = json.dumps(found, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        name: its folder's name.
        job: what it was.
        status: ``done``, ``failed``, ``interrupted``, ``pruned``, ``died`` or ``waiting``.
        value: what it is ranked by, None if there is none.
        metric: the name of that figure.
        facts: its run.json, empty if there is none.
        kept: whether it had been finished before.
    """

    name: str
    job: Job
    status: str
    value: float | None = None
    metric: str = ""
    facts: dict[str, Any] | None = None
    kept: bool = False

    @property
    def error(self) -> str | None:
        """Why it failed, or was pruned, in a sentence."""
        if self.job.error is not None:
            return str(self.job.error)
        if self.status == "died":
            return "its process ended without a word; out of memory, or killed"
        return (self.facts or {}).get("error")

    def record(self, keys: Sequence[str]) -> dict[str, Any]:
        """What ``sweep.json`` holds of it; ``keys`` are those that differ within the sweep."""
        facts = self.facts or {}
        git = facts.get("provenance", {}).get("git") or {}
        return {
            "job": self.name,
            "status": self.status,
            "kept": self.kept,
            "overrides": list(self.job.overrides),
            "settings": {key: self.job.keys.get(key) for key in keys},
            "value": self.value,
            "seconds": facts.get("seconds"),
            "error": self.error,
            "adapter": (facts.get("adapter") or {}).get("hash"),
            "config_hash": facts.get("config_hash"),
            "data_lock": facts.get("data_lock"),
            "commit": git.get("commit"),
            "identity": self.job.identity,
        }


def outcome(name: str, job: Job, folder: Path, rank_by: RankBy, *, kept: bool = False) -> Outcome:
    """Read what became of a job from ``run.json`` in its folder."""
    if job.error is not None:
        return Outcome(name, job, "failed")
    facts = read_facts(folder)
    if facts is None:
        return Outcome(name, job, "waiting")
    status = "died" if facts.get("status") == "running" else str(facts.get("status"))
    metric, value = measured(facts, rank_by)
    if status != "done":
        value = None
    return Outcome(name, job, status, value, metric, facts, kept)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """A run folder's run.json; None where there is none that can be read."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def measured(facts: dict[str, Any], rank_by: RankBy) -> tuple[str, float | None]:
    """The figure a finished run is ranked by, with its name."""
    if rank_by == RankBy.score_mae:
        return "score_mae", (facts.get("evaluation") or {}).get("score_mae")
    training = facts.get("training") or {}
    if rank_by == RankBy.monitor and (monitor := facts.get("monitor")):
        return str(monitor["name"]), monitor["value"]
    if "val_loss" in training:
        return "val_loss", training["val_loss"]
    return "result", facts.get("result")


def larger_is_better(metric: str) -> bool:
    """Whether a larger figure of that name is the better one."""
    return metric == "format_compliance"


def differing(jobs: Sequence[Job]) -> list[str]:
    """The keys that are not the same in all jobs; of one that does not validate, as typed."""
    found = [job.keys for job in jobs if job.config is not None]
    names = list(dict.fromkeys(name for keys in found for name in keys))
    typed = [
        dict(word.split("=", 1) for word in job.overrides if "=" in word)
        for job in jobs
        if job.config is None
    ]
    return [
        name
        for name in names
        if any(keys.get(name) != found[0].get(name) for keys in found)
        or any(name in words and not _means(words[name], found[0].get(name)) for words in typed)
    ]


def _means(typed: str, value: Any) -> bool:
    """Whether a word is a value; if in doubt, no."""
    try:
        return float(typed) == float(value)
    except (TypeError, ValueError):
        return typed.lower() == str(value).lower()

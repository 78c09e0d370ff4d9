"""The closing table of a sweep."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.screen import near, plain
from ..report.wording import count
from ..sweepers import SearchSettings
from .bound import Repeated
from .clean import lone
from .composing import quoted
from .jobs import Outcome, differing, larger_is_better

if TYPE_CHECKING:
    from rich.console import Console

MOST_KEYS = 6
"""Columns of settings; where more keys differ, as with another model, the words typed are shown."""


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Best first; those without a figure last, in their own order."""

    def key(one: Outcome) -> tuple[bool, float]:
        if one.value is None:
            return True, 0.0
        return False, -one.value if larger_is_better(one.metric) else one.value

    return sorted(outcomes, key=key)


def show(console: Console, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Print every job, best first, with the keys that differ and the error of one that failed."""
    from rich.table import Table

    keys = differing([one.job for one in outcomes])
    metrics = list(dict.fromkeys(one.metric for one in outcomes if one.value is not None))
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("job", justify="right")
    if len(keys) > MOST_KEYS:
        table.add_column("overrides", overflow="fold")
    else:
        for name in keys:
            table.add_column(name, justify="right", overflow="fold")
    table.add_column(" / ".join(metrics) or "result", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("", overflow="fold")
    for place, one in enumerate(ranked(outcomes), 1):
        if len(keys) > MOST_KEYS:
            settings = [" ".join(one.job.overrides)]
        else:
            settings = [shown(one.job.keys.get(key, "")) for key in keys]
            if one.job.config is None:
                settings = [_typed(one, key) for key in keys]
        seconds = (one.facts or {}).get("seconds")
        table.add_row(
            str(place) if one.value is not None else "-",
            one.name,
            *settings,
            "-" if one.value is None else f"{one.value:.4f}",
            "-" if seconds is None else f"{seconds:.1f}",
            plain(_state(one)),
        )
    console.print()
    console.print(table)
    for sentence in cautions(outcomes):
        console.print(plain(sentence), markup=False)
    console.print(f"sweep    {near(folder)}", soft_wrap=True, markup=False)
    if command := compared(outcomes, folder):
        console.print(f"compare  {command}", soft_wrap=True, markup=False)


def compared(outcomes: Sequence[Outcome], folder: Path) -> str | None:
    """The command that puts the jobs on a page; None where fewer than two have a figure."""
    done = [one.facts or {} for one in outcomes if one.value is not None]
    if len(done) < 2:
        return None
    here = Path.cwd()
    path = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    # Hydra reads the rest of a list's element as words of its own.
    path = path if re.fullmatch(r"[\w./:-]+", path) else quoted(path)
    words = [f"experiment_name={done[0]['experiment']}", f"task.runs=[{path}]"]
    return f"python -m mondrian_ft task=report {shlex.join(words)}"


def show_repeats(
    console: Console,
    repeated: Mapping[int, Repeated],
    winner: int | None,
    metric: str,
    settings: SearchSettings,
    outcomes: Sequence[Outcome],
) -> None:
    """Print what the best configs came to when they were trained again, and which is chosen."""
    from rich.table import Table

    if repeated:
        table = Table(box=None, pad_edge=False, show_edge=False)
        each = f"each {settings.repeat_over.removesuffix('s')}"
        bound = f"at {settings.confidence:.0%} no worse than"
        for head in ("trial", f"mean {metric}", bound, each):
            table.add_column(head, justify="right")
        for number, one in repeated.items():
            table.add_row(
                str(number),
                f"{one.mean:.4f}",
                "-" if one.bound is None else f"{one.bound:.4f}",
                " ".join(f"{value:.4f}" for value in one.values),
            )
        console.print()
        console.print(table)
    if winner is None:
        return
    chosen = next(one for one in outcomes if one.name == str(winner))
    why = "by that bound" if repeated else "by its one figure, which luck has a part in"
    console.print(f"Chosen {why}: trial {winner}.", markup=False)
    words = " ".join(map(shlex.quote, lone(chosen.job.overrides)))
    console.print(f"  python -m mondrian_ft {words}", soft_wrap=True, markup=False)


def cautions(outcomes: Sequence[Outcome]) -> list[str]:
    """What forbids reading the table from top to bottom."""
    done = [one.facts or {} for one in outcomes if one.value is not None]
    said = []
    if len({facts.get("data_lock") for facts in done}) > 1:
        said.append(
            "Not all jobs are of the same data or split (their data locks differ), so their "
            "figures cannot be ranked against each other."
        )
    if len({one.metric for one in outcomes if one.value is not None}) > 1:
        said.append("Not all jobs are ranked by the same figure, so the ranking means nothing.")
    commits = {(facts.get("provenance", {}).get("git") or {}).get("commit") for facts in done}
    if len(commits) > 1:
        said.append("The jobs were run at different commits of the code.")
    if len(done) > 2:
        said.append(
            f"The best of {len(done)} looks better than it is: its figure is what it was chosen by."
        )
    return said


def shown(value: Any) -> str:
    """A setting as the table has it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many jobs came to what, in a sentence."""
    states = {"done": "done", "pruned": "pruned", "failed": "failed", "died": "died"}
    kept = sum(one.kept for one in outcomes)
    parts = []
    for state, word in states.items():
        number = sum(one.status == state for one in outcomes)
        if number:
            parts.append(f"{number} {word}")
    left = sum(one.status in ("waiting", "interrupted") for one in outcomes)
    if left:
        parts.append(f"{left} not run")
    told = f"{count(len(outcomes), 'job')}: {', '.join(parts) or 'none run'}"
    return f"{told} ({kept} of them earlier)." if kept else f"{told}."


def _state(one: Outcome) -> str:
    if one.status == "done":
        return "done earlier" if one.kept else ""
    return f"{one.status}: {one.error}" if one.error else one.status


def _typed(one: Outcome, key: str) -> str:
    """The value of a job that does not validate, as it was typed."""
    for word in one.job.overrides:
        name, _, value = word.lstrip("+").partition("=")
        if name == key:
            return value
    return ""

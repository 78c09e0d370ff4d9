"""Gathering finished runs into ``experiments/<name>/``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.rows import load_json
from ..errors import DataError
from ..files import atomic_write_json
from ..report import experiment, screen

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

OUTPUTS = Path("outputs")


def report(task: tasks.Report, config: Config, run: Run) -> None:
    """Read the runs, and write ``README.md`` and ``runs.json``.

    Raises:
        DataError: there is no run of a main job or an evaluation to gather, or one that was named
            is none.
    """
    name = config.experiment_name
    folders = [Path(folder) for folder in task.runs] or list(_folders(OUTPUTS / name))
    runs = [found for folder in folders if (found := _gathered(folder, named=bool(task.runs)))]
    runs = [one for one in runs if one.name != run.folder.name]
    if not runs:
        raise DataError(
            f"There is no evaluated run in {OUTPUTS / name}; run the experiment first, or name run "
            "folders with task.runs=[…]."
        )
    folder = Path(task.output_dir) if task.output_dir else Path("experiments") / name
    experiment.write_page(folder / "README.md", name, experiment.results(runs))
    atomic_write_json(folder / "runs.json", [experiment.record(one) for one in runs])
    run.record(gathered=[one.name for one in runs])
    run.console.print(
        f"Gathered {len(runs)} {'run' if len(runs) == 1 else 'runs'} of {name}.", markup=False
    )
    where = screen.near(folder / "README.md")
    run.console.print(f"page     {where}", soft_wrap=True, markup=False)


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if (path / "run.json").is_file())


def _gathered(folder: Path, *, named: bool) -> experiment.GatheredRun | None:
    """A run that was evaluated; None of one that was not, unless it was asked for by name."""
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder} holds no run.json, so it is no run folder.")
    facts: dict[str, Any] = load_json(folder / "run.json", "run")
    where = (facts.get("evaluation") or {}).get("report")
    # A folder that was moved still has its own comparison inside.
    paths = [folder / "evaluation" / "comparison_report.json", *([Path(where)] if where else [])]
    found = next((path for path in paths if path.is_file()), None)
    if found is None and not named:
        return None
    comparison = load_json(found, "comparison") if found else None
    return experiment.GatheredRun(folder.name, facts, comparison)

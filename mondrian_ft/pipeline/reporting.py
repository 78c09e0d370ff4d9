"""Gathering runs into ``experiments/<name>/``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.rows import load_json
from ..errors import DataError
from ..files import PUT_ASIDE, SWEEP_BOOK, atomic_write_json
from ..report import compare, experiment, plots, screen, wording

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

OUTPUTS = Path("outputs")
PAGE = "compare.html"
TRAINED = ("experiment", "train", "evaluate")
"""Tasks whose runs have something to compare."""


def report(task: tasks.Report, config: Config, run: Run) -> None:
    """Read the runs, and write ``README.md``, ``compare.html`` and ``runs.json``.

    Raises:
        DataError: there is no run of a main job or an evaluation to gather, or one that was named
            is none.
    """
    name = config.experiment_name
    left_out: list[str] = []
    if task.runs:
        folders = list(dict.fromkeys(found for one in task.runs for found in _named(one, left_out)))
    else:
        folders = [path for path in _below(OUTPUTS / name) if _report_of(path, _facts(path))]
    folders = [folder for folder in folders if folder.resolve() != run.folder.resolve()]
    if not folders:
        if task.runs:
            raise DataError(
                f"There is no run to compare in {', '.join(map(screen.near, task.runs))}; "
                + (" ".join(left_out) or "give run folders, or folders of them.")
            )
        raise DataError(
            f"There is no evaluated run in {OUTPUTS / name}; run the experiment first, or name run "
            "folders with task.runs=[…]."
        )
    named = _names(folders)
    runs = [_gathered(folder, named[folder], left_out) for folder in folders]
    folder = Path(task.output_dir) if task.output_dir else Path("experiments") / name
    page = compare.write(name, runs, folder / PAGE, left_out=left_out)
    experiment.write_page(folder / "README.md", name, experiment.results(runs, page=PAGE))
    atomic_write_json(folder / "runs.json", [experiment.record(one) for one in runs])
    run.record(gathered=[one.name for one in runs])
    run.console.print(f"Gathered {wording.count(len(runs), 'run')} of {name}.", markup=False)
    for sentence in left_out:
        run.warn(sentence)
    for what, path in (("page", page), ("notes", folder / "README.md")):
        run.console.print(f"{what:<8} {screen.near(path)}", soft_wrap=True, markup=False)


def _named(given: str, left_out: list[str]) -> Iterator[Path]:
    """The run folders that a word of ``task.runs`` means: one, those in a folder, or a pattern's.

    Of a folder or a pattern, runs of tasks that give nothing to compare, and those that cannot be
    read, are left out with a sentence each.

    Raises:
        DataError: it means none.
    """
    path = Path(given)
    if (path / "run.json").is_file():
        yield path
        return
    found = [path]
    if has_magic(given):
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))), key=_order)
    found = [run for one in found for run in _below(one)]
    if not found:
        raise DataError(f"{given} holds no run.json, so it is no run folder.")
    others: dict[str, int] = {}
    for run in found:
        try:
            task = _facts(run).get("task")
        except DataError as error:
            left_out.append(f"A run was left out. {_near(str(error))}")
            continue
        if task is None or task in TRAINED:
            yield run
        else:
            others[str(task)] = others.get(str(task), 0) + 1
    for task, count in others.items():
        verb = "was" if count == 1 else "were"
        left_out.append(
            f"{wording.count(count, 'run')} of task={task} {verb} left out: there is nothing to "
            "compare."
        )


def _below(folder: Path) -> Iterator[Path]:
    """The run folders in ``folder``, which may be one itself, at any depth but not in one another.

    Numbered folders, as a sweep's jobs are, come in the order of their numbers. What a sweep put
    aside, since the job was run again, is no run of its own.
    """
    if (folder / "run.json").is_file():
        yield folder
    elif folder.is_dir() and not folder.is_symlink():
        swept = (folder / SWEEP_BOOK).is_file()
        for path in sorted(folder.iterdir(), key=_order):
            if not (swept and path.name == PUT_ASIDE):
                yield from _below(path)


def _order(path: Path) -> tuple[bool, int, str]:
    return not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path.name


def _names(folders: Iterable[Path]) -> dict[Path, str]:
    """What each run is called: its folder's name, with as much of the path as tells it apart."""
    named = {folder: folder.name for folder in folders}
    for depth in (2, 3):
        taken = list(named.values())
        for folder, name in named.items():
            if taken.count(name) > 1 or (depth == 2 and name.isdigit()):
                named[folder] = "/".join(folder.parts[-depth:])
    return named


def _facts(folder: Path) -> dict[str, Any]:
    return load_json(folder / "run.json", "run")


def _report_of(folder: Path, facts: dict[str, Any]) -> Path | None:
    """Where a run's comparison lies; None where it was not evaluated."""
    where = (facts.get("evaluation") or {}).get("report")
    # A folder that was moved still has its own comparison inside.
    paths = [folder / "evaluation" / "comparison_report.json", *([Path(where)] if where else [])]
    return next((path for path in paths if path.is_file()), None)


def _near(sentence: str) -> str:
    """A sentence whose paths are those of this machine no more: the page is to be committed."""
    return sentence.replace(f"{Path.cwd()}/", "")


def _gathered(folder: Path, name: str, left_out: list[str]) -> experiment.GatheredRun:
    """A run as it lies on disk; a log that cannot be read is left out with a sentence."""
    facts = _facts(folder)
    if facts.get("error"):
        facts["error"] = _near(str(facts["error"]))
    found = _report_of(folder, facts)
    comparison = load_json(found, "comparison") if found else None
    try:
        log = plots.read_log(folder / "training_log.jsonl")
    except DataError as error:
        left_out.append(f"The curves of {name} were left out. {_near(str(error))}")
        log = []
    return experiment.GatheredRun(name, facts, comparison, log)

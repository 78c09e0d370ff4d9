"""A person's blind comparison of base and tuned: the page, until Ctrl-C, and where it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MondrianError
from ..evaluation import assessments
from ..evaluation.assessments import ASSESSMENTS_NAME, Pair
from ..files import atomic_write_json, is_read_only
from ..report import html, screen, wording
from . import judging, versioning

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

REPORT = "comparison_report.json"
ASIDE = Path("outputs/assessments")
"""Where judgements of a report go that may not be written beside, as of a registered version."""


def assess(task: tasks.Assess, config: Config, run: Run) -> None:
    """Serve the blind comparison, and add what was preferred to the report when it is stopped.

    Raises:
        ConfigError: there is no report to judge.
        DataError: the report has no two answers to compare, or the assessments are damaged.
        ServerError: the port is taken.
    """
    from ..serving import local
    from ..serving.assess import Desk, make_app

    path = find_report(task.report, config, run)
    report = assessments.read_report(path)
    pairs = assessments.pairs_of(report, path)
    adapter = assessments.adapter_hash(report)
    folder = path.parent
    if is_read_only(path):
        folder = ASIDE.absolute() / (adapter or assessments.sha256_text(str(path)))[:12]
        run.console.print(
            f"{screen.near(path)} is read-only; judgements are kept in {screen.near(folder)}.",
            soft_wrap=True,
            markup=False,
        )
    found = assessments.read(folder / ASSESSMENTS_NAME)
    if found.notice:
        run.warn(found.notice)
    if stale := assessments.summarise(pairs, found)["stale"]:
        run.warn(
            f"{wording.count(stale, 'judgement')} in {found.path} about other answers than this "
            "report's will not count"
        )
    with local.listen(task.host, task.port) as listening:
        if not local.is_loopback(task.host):
            run.warn(
                f"task.host={task.host} lets everyone who reaches this machine look at the "
                "photographs and judge the answers"
            )
        desk = Desk(pairs, found, adapter=adapter, seed=task.seed, reviewer=task.reviewer)

        def keep() -> None:
            tell(run, path, folder, pairs)

        app = make_app(desk, host=task.host, on_reveal=keep)
        counts = desk.counts()
        said = run.console.print
        said(f"\nAssess {wording.count(counts['all'], 'pair')}, {counts['left']} of them not yet:")
        said(f"  {local.url_of(task.host, listening)}", style="bold", soft_wrap=True, markup=False)
        said("Which is whose is told at the end. Ctrl-C stops it; each choice is on the disk.")
        local.serve(app, listening)
    people = tell(run, path, folder, pairs)
    counts = desk.counts()
    run.record(assess=people, assessments_file=str(desk.path))
    if people is None:
        said("\nNothing was judged.")
        return
    said(f"\n{assessments.sentence(people)}", markup=False)
    for note in assessments.notes(people):
        said(note, markup=False)
    said(f"Judgements: {screen.near(desk.path)}", soft_wrap=True, markup=False)
    if (folder / "report.html").is_file():
        said(f"Report: {screen.near(folder / 'report.html')}", soft_wrap=True, markup=False)


def find_report(name: str | None, config: Config, run: Run) -> Path:
    """The ``comparison_report.json`` that ``task.report`` means; see there.

    Raises:
        ConfigError: nothing is named, and this experiment has no evaluated run.
        DataError: what is named holds no report.
    """
    if name is None and config.eval.report is not None:
        return Path(config.eval.report)
    if name is None:
        # The folders' names are times, so the last one is the newest.
        runs = sorted(run.folder.parent.glob(f"*/evaluation/{REPORT}"))
        if not runs:
            raise ConfigError(
                f"there is no evaluated run of the experiment {config.experiment_name} here; set "
                f"task.report to a {REPORT}, a run folder or an adapter directory."
            )
        return runs[-1]
    place = versioning.find_adapter(name, config)
    if not place.is_dir():
        return place
    for inside in (place / REPORT, place / "evaluation" / REPORT):
        if inside.is_file():
            return inside
    return place / "evaluation" / REPORT


def recount(run: Run, path: Path) -> None:
    """Tell earlier judgements in a report that was written anew, those of the same answers."""
    if (path.parent / ASSESSMENTS_NAME).is_file():
        tell(run, path, path.parent, ())


def tell(run: Run, path: Path, folder: Path, pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Count what is on the disk, and write it into the report and its pages.

    Whatever of it cannot be written is a warning: the judgements are safe in their own file.
    ``pairs`` are those that were shown. Returns ``evidence.people``, None if nothing was judged.
    """
    found = assessments.read(folder / ASSESSMENTS_NAME)
    try:
        # Evaluating again may have put another report there meanwhile.
        report = assessments.read_report(path)
        pairs = assessments.pairs_of(report, path)
        people = assessments.summarise(pairs, found)
    except MondrianError as error:
        run.warn(f"the report is as it was. {error}")
        return assessments.summarise(pairs, found)
    nothing = not people["judgements"]
    before = report.get("evidence")
    if nothing and not (isinstance(before, Mapping) and "people" in before):
        return None
    shown = None if nothing else people
    judged = judging.with_agreement(
        before.get("judge") if isinstance(before, Mapping) else None, pairs, found
    )
    for target in _reports(report, path, folder):
        try:
            content = assessments.read_report(target if target.is_file() else path)
            atomic_write_json(target, _with(content, people=shown, judge=judged))
        except MondrianError as error:
            run.warn(str(error))
    for page, source in _pages(report, path, folder):
        try:
            if not html.set_people(source, page, shown, judged):
                run.warn(
                    f"{source} was made before people could be told in it; task=evaluate makes a "
                    "new one"
                )
        except (MondrianError, OSError, ValueError) as error:
            run.warn(f"the page {page} is as it was: {error}")
    return shown


def _with(report: Mapping[str, Any], **parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """A report with these parts of ``evidence``, without those that are None."""
    kept = {k: v for k, v in (report.get("evidence") or {}).items() if k not in parts}
    return {**report, "evidence": kept | {k: v for k, v in parts.items() if v is not None}}


def _reports(report: Mapping[str, Any], path: Path, folder: Path) -> Iterator[Path]:
    """The report (or its copy where judgements are kept), and the adapter's copy of it."""
    yield folder / path.name
    if copy := _adapter_copy(report, path):
        yield copy


def _pages(report: Mapping[str, Any], path: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """(Page to write, page it is made from): beside each report, and the run folder's own."""
    beside = path.parent / "report.html"
    if beside.is_file():
        yield folder / "report.html", beside
    run_folder = path.parent.parent
    if (run_folder / "run.json").is_file() and (run_folder / "report.html").is_file():
        yield run_folder / "report.html", run_folder / "report.html"
    copy = _adapter_copy(report, path)
    if copy and (copy.parent / "report.html").is_file():
        yield copy.parent / "report.html", copy.parent / "report.html"


def _adapter_copy(report: Mapping[str, Any], path: Path) -> Path | None:
    """The same evaluation in the adapter's directory; None if there is none to be changed."""
    if not report.get("lora_path"):
        return None
    copy = Path(str(report["lora_path"])) / "evaluation" / REPORT
    if not copy.is_file() or is_read_only(copy) or copy.resolve() == path.resolve():
        return None
    try:
        other = assessments.read_report(copy)
    except MondrianError:
        return None  # Another program's file; it is none of ours to mend.
    same = all(other.get(key) == report.get(key) for key in ("evaluation_date", "sample_results"))
    return copy if same else None

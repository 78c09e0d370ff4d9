"""Linking: job rows, photographs and analyses become a manifest, and nothing is lost in silence.

Every row of every database ends either in the manifest or in ``link_report.json`` with a reason
from `reasons.Reason`. The manifest's keys are those of the users' own linker (facts: "Their
training and evaluation files"), and more beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from ..files import atomic_write_json
from .analyses import ACCEPT, Shelf, find_analysis, photograph_prefix, shelve
from .photographs import Folder, Match, Photographs, base_name, find_photograph
from .prompt import build_prompt, fingerprint
from .reasons import LeftOut, Reason
from .store import Job, JobStore, advisor_id

MANIFEST_NAME = "training_data_manifest.json"
REPORT_NAME = "link_report.json"
FINISHED = ("done", "completed")
"""The two values of ``jobs.status`` that mean an analysis was finished (facts: "status")."""


@dataclass(frozen=True)
class LinkResult:
    """``manifest`` and ``report`` are JSON-ready; see `link` for their keys."""

    manifest: dict[str, Any]
    report: dict[str, Any]


class NoUsableRows(DataError):
    """No row could be linked; ``report`` is the link report, with a reason for every row."""

    def __init__(self, sentence: str, report: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.report = report


def link(
    db_paths: str | Path | Sequence[str | Path],
    source_dir: str | Path,
    analysis_dir: str | Path | None,
    advisor: str | None,
    *,
    limit: int | None = None,
    accept: str = "mended",
    generated: bool = False,
    scratch: Path,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LinkResult:
    """Join the finished rows of one or more job databases with photographs and analyses.

    Args:
        db_paths: one database or several; a job id in several is linked from the first that can.
        source_dir: the folder of photographs.
        analysis_dir: the folder of analysis files; None reads only analyses stored in the rows.
        advisor: the advisor's id; None links every advisor.
        limit: link this many rows and leave the rest out with the reason ``over_limit``.
        accept: what an analysis must be, one of `analyses.ACCEPT`.
        generated: link also the analyses that our own service wrote (``jobs.generated_by``);
            without it a model does not learn from its own answers.
        scratch: where ``analyses/`` is made for analyses that are stored in the rows, or not as
            JSON.
        cache: a file that keeps what is known of photographs until they change; None keeps nothing.
        progress: told how many photographs have been checked, and of how many.

    Returns:
        ``manifest``: ``timestamp``, ``total_records``, ``by_advisor.<advisor>.count`` and
        ``.records``, each with ``job_id, image_path, analysis_path, completed_at, json_size``
        (bytes) ``, overall_score`` and ``advisor, database, image_sha256, image_size`` (width and
        height, upright) ``, image_orientation, mends, missing, photograph_rule,
        photograph_confidence, analysis_rule, analysis_source`` (the file it was read from, None for
        a column) ``, analysis_parser, passed_over, prompt_source, prompt_id``;
        ``prompts.<prompt_id>``: the text; all paths absolute.
        ``report``: ``rows``, ``linked``, ``left_out[] = {job_id, reason, detail, database}`` with
        ``linked + len(left_out) == rows``, ``reasons`` (counts), ``mended`` (rows repaired),
        ``incomplete`` (rows that lack a text), ``accept``.

    Raises:
        DataError: a database or folder cannot be read.
        NoUsableRows: no row could be linked; the sentence counts the reasons.
    """
    if accept not in ACCEPT:
        raise DataError(f"data.accept is {accept!r}; it is one of {', '.join(ACCEPT)}.")
    databases = [db_paths] if isinstance(db_paths, str | Path) else list(db_paths)
    if not databases:
        raise DataError("data.db_path lists no database; give the path of a mondrian.db.")
    photographs_in = _folder(source_dir, "source_dir", "photographs")
    analyses_in = _folder(analysis_dir, "analysis_dir", "analyses") if analysis_dir else None
    stores = [JobStore(path) for path in databases]
    ids = {job.id for store in stores for job in store.jobs() if job.id}
    linker = _Linker(
        source=Folder(photographs_in),
        shelf=Shelf(Folder(analyses_in) if analyses_in else None, ids),
        scratch=Path(scratch).absolute(),
        advisor=advisor_id(advisor),
        limit=limit,
        accept=accept,
        generated=generated,
        photographs=Photographs(cache),
        progress=progress,
    )
    for store in stores:
        linker.add(store)
    linker.photographs.save()
    report = linker.report()
    if not linker.records:
        raise NoUsableRows(_none_usable(stores, linker.advisor, report), report)
    return LinkResult(linker.manifest(stores), report)


def write(result: LinkResult, output_dir: str | Path) -> Path:
    """Write the manifest and the report into ``output_dir``; returns the manifest's path."""
    path = Path(output_dir) / MANIFEST_NAME
    # A line for each row that was left out, and for each record of an advisor.
    atomic_write_json(Path(output_dir) / REPORT_NAME, result.report, levels=2)
    atomic_write_json(path, result.manifest, levels=4)
    return path


def link_into(
    output_dir: str | Path,
    db_paths: str | Path | Sequence[str | Path],
    source_dir: str | Path,
    analysis_dir: str | Path | None,
    advisor: str | None,
    *,
    limit: int | None = None,
    accept: str = "mended",
    generated: bool = False,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LinkResult:
    """`link` and `write` in one; the report is written even when no row could be linked."""
    output = Path(output_dir)
    try:
        result = link(
            db_paths,
            source_dir,
            analysis_dir,
            advisor,
            limit=limit,
            accept=accept,
            generated=generated,
            scratch=output,
            cache=cache,
            progress=progress,
        )
    except NoUsableRows as error:
        atomic_write_json(output / REPORT_NAME, error.report, levels=2)
        raise NoUsableRows(
            f"{error} Every row and its reason: {output / REPORT_NAME}.", error.report
        ) from None
    write(result, output)
    return result


@dataclass
class _Linker:
    """The state of one linking: what was linked, what was left out."""

    source: Folder
    shelf: Shelf
    scratch: Path
    advisor: str | None
    limit: int | None
    accept: str
    generated: bool
    photographs: Photographs
    progress: Callable[[int, int], Any]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    matches: dict[tuple[str | None, str | None], Match | LeftOut] = field(default_factory=dict)

    def add(self, store: JobStore) -> None:
        """Link or leave out every row of one database."""
        profiles = _Profiles(store)
        if self.limit is None:
            self._look_at_photographs(store)
        for job in store.jobs():
            try:
                self.records[job.id or ""] = self._record(job, store, profiles)
            except LeftOut as error:
                self._leave_out(job, store, error.reason, str(error))

    def _look_at_photographs(self, store: JobStore) -> None:
        """Check all that will be needed at once; what is wrong with a row is told later."""
        paths: list[Path] = []
        for job in store.jobs():
            with suppress(LeftOut):
                choose_advisor(job, self.advisor)
                check_finished(job)
                check_source(job, self.generated)
                paths.append(self._photograph(job).path)
        self.photographs.check_all(paths, self.progress)

    def _photograph(self, job: Job) -> Match:
        asked = job.filename, photograph_prefix(job, self.shelf)
        if asked not in self.matches:
            try:
                found = find_photograph(asked[0], self.source, asked[1], self.photographs.sha256)
            except LeftOut as error:
                found = error
            self.matches[asked] = found
        match = self.matches[asked]
        if isinstance(match, LeftOut):
            raise LeftOut(match.reason, str(match))
        return match

    def _record(self, job: Job, store: JobStore, profiles: _Profiles) -> dict[str, Any]:
        advisor = choose_advisor(job, self.advisor)
        check_finished(job)
        check_source(job, self.generated)
        if job.id in self.records:
            first = self.records[job.id]["database"]
            raise LeftOut(Reason.DUPLICATE_ID, f"The same job id was already linked from {first}.")
        if self.limit is not None and len(self.records) >= self.limit:
            raise LeftOut(Reason.OVER_LIMIT, f"data.limit is {self.limit}; the row was not read.")
        analysis = find_analysis(
            job, advisor, self.shelf, profiles.of(job, advisor), accept=self.accept
        )
        match = self._photograph(job)
        photograph = self.photographs.check(match.path)
        own = None if {"prompt"} & {*job.undecodable, *job.cut} else job.prompt
        prompt, source = build_prompt(store, advisor, own)
        prompt_id = fingerprint(prompt)
        self.prompts.setdefault(prompt_id, {"text": prompt, "source": source})
        path = shelve(analysis, job, advisor, self.scratch)
        critique = analysis.reading.parsed.critique
        return {
            "job_id": job.id,
            "image_path": str(photograph.path),
            "analysis_path": str(path),
            "completed_at": job.completed_at,
            "json_size": path.stat().st_size,
            "overall_score": critique.overall_score,
            "advisor": advisor,
            "database": str(store.path),
            "image_sha256": photograph.sha256,
            "image_size": list(photograph.size),
            "image_orientation": photograph.orientation,
            "mends": analysis.reading.parsed.mends,
            "missing": critique.missing(),
            "photograph_rule": match.rule,
            "photograph_confidence": match.confidence,
            "analysis_rule": analysis.source.rule,
            "analysis_source": str(analysis.source.path) if analysis.source.path else None,
            "analysis_parser": analysis.reading.parser,
            "generated_by": job.generated_by,
            "passed_over": analysis.passed_over,
            "prompt_source": source,
            "prompt_id": prompt_id,
        }

    def _leave_out(self, job: Job, store: JobStore, reason: Reason, detail: str) -> None:
        self.left_out.append(
            {
                "job_id": job.id,
                "reason": reason.value,
                "detail": detail,
                "database": str(store.path),
            }
        )

    def report(self) -> dict[str, Any]:
        """What became of every row."""
        return {
            "rows": len(self.records) + len(self.left_out),
            "linked": len(self.records),
            "left_out": self.left_out,
            "reasons": dict(Counter(entry["reason"] for entry in self.left_out).most_common()),
            "mended": [
                {"job_id": record["job_id"], "mends": record["mends"]}
                for record in self.records.values()
                if record["mends"]
            ],
            "incomplete": [
                {"job_id": record["job_id"], "missing": record["missing"]}
                for record in self.records.values()
                if record["missing"]
            ],
            "accept": self.accept,
        }

    def manifest(self, stores: Iterable[JobStore]) -> dict[str, Any]:
        """The linked rows, by advisor."""
        by_advisor: dict[str, dict[str, Any]] = {}
        for record in self.records.values():
            entry = by_advisor.setdefault(record["advisor"], {"count": 0, "records": []})
            entry["records"].append(record)
            entry["count"] += 1
        return {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_records": len(self.records),
            "databases": [str(store.path) for store in stores],
            "source_dir": str(self.source.path),
            "analysis_dir": str(self.shelf.folder.path) if self.shelf.folder else None,
            "prompts": self.prompts,
            "by_advisor": by_advisor,
        }


class _Profiles:
    """A database's rows of ``dimensional_profiles``, by the job or the photograph they judge."""

    def __init__(self, store: JobStore) -> None:
        self._by_job: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self._by_photograph: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in store.profiles():
            advisor = advisor_id(row["advisor_id"])
            if advisor and row.get("job_id"):
                self._by_job[advisor, str(row["job_id"])].append(row)
            elif advisor and row["image_path"]:
                self._by_photograph[advisor, base_name(row["image_path"])].append(row)

    def of(self, job: Job, advisor: str) -> list[dict[str, Any]]:
        """The row's own profiles, else the one of its photograph; several of that are none."""
        if own := self._by_job.get((advisor, job.id or "")):
            return own
        found = self._by_photograph.get((advisor, base_name(job.filename or "")), [])
        return found if len(found) == 1 else []


def choose_advisor(job: Job, wanted: str | None) -> str:
    """The one advisor whose analysis a row holds.

    Raises:
        LeftOut: the row has no id, it is another advisor's, or it names none or several
            (facts: a request may say ``all``, ``random`` or a comma list).
    """
    if not (job.id or "").strip():
        raise LeftOut(Reason.NO_JOB_ID, "The row has no id.")
    name = advisor_id(job.advisor)
    if name is None or name in ("all", "random") or "," in name:
        detail = f"The row's advisor is {job.advisor!r}, so whose analysis it holds is not known."
        raise LeftOut(Reason.ADVISOR_UNCLEAR, detail)
    if wanted is not None and name != wanted:
        raise LeftOut(Reason.OTHER_ADVISOR, f"The row is by {name}.")
    return name


def check_finished(job: Job) -> None:
    """Raises `LeftOut` unless the row's status says that its analysis was finished."""
    if (job.status or "").strip().lower() not in FINISHED:
        detail = f"The row's status is {job.status!r}; finished rows say {' or '.join(FINISHED)}."
        raise LeftOut(Reason.NOT_FINISHED, detail)


def check_source(job: Job, generated: bool) -> None:
    """Raises `LeftOut` for an analysis that our own service wrote, unless those are wanted."""
    if not generated and (job.generated_by or "").strip():
        detail = (
            f"The service {job.generated_by} wrote this analysis; data.generated=true links it."
        )
        raise LeftOut(Reason.GENERATED, detail)


def _folder(path: str | Path, key: str, what: str) -> Path:
    if not str(path).strip():
        raise DataError(f"data.{key} is empty; give the folder of the {what}.")
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"The folder of {what}, {folder}, {problem}; set data.{key}.")
    return folder


def _none_usable(stores: Sequence[JobStore], advisor: str | None, report: dict[str, Any]) -> str:
    """Why nothing could be linked, with the counts, in a sentence or two."""
    where = ", ".join(str(store.path) for store in stores)
    if report["rows"] == 0:
        return f"The table `jobs` of {where} has no rows; let the service analyse some photographs."
    counts = ", ".join(f"{count} {reason}" for reason, count in report["reasons"].items())
    sentence = f"None of the {report['rows']} rows of {where} can be linked: {counts}."
    jobs = [job for store in stores for job in store.jobs()]
    names = Counter(name for job in jobs if (name := advisor_id(job.advisor)))
    if advisor is not None and advisor not in names:
        seen = ", ".join(f"{name} ({count})" for name, count in names.most_common(8)) or "none"
        meant = nearest(advisor, names)
        hint = f"; did you mean {meant}?" if meant else "."
        return f"{sentence} No row is by advisor {advisor!r}; the advisors are {seen}{hint}"
    if report["reasons"].get(Reason.NOT_FINISHED.value):
        seen = Counter(str(job.status) for job in jobs).most_common(8)
        statuses = ", ".join(f"{status} ({count})" for status, count in seen)
        return f"{sentence} The statuses are {statuses}; finished rows say done or completed."
    return sentence

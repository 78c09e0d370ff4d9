"""The page on which a person accepts, corrects or rejects labels.

    GET  /                          the page: one file, no script or font from elsewhere
    GET  /api/rows                  every row in short, and how many are decided
    GET  /api/rows/{index}          one row: critique as it is stored, flags, decision
    POST /api/rows/{index}/decision what a person decided; answers with the row and the counts
    GET  /photographs/{sha256}      the upright photograph, at most `pages.SIDE` pixels a side

Photographs are asked for by the hash of their content, and only those under review are known, so
no path of a request ever reaches the disk. Who may ask is `local.Guard`'s business.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ..data import corrections
from ..data.audit import Entry, Finding
from ..data.corrections import Correction, Corrections, Decision, Seen
from ..data.critique import Critique, validate
from ..errors import DataError
from .local import Guard
from .pages import Refused, fresh, make_page_app, picture


@dataclass(frozen=True)
class Flag:
    """What the audit says of a row; ``grave`` where its scores teach nothing."""

    name: str
    title: str
    explanation: str
    grave: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "explanation": self.explanation,
            "grave": self.grave,
        }


@dataclass(frozen=True)
class Case:
    """One row under review: the entry, what a decision about it is about, and its flags."""

    entry: Entry
    seen: Seen
    flags: tuple[Flag, ...]


def cases_of(entries: Sequence[Entry], findings: Sequence[Finding]) -> list[Case]:
    """Rows with the findings that name them.

    Findings that ``data.drop`` does not take are about prompts, or about all rows together; beside
    a row there would be nothing to do about them, so they are not shown.

    Raises:
        DataError: a photograph that has to be hashed cannot be read.
    """
    flags: dict[str, list[Flag]] = {}
    for found in findings:
        if found.droppable:
            flag = Flag(found.name, found.title, found.explanation, found.spoils)
            for row in found.rows:
                flags.setdefault(row, []).append(flag)
    return [Case(e, e.seen(), tuple(flags.get(e.job_id, ()))) for e in entries]


class Decided(BaseModel):
    """The body of a decision; ``job_id`` and ``analysis_sha256`` say what the person looked at."""

    model_config = ConfigDict(extra="forbid")

    job_id: str
    analysis_sha256: str
    decision: Decision
    critique: dict[str, Any] | None = None
    remark: str = Field(default="", max_length=2000)
    reviewer: str | None = Field(default=None, max_length=200)


class Desk:
    """The rows under review and what was decided about them; safe to use from several threads.

    Args:
        cases: the rows, in the order they are shown.
        found: the corrections so far; decisions about another text or picture do not count.
    """

    def __init__(self, cases: Sequence[Case], found: Corrections) -> None:
        self.cases = list(cases)
        self.path = found.path
        self.photographs = {case.seen.image_sha256: case.entry.image for case in self.cases}
        self._stale: dict[str, str] = {}
        self._latest: dict[str, Correction] = {}
        self._lock = threading.Lock()
        for case in self.cases:
            correction = found.latest.get(case.seen.job_id)
            if correction is None:
                continue
            if why := corrections.difference(correction, case.seen):
                self._stale[case.seen.job_id] = (
                    f"An earlier decision ({correction.decision}, {correction.timestamp[:10]}) "
                    f"does not count any more: {why} changed since."
                )
            else:
                self._latest[case.seen.job_id] = correction

    def counts(self) -> dict[str, int]:
        """Rows by what was decided: ``accept``, ``correct``, ``reject``, ``left``, ``all``."""
        made = [one.decision for one in list(self._latest.values())]
        counts = {str(d): made.count(d) for d in Decision if d is not Decision.UNDO}
        return {**counts, "left": len(self.cases) - len(made), "all": len(self.cases)}

    def rows(self) -> list[dict[str, Any]]:
        """Every row in short."""
        return [self.brief(index) for index in range(len(self.cases))]

    def brief(self, index: int) -> dict[str, Any]:
        """A row for a list: ids, flags, decision, and the scores as they are now decided."""
        case = self.cases[index]
        correction = self._latest.get(case.seen.job_id)
        critique = (correction and correction.critique) or case.entry.critique
        return {
            "index": index,
            "job_id": case.seen.job_id,
            "advisor": case.entry.advisor,
            "image_sha256": case.seen.image_sha256,
            "flags": [flag.as_dict() for flag in case.flags],
            "decision": str(correction.decision) if correction else None,
            "scores": critique.scores() if critique else {},
            "overall_score": critique.overall_score if critique else None,
        }

    def row(self, index: int) -> dict[str, Any]:
        """A row whole: `brief`, the stored critique, the decision, and what does not count."""
        case = self.case(index)
        entry, job = case.entry, case.seen.job_id
        correction = self._latest.get(job)
        return {
            **self.brief(index),
            "file": entry.image.name,
            "analysis_sha256": case.seen.analysis_sha256,
            "critique": _plain(entry.critique),
            "problem": entry.problem,
            "text": "" if entry.critique else entry.text[:20_000],
            "corrected": _plain(correction.critique) if correction else None,
            "remark": correction.remark if correction else "",
            "stale": self._stale.get(job, ""),
        }

    def case(self, index: int) -> Case:
        """Raises `Refused` (404) if there is no such row."""
        if not 0 <= index < len(self.cases):
            raise Refused(404, f"There is no row {index}; there are {len(self.cases)}.")
        return self.cases[index]

    def decide(self, index: int, wanted: Decided) -> None:
        """Write a decision; when this returns it is on the disk.

        Raises:
            Refused: the row is another one than the person saw (409), or the decision does not
                make sense for it (422).
            MondrianError: the file cannot be written.
        """
        case = self.case(index)
        if (wanted.job_id, wanted.analysis_sha256) != (case.seen.job_id, case.seen.analysis_sha256):
            raise Refused(409, "This row is another one now than on the page; load the page again.")
        correction = self._correction(case, wanted)
        with self._lock:
            # A mistaken key pressed on an undecided row is no event.
            if wanted.decision is Decision.UNDO and case.seen.job_id not in self._latest:
                return
            corrections.append(self.path, correction)
            self._stale.pop(case.seen.job_id, None)
            if wanted.decision is Decision.UNDO:
                del self._latest[case.seen.job_id]
            else:
                self._latest[case.seen.job_id] = correction

    def _correction(self, case: Case, wanted: Decided) -> Correction:
        before = case.entry.critique
        if before is None and wanted.decision in (Decision.ACCEPT, Decision.CORRECT):
            raise Refused(
                422, "The analysis of this row cannot be read as a critique; it can be rejected."
            )
        try:
            after = None if wanted.critique is None else validate(wanted.critique, partial=True)
            if after and before:
                _check_same_shape(before, after)
            return corrections.decide(
                case.seen,
                wanted.decision,
                critique=after,
                remark=wanted.remark.strip(),
                reviewer=(wanted.reviewer or "").strip() or None,
            )
        except DataError as error:
            raise Refused(422, str(error)) from None


def _check_same_shape(before: Critique, after: Critique) -> None:
    """A correction judges the same dimensions, and takes no text away."""
    names = [[d.name for d in critique.dimensions] for critique in (before, after)]
    if names[0] != names[1]:
        raise DataError(
            f"The dimensions are {', '.join(names[1])}; a correction keeps {', '.join(names[0])}."
        )
    if gone := [key for key in after.missing() if key not in before.missing()]:
        raise DataError(f"The key {gone[0]} is missing; the stored critique has it.")


def _plain(critique: Critique | None) -> dict[str, Any] | None:
    return critique.model_dump(exclude_unset=True) if critique else None


def make_app(desk: Desk, *, host: str = "127.0.0.1") -> FastAPI:
    """The application; ``host`` is what it will listen on, see `local.Guard`."""
    app = make_page_app("review")

    @app.get("/api/rows")
    def rows() -> JSONResponse:
        return fresh({"rows": desk.rows(), "counts": desk.counts(), "file": desk.path.name})

    @app.get("/api/rows/{index}")
    def row(index: int) -> JSONResponse:
        return fresh(desk.row(index))

    @app.post("/api/rows/{index}/decision")
    def decision(index: int, wanted: Decided) -> JSONResponse:
        desk.decide(index, wanted)
        return fresh({"row": desk.row(index), "counts": desk.counts()})

    @app.get("/photographs/{sha256}")
    def photograph(sha256: str) -> Response:
        path = desk.photographs.get(sha256)
        if path is None:
            raise Refused(404, "There is no such photograph under review.")
        try:
            data = picture(path, sha256, "since it was linked; run task=link again.")
        except DataError as error:
            raise Refused(404, str(error)) from None
        # Its address is its content, so it never has to be asked for again.
        kept = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(data, media_type="image/jpeg", headers=kept)

    app.add_middleware(Guard, host=host)
    return app

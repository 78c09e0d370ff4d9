"""The job database as the service writes it: a row is taken, answered and closed, or it failed.

Each step is one short transaction. A row is taken before the model is asked, so that no work is
done for a row that cannot be written, and closed with everything at once: who answered, the
analysis, the status. Whatever cannot be closed now (a locked database, a full disk) is kept and
tried again, and what a crash left open is closed at the next start: no row stays ``analyzing``.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.link import FINISHED
from ..errors import MondrianError
from . import migration

ANALYZING, DONE, FAILED = "analyzing", "done", "failed"


class JobRefused(MondrianError):
    """A job that is not taken; ``status`` is the HTTP status, ``str()`` the sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Locked(MondrianError):
    """The database cannot be written now; trying again later may do."""


@dataclass(frozen=True)
class Outcome:
    """What is written when a job is closed; an analysis or output of an earlier time stays where
    there is no new one.

    Attributes:
        status: `DONE` or `FAILED`.
        model_used, mode, model, adapter: who answered.
        analysis: Markdown with the critique, as the workbook's tools read it.
        outputs: ``jobs.llm_outputs``, JSON.
        prompt: what was asked.
        error: why it failed, for a person.
    """

    status: str
    model_used: str | None = None
    mode: str | None = None
    model: str | None = None
    adapter: str | None = None
    analysis: str | None = None
    outputs: Mapping[str, Any] | None = None
    prompt: str | None = None
    error: str | None = None


class JobTable:
    """``jobs`` of one database.

    Args:
        path: the database, migrated.
        service: names this service in ``generated_by``; it stays the same over restarts.
        timeout: seconds to wait for another program's lock.

    Raises:
        DataError: it is no job database.
        ServerError: it was not migrated.
    """

    def __init__(self, path: Path, service: str, *, timeout: float = 5.0) -> None:
        migration.check(path)
        self.path, self.service, self.timeout = path, service, timeout
        self._lock = threading.Lock()
        self._unsettled: dict[str, Outcome] = {}
        try:
            with closing(self._connect()) as connection:
                # Readers, such as linking, and the service do not wait for each other.
                connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.Error as error:
            raise self._locked(error) from None

    @property
    def unsettled(self) -> int:
        """Closed jobs that are not in the database yet."""
        return len(self._unsettled)

    def recover(self) -> list[str]:
        """Close what this service had open when it ended; returns the ids.

        Raises:
            Locked: the database cannot be written now.
        """
        sentence = "The service was stopped while it was answering; ask again."
        with self._writing() as connection:
            mine = "status = ? AND generated_by = ?"
            found = connection.execute(
                f"SELECT id FROM jobs WHERE {mine}", (ANALYZING, self.service)
            ).fetchall()
            connection.execute(
                f"UPDATE jobs SET status = ?, error = ?, completed_at = ? WHERE {mine}",
                (FAILED, sentence, _now(), ANALYZING, self.service),
            )
        return [str(row[0]) for row in found]

    def take(
        self, job_id: str, request: str, *, advisor: str, filename: str, new: bool, replace: bool
    ) -> dict[str, Any] | None:
        """Mark a job as being answered, or find that this very request was answered before.

        Args:
            job_id: the row's id.
            request: fingerprint of what is asked.
            advisor, filename: of a new row.
            new: make the row; else it must be there.
            replace: answer a row again that is finished.

        Returns:
            The row as it was answered, if this service answered the same request; else None, and
            the row is ``analyzing``.

        Raises:
            JobRefused: there is no such row (404), it is finished or being answered (409).
            Locked: the database cannot be written now.
        """
        with self._writing() as connection:
            if new:
                connection.execute(
                    "INSERT INTO jobs (id, filename, advisor, status, generated_by, started_at, "
                    "request_sha256) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (job_id, filename, advisor, ANALYZING, self.service, _now(), request),
                )
                return None
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise JobRefused(
                    404,
                    f"There is no job {job_id[:80]!r} in {self.path.name}; leave job_id out to "
                    "make one.",
                )
            found = dict(row)
            if (known := self._known(found, job_id, request, replace)) is not None:
                return known
            connection.execute(
                "UPDATE jobs SET status = ?, generated_by = ?, started_at = ?, request_sha256 = ?, "
                "completed_at = NULL, error = NULL WHERE id = ?",
                (ANALYZING, self.service, _now(), request, job_id),
            )
            return None

    def _known(
        self, row: dict[str, Any], job_id: str, request: str, replace: bool
    ) -> dict[str, Any] | None:
        status = str(row["status"] or "").strip().lower()
        mine = row["generated_by"] == self.service
        if status == ANALYZING and mine and job_id not in self._unsettled:
            raise JobRefused(409, f"Job {job_id[:80]!r} is being answered now; ask again later.")
        if status not in FINISHED or replace:
            return None
        if mine and row["request_sha256"] == request:
            return row
        whose = (
            "was answered for another request (photograph, advisor or mode)"
            if mine
            else "is finished, and its analysis is not this service's"
        )
        raise JobRefused(
            409,
            f"Job {job_id[:80]!r} {whose}; use another job_id, or send replace=true to write over "
            "its analysis.",
        )

    def close(self, job_id: str, outcome: Outcome) -> None:
        """Write a job's end, all of it in one transaction.

        Raises:
            Locked: it cannot be written now; it is kept, and `settle` tries again.
        """
        with self._lock:
            self._unsettled[job_id] = outcome
        self._write(job_id, outcome)

    def settle(self) -> int:
        """Write what could not be written before; returns how many are left.

        Raises:
            Locked: the database still cannot be written.
        """
        with self._lock:
            waiting = list(self._unsettled.items())
        for job_id, outcome in waiting:
            self._write(job_id, outcome)
        return self.unsettled

    def counts(self) -> dict[str, int]:
        """Rows by ``model_used``, without those of which nobody knows.

        Raises:
            Locked: the database cannot be read now.
        """
        try:
            with closing(self._connect()) as connection:
                return dict(
                    connection.execute(
                        "SELECT model_used, count(*) FROM jobs WHERE model_used IS NOT NULL "
                        "GROUP BY model_used ORDER BY model_used"
                    ).fetchall()
                )
        except sqlite3.Error as error:
            raise self._locked(error) from None

    def _write(self, job_id: str, outcome: Outcome) -> None:
        values: dict[str, Any] = {
            "status": outcome.status,
            "model_used": outcome.model_used,
            "mode": outcome.mode,
            "model": outcome.model,
            "adapter": outcome.adapter,
            "prompt": outcome.prompt,
            "error": outcome.error,
            "completed_at": _now(),
        }
        if outcome.analysis is not None:
            values["analysis_markdown"] = outcome.analysis
        if outcome.outputs is not None:
            values["llm_outputs"] = json.dumps(outcome.outputs, ensure_ascii=False)
        if outcome.model_used is None:
            # Nobody answered: who answered an earlier time, and what, is left as it is.
            values = {key: values[key] for key in ("status", "error", "completed_at")}
        names = ", ".join(f"{name} = ?" for name in values)
        with self._writing() as connection:
            connection.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), job_id))
        with self._lock:
            if self._unsettled.get(job_id) is outcome:
                del self._unsettled[job_id]

    def _writing(self) -> _Writing:
        return _Writing(self)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path.as_uri() + "?mode=rw", uri=True, timeout=self.timeout, isolation_level=None
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _locked(self, error: sqlite3.Error) -> Locked:
        return Locked(f"The job database {self.path.name} cannot be written now: {error}.")


class _Writing:
    """A transaction that holds the write lock from its beginning."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    def __enter__(self) -> sqlite3.Connection:
        connection = None
        try:
            self._connection = connection = self._table._connect()
            connection.execute("BEGIN IMMEDIATE")
            return connection
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise self._table._locked(error) from None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with closing(self._connection) as connection:
            try:
                if error is None:
                    connection.execute("COMMIT")
                elif connection.in_transaction:  # A full disk has ended it already.
                    connection.execute("ROLLBACK")
            except sqlite3.Error as second:
                first = error if isinstance(error, sqlite3.Error) else second
                raise self._table._locked(first) from None
        if isinstance(error, sqlite3.Error):
            raise self._table._locked(error) from None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")

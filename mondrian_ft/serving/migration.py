"""The columns that the service writes, and adding those that a job database lacks.

Columns came and went between versions of the service (facts: "The jobs table"). They are added by
``task=migrate`` alone, after a whole copy of the database was made and looked at.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..data.store import JobStore
from ..errors import DataError, ServerError
from ..files import replacing

COLUMNS: dict[str, str] = {
    "advisor": "TEXT",
    "status": "TEXT",
    "mode": "TEXT",
    "model": "TEXT",
    "adapter": "TEXT",
    "model_used": "TEXT",
    "analysis_markdown": "TEXT",
    "llm_outputs": "TEXT",
    "prompt": "TEXT",
    "error": "TEXT",
    "started_at": "TEXT",
    "completed_at": "TEXT",
    "generated_by": "TEXT",
    "request_sha256": "TEXT",
}
"""What the service writes of a row, and the type a missing column gets.

``generated_by`` names the service that wrote the row's analysis, so that linking can tell it from
others; ``request_sha256`` is the fingerprint of what was asked, so that a repeated request can be
told from another one under the same id.
"""


@dataclass(frozen=True)
class Migrated:
    """What was added; ``backup`` is None if nothing had to be."""

    added: tuple[str, ...]
    backup: Path | None


def missing(path: Path) -> list[str]:
    """The columns of ``jobs`` that the service needs and the database lacks, in our order.

    Raises:
        DataError: it is no job database, see `data.store.JobStore`.
    """
    JobStore(path)
    with closing(_connect(path)) as connection:
        return _missing(connection)


def migrate(path: Path) -> Migrated:
    """Add the missing columns in one transaction, after a backup beside the database.

    The backup, ``<name>.backup-<time>``, is made with SQLite's own backup, so that it is whole
    while others write. Run again, nothing is left to do and nothing is done.

    Raises:
        DataError: it is no job database.
        ServerError: the database is locked or read-only, or the disk is full; it is as it was.
    """
    JobStore(path)
    try:
        with closing(_connect(path)) as connection:
            if not _missing(connection):
                return Migrated((), None)
            backup = _back_up(connection, path)
            connection.execute("BEGIN IMMEDIATE")
            try:
                # Another one may have been quicker.
                added = _missing(connection)
                for name in added:
                    connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {COLUMNS[name]}")
                connection.execute("COMMIT")
            except sqlite3.Error:
                connection.execute("ROLLBACK")
                raise
            return Migrated(tuple(added), backup)
    except sqlite3.Error as error:
        raise ServerError(
            f"{path} cannot be migrated: {error}; it is as it was. Stop what uses it or free some "
            "space, and run task=migrate again."
        ) from None


def check(path: Path) -> None:
    """Raises `ServerError`, with the command, if the database was not migrated."""
    if absent := missing(path):
        raise ServerError(
            f"The table `jobs` of {path} lacks {', '.join(absent)}, which the service writes; add "
            f"them, after a backup, with: python -m mondrian_ft task=migrate task.db_path={path}"
        )


def _back_up(connection: sqlite3.Connection, path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = path.with_name(f"{path.name}.backup-{stamp}")
    count = 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.backup-{stamp}-{count}")
    with replacing(target) as temporary:
        with closing(sqlite3.connect(temporary)) as copy:
            connection.backup(copy)
            # The copy of a database in write-ahead mode would be in it too, and want a -wal file.
            copy.execute("PRAGMA journal_mode=DELETE")
            (fine,) = copy.execute("PRAGMA quick_check").fetchone()
        if fine != "ok":
            raise DataError(f"The copy of {path} is damaged ({fine}); nothing was added.")
    return target


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=5, isolation_level=None)


def _missing(connection: sqlite3.Connection) -> list[str]:
    known = {
        row[0].lower() for row in connection.execute("SELECT name FROM pragma_table_info('jobs')")
    }
    return [name for name in COLUMNS if name not in known]

"""Read-only, typed access to a job database of the advisor service (SQLite).

Everything needed is read at once, in one transaction, and the connection is closed: a consistent
snapshot that holds no lock on a database which the running service may be writing. Columns came
and went between versions (facts: "The jobs table"), so a missing one reads as None.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DataError

ADVISOR_ALIASES = {"okeeffe": "okeefe"}
"""Other spellings of an advisor's id found in real databases, and the id they stand for."""

REQUIRED = ("id", "filename", "status")


@dataclass(frozen=True)
class Job:
    """One row of ``jobs``, as text; None where the column is absent or NULL.

    ``undecodable`` names the columns whose bytes are not UTF-8 (their text has U+FFFD marks);
    ``cut`` those of which only the first `MAX_CELL` bytes were read.
    """

    id: str | None
    filename: str | None
    status: str | None
    advisor: str | None = None
    analysis_file: str | None = None
    analysis_markdown: str | None = None
    analysis_html: str | None = None
    llm_outputs: str | None = None
    prompt: str | None = None
    completed_at: str | None = None
    generated_by: str | None = None
    undecodable: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


MAX_CELL = 4_000_000
"""Bytes read of one cell at most: a runaway answer must not fill the memory."""

_COLUMNS = tuple(f.name for f in fields(Job) if f.name not in ("undecodable", "cut"))


def advisor_id(name: str | None) -> str | None:
    """An advisor's id in one spelling: trimmed, lower case, aliases resolved; None if blank."""
    plain = (name or "").strip().lower()
    return ADVISOR_ALIASES.get(plain, plain) or None


class JobStore:
    """A snapshot of one job database.

    Args:
        path: the SQLite file. It is never written to, and where SQLite allows, no ``-wal`` or
            ``-shm`` file appears beside it.
        timeout: seconds to wait for another program's lock.

    Raises:
        DataError: the path is missing, empty, a folder or unreadable, the file is 0 bytes, not
            SQLite or damaged, locked for longer than ``timeout``, or without a usable ``jobs``
            table.
    """

    def __init__(self, path: str | Path, *, timeout: float = 5.0) -> None:
        self.path = _existing(path)
        try:
            self._read(timeout)
        except sqlite3.Error as error:
            raise DataError(_sentence(self.path, error)) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error

    def jobs(self) -> list[Job]:
        """Every row of ``jobs``, finished or not, in the order of the table."""
        return list(self._jobs)

    def profiles(self) -> list[dict[str, Any]]:
        """Every row of ``dimensional_profiles``, column to value; texts as text, NULL as None."""
        return list(self._profiles)

    def system_prompt(self) -> str | None:
        """The text of ``config.system_prompt``, or None if it is absent or blank."""
        return self._system_prompt

    def advisor_prompt(self, advisor: str) -> str | None:
        """The text of ``advisors.prompt`` for an advisor's id, or None if it is absent or blank."""
        return self._advisor_prompts.get(advisor_id(advisor) or "")

    def advisors(self) -> dict[str, str]:
        """The name of each advisor by id, in the table's order; empty without such a table."""
        return dict(self._advisors)

    def _read(self, timeout: float) -> None:
        with _connect(self.path, timeout) as connection:
            connection.execute("BEGIN")
            tables = _names(
                connection, "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
            )
            if "jobs" not in tables:
                seen = ", ".join(sorted(tables)) or "no table at all"
                raise DataError(
                    f"{self.path} has no table `jobs` (it has {seen}); "
                    "point data.db_path at the service's mondrian.db."
                )
            columns = _columns(connection, "jobs")
            absent = [name for name in REQUIRED if name not in columns]
            if absent:
                raise DataError(
                    f"The table `jobs` of {self.path} has no column {', '.join(absent)}; "
                    "without it no row can be linked to its photograph."
                )
            wanted = [name for name in _COLUMNS if name in columns]
            rows = connection.execute(f"SELECT {', '.join(map(_bounded, wanted))} FROM jobs")
            # Most rows of an advisor share one prompt, of several thousand characters.
            shared: dict[str, str] = {}
            self._jobs = [_job(wanted, row, shared) for row in rows]
            self._profiles: list[dict[str, Any]] = []
            known = _columns(connection, "dimensional_profiles")
            if {"advisor_id", "image_path"} <= known.keys():
                names = [name for name in known if name in _PROFILE or _is_judgement(name)]
                chosen = ", ".join(_bounded(f'"{name}"') for name in names)
                for row in connection.execute(f"SELECT {chosen} FROM dimensional_profiles"):
                    cells = (v if isinstance(v, int | float) else _text(v)[0] for v in row)
                    self._profiles.append(dict(zip(names, cells, strict=True)))
            self._system_prompt: str | None = None
            known = _columns(connection, "config") if "config" in tables else {}
            if {"key", "value"} <= known.keys():
                query = "SELECT value FROM config WHERE key = 'system_prompt'"
                for (value,) in connection.execute(query):
                    self._system_prompt = _unless_blank(_text(value)[0])
            self._advisor_prompts: dict[str, str] = {}
            self._advisors: dict[str, str] = {}
            known = _columns(connection, "advisors") if "advisors" in tables else {}
            if "id" in known:
                name = "name" if "name" in known else "NULL"
                for row in connection.execute(f"SELECT id, {name} FROM advisors"):
                    if key := advisor_id(_text(row[0])[0]):
                        self._advisors.setdefault(key, _unless_blank(_text(row[1])[0]) or key)
            if {"id", "prompt"} <= known.keys():
                for name, value in connection.execute("SELECT id, prompt FROM advisors"):
                    prompt = _unless_blank(_text(value)[0])
                    key = advisor_id(_text(name)[0])
                    if key and prompt:
                        self._advisor_prompts.setdefault(key, prompt)


_NOT_SQLITE = "{path} is not an SQLite database; set data.db_path to the service's mondrian.db."


def _existing(path: str | Path) -> Path:
    if not str(path).strip():
        raise DataError("data.db_path is empty; give the path of a mondrian.db.")
    found = Path(path).expanduser().absolute()
    if found.is_dir():
        raise DataError(f"{found} is a folder, not a job database; give the file inside it.")
    try:
        size = found.stat().st_size
    except FileNotFoundError:
        raise DataError(f"The job database {found} does not exist; set data.db_path.") from None
    except OSError as error:
        raise DataError(f"The job database {found} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise DataError(
            f"The job database {found} is 0 bytes long; the service's real one is elsewhere "
            "(an empty file appears when it is started in another folder)."
        )
    # SQLite takes a file shorter than its smallest page for an empty database.
    if size < 512:
        raise DataError(_NOT_SQLITE.format(path=found))
    return found


@contextmanager
def _connect(path: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    """Open read-only, where possible without leaving a trace beside the database.

    A plain read-only open of a write-ahead database that nobody else has open creates ``-wal`` and
    ``-shm`` files and leaves them. So that one case, told by the file's header and the absence of
    ``-shm``, is read from a private copy.
    """
    wal, shm, journal = (path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))
    # The header is not looked at beside a live writer: closing the file would, on POSIX, drop the
    # locks of a connection that this very process may hold on it.
    if shm.exists() or journal.exists() or not _is_write_ahead(path):
        with _open(path, timeout) as connection:
            yield connection
        return
    with tempfile.TemporaryDirectory(prefix="mondrian-") as folder:
        copy = Path(folder) / "jobs.db"
        before = path.stat()
        shutil.copyfile(path, copy)
        if wal.exists():
            shutil.copyfile(wal, copy.with_name("jobs.db-wal"))
        after = path.stat()
        unchanged = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
        # A writer that came during the copy may have moved pages under it: read the live file.
        with _open(copy if unchanged and not shm.exists() else path, timeout) as connection:
            yield connection


def _is_write_ahead(path: Path) -> bool:
    """Whether the header's two version bytes say write-ahead log (SQLite file format, 1.3.3)."""
    with path.open("rb") as file:
        head = file.read(20)
    return head.startswith(b"SQLite format 3\x00") and head[18:20] == b"\x02\x02"


@contextmanager
def _open(path: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    # Autocommit mode: the caller's BEGIN is the only transaction.
    uri = f"{path.as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)
    with closing(connection):
        connection.text_factory = bytes
        yield connection


def _names(connection: sqlite3.Connection, query: str) -> set[str]:
    return {_text(row[0])[0] or "" for row in connection.execute(query)}


def _columns(connection: sqlite3.Connection, table: str) -> dict[str, None]:
    """The names of a table's columns, in its order; nothing for a table that is not there."""
    found = connection.execute(f"SELECT name FROM pragma_table_info('{table}')")
    return dict.fromkeys(_text(row[0])[0] or "" for row in found)


_PROFILE = {"job_id", "advisor_id", "image_path", "overall_grade", "image_description"}


def _is_judgement(column: str) -> bool:
    return re.fullmatch(r"\w+_(?:score|comment)", column) is not None


def _bounded(column: str) -> str:
    """A column of which long cells are read in part; SQLite's ``length`` of a text stops at NUL."""
    size = f"length(CAST({column} AS BLOB))"
    head = f"substr(CAST({column} AS BLOB), 1, {MAX_CELL})"
    return f"CASE WHEN {size} > {MAX_CELL} THEN {head} ELSE {column} END"


def _job(names: Sequence[str], row: Sequence[Any], shared: dict[str, str]) -> Job:
    values: dict[str, Any] = {}
    undecodable, cut = [], []
    for name, raw in zip(names, row, strict=True):
        values[name], whole = _text(raw)
        if isinstance(raw, bytes) and len(raw) >= MAX_CELL:
            cut.append(name)
        elif not whole:
            undecodable.append(name)
    if prompt := values.get("prompt"):
        values["prompt"] = shared.setdefault(prompt, prompt)
    return Job(**values, undecodable=tuple(undecodable), cut=tuple(cut))


def _text(value: Any) -> tuple[str | None, bool]:
    """A cell as text, and whether all of it could be decoded."""
    if value is None:
        return None, True
    if not isinstance(value, bytes):
        return str(value), True
    try:
        return value.decode("utf-8"), True
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace"), False


def _unless_blank(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _sentence(path: Path, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path} is locked by another program; stop it or wait for it, then run again."
    if primary == sqlite3.SQLITE_READONLY:
        return (
            f"{path} has an unfinished write left by a program that crashed; "
            "open it once with that program (or sqlite3) to repair it, then run again."
        )
    if primary == sqlite3.SQLITE_NOTADB:
        return _NOT_SQLITE.format(path=path)
    if primary == sqlite3.SQLITE_CORRUPT:
        return f"{path} is a damaged SQLite database ({error}); restore it from a backup."
    return f"{path} cannot be read as a job database: {error}."

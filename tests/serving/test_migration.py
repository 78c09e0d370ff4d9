"""A job database gets the service's columns once, after a whole backup, and is else not touched."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mondrian_ft.data.store import JobStore
from mondrian_ft.errors import DataError, ServerError
from mondrian_ft.serving import migration
from mondrian_ft.serving.jobs import JobTable
from tests.data.world import SHARED, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "mondrian")
    world.good("job-1", 1)
    return world


def columns(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[1] for row in connection.execute("PRAGMA table_info(jobs)")]


def rows(path: Path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT id, filename, advisor, status FROM jobs").fetchall()


def test_it_adds_what_is_missing_and_keeps_a_backup(world: World) -> None:
    before, content = columns(world.db), rows(world.db)
    done = migration.migrate(world.db)
    assert set(migration.COLUMNS) <= set(columns(world.db))
    assert columns(world.db)[: len(before)] == before, "the others stay as they were"
    assert done.added == tuple(name for name in migration.COLUMNS if name not in before)
    assert done.backup is not None
    assert re.fullmatch(r"mondrian\.db\.backup-\d{8}-\d{6}", done.backup.name)
    assert columns(done.backup) == before
    assert rows(done.backup) == rows(world.db) == content
    assert [path.name for path in world.folder.glob("*.backup*")] == [done.backup.name]
    assert len(JobStore(world.db).jobs()) == 1


def test_again_it_does_nothing(world: World) -> None:
    migration.migrate(world.db)
    data = world.db.read_bytes()
    assert migration.migrate(world.db) == migration.Migrated((), None)
    assert world.db.read_bytes() == data
    assert len(list(world.folder.glob("*.backup*"))) == 1


def test_a_real_schema_lacks_four_columns(tmp_path: Path) -> None:
    """Those of the workbook and of this service; the others are written where they were."""
    schema = SHARED / "real" / "schema.sql"
    if not schema.is_file():
        pytest.skip("the real schema is not here")
    path = tmp_path / "real.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(schema.read_text(encoding="utf-8"))
    assert migration.missing(path) == ["model_used", "generated_by", "request_sha256"]


def test_writes_under_way_are_in_the_backup(world: World) -> None:
    """In write-ahead mode the newest rows lie beside the file; a copy of it would lack them."""
    with closing(sqlite3.connect(world.db)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("INSERT INTO jobs (id, filename, status) VALUES ('job-2', 'x', 'queued')")
        other.commit()
        done = migration.migrate(world.db)
    assert done.backup is not None
    assert [row[0] for row in rows(done.backup)] == ["job-1", "job-2"]


def test_a_locked_database_stays_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=0.05, isolation_level=None)

    monkeypatch.setattr(migration, "_connect", impatient)
    before = columns(world.db)
    with closing(sqlite3.connect(world.db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServerError, match="locked; it is as it was"):
            migration.migrate(world.db)
        other.execute("ROLLBACK")
    assert columns(world.db) == before


def test_what_is_no_job_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(DataError, match="0 bytes"):
        migration.migrate(tmp_path / "empty.db")
    with pytest.raises(DataError, match="does not exist"):
        migration.migrate(tmp_path / "none.db")


def test_serving_an_unmigrated_database_is_refused_with_the_command(world: World) -> None:
    with pytest.raises(ServerError, match=r"lacks .*model_used.*task=migrate task\.db_path=") as e:
        JobTable(world.db, "me")
    assert str(world.db) in str(e.value)

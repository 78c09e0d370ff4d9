"""Reading a job database: what is wrong with it is said, and nothing on disk changes."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mondrian_ft.data.store import JobStore, advisor_id
from mondrian_ft.errors import DataError

from .world import ANSEL_PROMPT, SYSTEM_PROMPT, World


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder with its bytes and time of change."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def make(path: Path, script: str, *, wal: bool = False) -> Path:
    """An SQLite file made by a script."""
    with closing(sqlite3.connect(path)) as connection:
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(script)
    return path


def test_rows_prompts_and_null_values_are_read_as_text(world: World):
    """Bytes or text, NULL or a number: a cell is text or None."""
    world.row("a (rag)", filename="x.jpg", completed_at=1768469123)
    world.row(None, filename=None, status="queued")
    store = JobStore(world.db)
    jobs = store.jobs()
    assert [(job.id, job.filename, job.status) for job in jobs] == [
        ("a (rag)", "x.jpg", "done"),
        (None, None, "queued"),
    ]
    assert jobs[0].completed_at == "1768469123"
    assert store.system_prompt() == SYSTEM_PROMPT
    assert store.advisor_prompt("Ansel ") == ANSEL_PROMPT
    assert store.advisor_prompt("watkins") is None


def test_an_early_schema_without_the_other_tables_and_columns_is_read(tmp_path: Path):
    """Columns came and went, and some databases have no advisors table."""
    script = "CREATE TABLE jobs (id, filename, status); INSERT INTO jobs VALUES ('a', 'b', 'done')"
    store = JobStore(make(tmp_path / "early.db", script))
    assert store.jobs()[0].advisor is None
    assert store.system_prompt() is None
    assert store.advisor_prompt("ansel") is None


def test_bytes_that_are_not_utf8_are_marked(world: World):
    """A cell that cannot be decoded whole is named, not quietly repaired."""
    with closing(sqlite3.connect(world.db)) as connection:
        connection.execute(
            "INSERT INTO jobs (id, filename, analysis_markdown) VALUES ('a', 'b', ?)", (b"\xff{",)
        )
        connection.commit()
    assert JobStore(world.db).jobs()[0].undecodable == ("analysis_markdown",)


def test_both_spellings_of_an_advisor_are_one():
    """`okeefe` and `okeeffe` both occur in real databases."""
    assert advisor_id("OKeeffe") == advisor_id("okeefe ") == "okeefe"
    assert advisor_id("  ") is advisor_id(None) is None


def test_a_missing_database(tmp_path: Path):
    with pytest.raises(DataError, match=r"does not exist; set data\.db_path"):
        JobStore(tmp_path / "none.db")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path():
    with pytest.raises(DataError, match=r"data\.db_path is empty"):
        JobStore("")


def test_a_folder(tmp_path: Path):
    with pytest.raises(DataError, match="is a folder"):
        JobStore(tmp_path)


def test_a_database_of_0_bytes(tmp_path: Path):
    path = tmp_path / "mondrian.db"
    path.touch()
    with pytest.raises(DataError, match="0 bytes"):
        JobStore(path)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("content", [b"x", b"PK\x03\x04" * 400, b"not a database\n" * 100])
def test_a_foreign_file(tmp_path: Path, content: bytes):
    path = tmp_path / "mondrian.db"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not an SQLite database"):
        JobStore(path)
    assert path.read_bytes() == content


def test_a_damaged_database(world: World):
    """A database cut short is said to be damaged."""
    with closing(sqlite3.connect(world.db)) as connection:
        rows = [(str(index), "x" * 200) for index in range(200)]
        connection.executemany("INSERT INTO jobs (id, filename) VALUES (?, ?)", rows)
        connection.commit()
    content = world.db.read_bytes()
    world.db.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        JobStore(world.db)


def test_a_database_without_jobs_names_its_tables(tmp_path: Path):
    path = make(tmp_path / "other.db", "CREATE TABLE songs (id)")
    with pytest.raises(DataError, match=r"no table `jobs` \(it has songs\)"):
        JobStore(path)


def test_a_jobs_table_without_a_needed_column(tmp_path: Path):
    path = make(tmp_path / "other.db", "CREATE TABLE jobs (id, status)")
    with pytest.raises(DataError, match="no column filename"):
        JobStore(path)


def test_a_locked_database(world: World):
    """An exclusive transaction of another connection is waited for, then said."""
    with closing(sqlite3.connect(world.db, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match="locked by another program"):
            JobStore(world.db, timeout=0.1)
        other.execute("INSERT INTO jobs (id) VALUES ('kept')")
        other.execute("COMMIT")
    assert [job.id for job in JobStore(world.db).jobs()] == ["kept"]


def test_a_path_with_characters_that_mean_something_in_a_uri(tmp_path: Path):
    folder = tmp_path / "my photos? #1 100%"
    world = World(folder)
    world.row("a", filename="b")
    assert len(JobStore(world.db).jobs()) == 1


def test_reading_leaves_no_trace(world: World):
    """A plain database keeps its bytes and times, and nothing appears beside it."""
    world.row("a", filename="b")
    before = state(world.folder)
    JobStore(world.db)
    assert state(world.folder) == before


def test_a_write_ahead_database_that_nobody_has_open_keeps_its_folder_as_it_is(tmp_path: Path):
    """SQLite would leave -wal and -shm files behind."""
    script = "CREATE TABLE jobs (id, filename, status); INSERT INTO jobs VALUES ('a', 'b', 'done')"
    path = make(tmp_path / "wal.db", script, wal=True)
    before = state(tmp_path)
    assert len(JobStore(path).jobs()) == 1
    assert state(tmp_path) == before
    assert list(before) == ["wal.db"]


def test_a_write_ahead_log_left_by_a_crash_is_read_and_kept(tmp_path: Path):
    """The committed rows in a left-over -wal count, and the file stays for its owner."""
    script = "CREATE TABLE jobs (id, filename, status)"
    path = make(tmp_path / "live.db", script, wal=True)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("INSERT INTO jobs VALUES ('a', 'b', 'done')")
        writer.commit()
        for name in ("live.db", "live.db-wal"):
            (crashed / name).write_bytes((tmp_path / name).read_bytes())
    before = state(crashed)
    assert before["live.db-wal"][0]
    assert [job.id for job in JobStore(crashed / "live.db").jobs()] == ["a"]
    assert state(crashed) == before


def test_a_write_ahead_database_is_read_while_another_connection_writes(tmp_path: Path):
    """The service may go on: we see what it committed, and it is not disturbed."""
    script = "CREATE TABLE jobs (id, filename, status)"
    path = make(tmp_path / "live.db", script, wal=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("INSERT INTO jobs VALUES ('a', 'b', 'done')")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO jobs VALUES ('c', 'd', 'done')")
        names = sorted(path.name for path in tmp_path.iterdir())
        content = path.read_bytes()
        assert [job.id for job in JobStore(path).jobs()] == ["a"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert path.read_bytes() == content
        writer.execute("COMMIT")
        assert [job.id for job in JobStore(path).jobs()] == ["a", "c"]

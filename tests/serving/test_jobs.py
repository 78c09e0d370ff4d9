"""The job database: who answered is written with the answer, once, and no row stays open."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.data.link import NoUsableRows, link
from mondrian_ft.serving.jobs import FAILED, JobTable, Locked, Outcome
from mondrian_ft.serving.protocol import Fault

from .fake_model import HASHES
from .made import Made, make, photograph


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = make(tmp_path, database=True, mode="ab_test")
    for n in range(10):
        made.world.row(f"job-{n}", filename=f"{n}.jpg", status="queued")
    return made


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another program's write lock."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_ten_requests_land_on_both_arms_and_the_database_says_which(made: Made) -> None:
    answers = {f"job-{n}": made.analyze(job_id=f"job-{n}").json() for n in range(10)}
    rows = made.rows()
    assert {row["model_used"] for row in rows.values()} == {"ab_test_base", "ab_test_fine_tuned"}
    for job, answer in answers.items():
        row = rows[job]
        assert (row["status"], row["mode"], row["model"]) == ("done", "ab_test", "fake-vlm")
        assert row["model_used"] == answer["model_used"]
        tuned = row["model_used"] == "ab_test_fine_tuned"
        assert row["adapter"] == (f"v2@{HASHES['production']}" if tuned else None)
        stored = row["analysis_markdown"].removeprefix("```json\n").removesuffix("\n```")
        assert json.loads(stored) == answer["analysis"]
        assert json.loads(row["llm_outputs"])["response"] == answer["raw"]
        assert row["filename"] == f"{job[-1]}.jpg", "what others wrote stays"
        assert row["error"] is None
    assert sum(made.ask("GET", "/ab").json()["database"].values()) == 10


def test_without_a_job_id_a_row_is_made(made: Made) -> None:
    answer = made.analyze().json()
    row = made.rows()[answer["job_id"]]
    assert (row["status"], row["advisor"]) == ("done", "ansel")
    assert row["filename"].startswith("upload-"), "a client's file name may be another picture's"
    (made.world.source / "ridge.jpg").write_bytes(photograph())
    answer = made.ask("POST", "/analyze", json={"image_path": "ridge.jpg"}).json()
    assert made.rows()[answer["job_id"]]["filename"] == "ridge.jpg"


def test_a_job_that_is_not_there(made: Made) -> None:
    answer = made.analyze(job_id="job-99")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("There is no job 'job-99' in mondrian.db")
    assert not made.model.asked
    assert len(made.rows()) == 10


def test_a_repeated_request_is_answered_once(made: Made) -> None:
    """After a lost connection a client asks again: the same answer, and the model is not asked."""
    first = made.analyze(job_id="job-1").json()
    row = made.rows()["job-1"]
    second = made.analyze(job_id="job-1").json()
    assert second == {**first, "repeated": True}
    assert made.rows()["job-1"] == row
    assert len(made.model.asked) == 1
    other = made.analyze(job_id="job-1", image=photograph(9))
    assert other.status_code == 409
    assert "another request" in other.json()["error"]
    replaced = made.analyze(job_id="job-1", image=photograph(9), replace="true")
    assert replaced.status_code == 200
    assert replaced.json()["raw"] != first["raw"]


def test_an_answer_that_somebody_changed_is_not_repeated(made: Made) -> None:
    made.analyze(job_id="job-1")
    for outputs in (None, "{}", "no JSON", '{"answers": [7]}'):
        with closing(sqlite3.connect(made.world.db)) as other:
            other.execute("UPDATE jobs SET llm_outputs = ? WHERE id = 'job-1'", (outputs,))
            other.commit()
        answer = made.analyze(job_id="job-1")
        assert (answer.status_code, "send replace=true" in answer.json()["error"]) == (409, True)
    assert made.analyze(job_id="job-1", replace="true").status_code == 200


def test_an_analysis_of_others_is_not_written_over(made: Made) -> None:
    made.world.row("old", filename="x.jpg", analysis_markdown="a person's own words")
    answer = made.analyze(job_id="old")
    assert answer.status_code == 409
    assert "replace=true" in answer.json()["error"]
    assert made.rows()["old"]["analysis_markdown"] == "a person's own words"
    assert made.analyze(job_id="old", replace="true").status_code == 200
    assert made.rows()["old"]["analysis_markdown"].startswith("```json")


def test_what_does_not_parse_has_failed(made: Made) -> None:
    """Theirs was stored as completed, with "Failed to parse model response" for an analysis."""
    made.model.text = "**peace** " * 9
    assert made.analyze(job_id="job-1").status_code == 422
    row = made.rows()["job-1"]
    assert row["status"] == "failed"
    assert row["error"].startswith("The model's answer is no critique")
    assert row["analysis_markdown"] is None
    assert json.loads(row["llm_outputs"])["response"] == made.model.text
    assert row["model_used"].startswith("ab_test")
    made.model.text = None
    assert made.analyze(job_id="job-1").status_code == 200, "a job that failed may be asked again"
    assert made.rows()["job-1"]["error"] is None


@pytest.mark.parametrize("fault", [Fault.worker, Fault.deadline, Fault.picture, Fault.busy])
def test_a_failure_closes_the_job(made: Made, fault: Fault) -> None:
    made.model.faults = [fault]
    made.analyze(job_id="job-1")
    row = made.rows()["job-1"]
    assert (row["status"], row["error"]) == ("failed", f"It failed on purpose ({fault}).")


def test_a_fault_of_the_service_closes_the_job(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(made.model, "_end", lambda ask: 1 / 0)
    assert made.analyze(job_id="job-1").status_code == 500
    assert made.rows()["job-1"]["status"] == "failed"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_several_advisors_are_one_row(made: Made) -> None:
    made.analyze(job_id="job-1", advisor="ansel,weston", mode="fine_tuned")
    row = made.rows()["job-1"]
    outputs = json.loads(row["llm_outputs"])
    assert outputs["weston"]["mode_used"] == "fine_tuned"
    assert row["analysis_markdown"].count("```json") == 2
    assert row["adapter"] == f"v2@{HASHES['production']}"


def test_a_locked_database_is_told_before_the_model_is_asked(made: Made) -> None:
    with held(made.world.db):
        answer = made.analyze(job_id="job-1")
        assert answer.status_code == 503
        assert "locked" in answer.json()["error"]
        assert "retry-after" in answer.headers
    assert not made.model.asked
    assert made.rows()["job-1"]["status"] == "queued"


def test_a_database_locked_at_the_end_is_written_later(made: Made) -> None:
    """503, because it is not kept yet; nothing is lost, and no job stays open."""
    made.model.delay = 0.4

    async def go() -> int:
        async with made.client() as client:
            files = {"image": ("a.jpg", photograph())}
            asking = asyncio.create_task(
                client.post("/analyze", files=files, data={"job_id": "job-1"})
            )
            while not made.model.running:
                await asyncio.sleep(0.01)
            with held(made.world.db):
                answer = await asking
                await made.desk.settle()
                assert made.desk.jobs is not None
                assert made.desk.jobs.unsettled == 1
            assert "written as soon as that works" in answer.json()["error"]
            await made.desk.settle()
            assert made.desk.jobs.unsettled == 0
            return answer.status_code

    assert asyncio.run(go()) == 503
    row = made.rows()["job-1"]
    assert (row["status"], row["model_used"][:7]) == ("done", "ab_test")


def test_a_full_disk_is_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit on pages, which fails as a full disk does."""
    assert made.desk.jobs is not None
    connect = made.desk.jobs._connect

    def full() -> sqlite3.Connection:
        connection = connect()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    made.model.delay = 0.2

    async def go() -> None:
        async with made.client() as client:
            files = {"image": ("a.jpg", photograph())}
            asking = asyncio.create_task(
                client.post("/analyze", files=files, data={"job_id": "job-1"})
            )
            while not made.model.running:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(made.desk.jobs, "_connect", full)
            answer = await asking
            assert (answer.status_code, "full" in answer.json()["error"]) == (503, True)
            monkeypatch.setattr(made.desk.jobs, "_connect", connect)
            await made.desk.settle()

    asyncio.run(go())
    assert made.rows()["job-1"]["status"] == "done"


def test_a_client_that_goes_away_stops_the_model_and_the_job(made: Made) -> None:
    made.model.delay = 30

    async def go() -> None:
        async with made.client() as client:
            files = {"image": ("a.jpg", photograph())}
            asking = asyncio.create_task(
                client.post("/analyze", files=files, data={"job_id": "job-1"})
            )
            while not made.model.running:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await made.desk.finish()

    asyncio.run(go())
    assert (made.model.cancelled, made.model.running, made.desk.waiting) == (1, 0, 0)
    row = made.rows()["job-1"]
    assert (row["status"], "went away" in row["error"]) == ("failed", True)


def test_a_client_that_goes_away_while_the_row_is_taken(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write was under way in its thread, and would have left the row open for good."""
    assert made.desk.jobs is not None
    take, begun = made.desk.jobs.take, threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        return take(*args, **options)

    monkeypatch.setattr(made.desk.jobs, "take", slow)

    async def go() -> None:
        async with made.client() as client:
            files = {"image": ("a.jpg", photograph())}
            asking = asyncio.create_task(
                client.post("/analyze", files=files, data={"job_id": "job-1"})
            )
            while not begun.is_set():
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await made.desk.finish()

    asyncio.run(go())
    assert not made.model.asked
    assert made.desk.waiting == 0
    assert made.rows()["job-1"]["status"] == "failed"


def test_the_same_job_twice_at_once(made: Made) -> None:
    made.model.delay = 0.8

    async def go() -> list[int]:
        async with made.client() as client:
            files = {"image": ("a.jpg", photograph())}
            asked = [
                client.post("/analyze", files=files, data={"job_id": "job-1"}) for _ in range(3)
            ]
            return sorted(one.status_code for one in await asyncio.gather(*asked))

    assert asyncio.run(go()) == [200, 409, 409]
    assert len(made.model.asked) == 1


def test_what_a_crash_left_open_is_closed_at_the_start(made: Made) -> None:
    """Those of this service; another one's are its own affair."""
    assert made.desk.jobs is not None
    for job in ("job-1", "job-2"):
        made.desk.jobs.take(job, "x", advisor="ansel", filename="", new=False, replace=False)
    made.world.row("theirs", filename="x", status="analyzing")
    other = JobTable(made.world.db, "another service")
    assert other.recover() == []
    again = JobTable(made.world.db, "mondrian_ft-test")
    assert again.recover() == ["job-1", "job-2"]
    rows = made.rows()
    assert [rows[job]["status"] for job in ("job-1", "job-2", "theirs")] == [
        "failed",
        "failed",
        "analyzing",
    ]
    assert "stopped while it was answering" in rows["job-1"]["error"]
    assert rows["job-1"]["model_used"] is None


def test_closing_is_one_transaction(made: Made) -> None:
    """A reader never sees the status without the analysis; WAL lets it read meanwhile."""
    jobs = made.desk.jobs
    assert jobs is not None
    with closing(sqlite3.connect(made.world.db)) as reader:
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM jobs").fetchall()
        jobs.close("job-1", Outcome(FAILED, error="x"))
        (status,) = reader.execute("SELECT status FROM jobs WHERE id='job-1'").fetchone()
        assert status == "queued"
    assert made.rows()["job-1"]["status"] == "failed"


def test_a_database_that_went_away_is_told(made: Made) -> None:
    assert made.desk.jobs is not None
    made.world.db.rename(made.world.db.with_name("elsewhere.db"))
    with pytest.raises(Locked, match="cannot be written now"):
        made.desk.jobs.close("job-1", Outcome(FAILED))
    assert not made.world.db.exists(), "no empty database takes its place"


# -- back into training


def test_linking_leaves_generated_analyses_out_unless_told(made: Made) -> None:
    """Else a model would learn from its own answers, as if a person had judged."""
    world = made.world
    world.good("person", 77)
    (world.source / "2026").mkdir()
    (world.source / "2026" / "ridge.png").write_bytes(photograph(3, "PNG"))
    done = made.ask("POST", "/analyze", json={"image_path": "2026/ridge.png"}).json()
    result = link(world.db, world.source, world.analyses, "ansel", scratch=world.output)
    left_out = {entry["job_id"]: entry for entry in result.report["left_out"]}
    assert left_out[done["job_id"]]["reason"] == "generated"
    assert "data.generated=true" in left_out[done["job_id"]]["detail"]
    assert result.report["linked"] == 1
    told = link(
        world.db, world.source, world.analyses, "ansel", generated=True, scratch=world.output
    )
    records = told.manifest["by_advisor"]["ansel"]["records"]
    found = {record["job_id"]: record for record in records}
    assert set(found) == {"person", done["job_id"]}
    assert found[done["job_id"]]["overall_score"] == done["analysis"]["overall_score"]
    assert found[done["job_id"]]["generated_by"] == "mondrian_ft-test"
    assert found["person"]["generated_by"] is None


def test_uploads_are_kept_if_told_and_found_by_linking(tmp_path: Path) -> None:
    """Once each, under the name in their row and none of the client's."""
    uploads = tmp_path / "mondrian" / "source"
    made = make(tmp_path, database=True, uploads=uploads)
    made.world.good("person", 77)
    made.world.row("theirs", filename="x.jpg", status="queued")
    data = photograph(4, "PNG")
    done = [made.analyze(image=data).json() for _ in range(2)]
    made.analyze(image=photograph(5), job_id="theirs")
    (kept,) = uploads.glob("upload-*")
    assert kept.read_bytes() == data
    assert kept.suffix == ".png"
    assert [made.rows()[one["job_id"]]["filename"] for one in done] == [kept.name] * 2
    world = made.world
    linked = link(
        world.db, world.source, world.analyses, "ansel", generated=True, scratch=world.output
    )
    records = linked.manifest["by_advisor"]["ansel"]["records"]
    assert {record["image_path"] for record in records if record["generated_by"]} == {str(kept)}


def test_an_upload_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    """Before the model is asked, and without a row that would name no photograph."""
    (tmp_path / "uploads").write_text("a file in the folder's place", encoding="ascii")
    made = make(tmp_path, database=True, uploads=tmp_path / "uploads")
    answer = made.analyze()
    assert (answer.status_code, "cannot write" in answer.json()["error"]) == (503, True)
    assert not made.model.asked
    assert not made.rows()


def test_only_generated_analyses_is_told(made: Made) -> None:
    world = made.world
    (world.source / "ridge.png").write_bytes(photograph(3, "PNG"))
    made.ask("POST", "/analyze", json={"image_path": "ridge.png"})
    with pytest.raises(NoUsableRows, match="1 generated"):
        link(world.db, world.source, world.analyses, "ansel", scratch=world.output)

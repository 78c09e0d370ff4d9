"""Linking: every row ends in the manifest or in the report with a reason, and nothing else."""

import io
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.data.link import LinkResult, NoUsableRows, link, link_into, write
from mondrian_ft.data.photographs import check_photograph
from mondrian_ft.data.reasons import LeftOut, Reason
from mondrian_ft.errors import DataError

from .world import SHARED, World, critique, fenced


def run(world: World, advisor: str | None = "ansel", **changes) -> LinkResult:
    """`link` on a world; the counts add up whatever the rows."""
    arguments = {
        "db_paths": world.db,
        "source_dir": world.source,
        "analysis_dir": world.analyses,
        "scratch": world.output,
        **changes,
    }
    result = link(advisor=advisor, **arguments)
    report = result.report
    assert report["linked"] + len(report["left_out"]) == report["rows"]
    assert sum(report["reasons"].values()) == len(report["left_out"])
    assert report["linked"] == result.manifest["total_records"]
    assert all(entry["reason"] in list(Reason) and entry["detail"] for entry in report["left_out"])
    for entry in result.manifest["by_advisor"].values():
        assert entry["count"] == len(entry["records"])
        for record in entry["records"]:
            assert Path(record["analysis_path"]).is_absolute()
            assert Path(record["analysis_path"]).is_file()
            assert Path(record["image_path"]).is_file()
    json.dumps(result.manifest, allow_nan=False)
    return result


def reasons(result: LinkResult) -> dict[str, str]:
    """Job id to reason."""
    return {entry["job_id"]: entry["reason"] for entry in result.report["left_out"]}


def only(result: LinkResult) -> dict:
    """The one record of a manifest with one record."""
    (entry,) = result.manifest["by_advisor"].values()
    (record,) = entry["records"]
    return record


def test_a_record_has_the_users_keys_and_more(world: World):
    """The keys of the users' own linker, and what later steps need."""
    world.good("a", 1, 8, completed_at="2026-01-15 10:00:00", status=" Completed ")
    record = only(run(world))
    assert record["job_id"] == "a"
    assert record["overall_score"] == 8
    assert record["completed_at"] == "2026-01-15 10:00:00"
    assert record["json_size"] == Path(record["analysis_path"]).stat().st_size
    assert record["advisor"] == "ansel"
    assert record["database"] == str(world.db)
    assert record["image_size"] == [48, 40]
    assert len(record["image_sha256"]) == 64
    assert record["mends"] == []
    assert record["prompt_source"] == "config.system_prompt + advisors.prompt"
    prompts = run(world).manifest["prompts"]
    assert prompts[record["prompt_id"]]["text"].endswith("Analyze the provided image.")


UUID = "0c9a2a1e-2b6f-4b43-9d61-3f3d3e1f8a77"


@pytest.mark.parametrize(
    ("filename", "stored", "rule"),
    [
        ("a b é.jpg", "a b é.jpg", "exact_name"),
        ("uploads/x.jpg", "x.jpg", "base_name"),
        ("/Users/someone/source/x.jpg", "x.jpg", "base_name"),
        ("C:\\photos\\x.jpg", "x.jpg", "base_name"),
        (f"uploads/{UUID}_x.jpg", f"{UUID}_x.jpg", "base_name"),
        (f"uploads/{UUID}_x.jpg", "x.jpg", "upload_name"),
    ],
)
def test_a_photograph_is_found_by_name_and_the_rule_is_recorded(world, filename, stored, rule):
    """Bare names, uploads and paths of other machines occur in real rows."""
    path = world.photo(stored)
    world.analysis("a", fenced(critique()))
    world.row("a", filename=filename)
    record = only(run(world))
    assert (record["image_path"], record["photograph_rule"]) == (str(path), rule)


@pytest.mark.parametrize(
    "filename", ["../secret.jpg", "uploads/../../secret.jpg", "..\\secret.jpg", "a\0.jpg"]
)
def test_a_file_name_that_leads_out_of_the_folder_is_refused(world: World, filename: str):
    """A file name came from a client; it never reaches a file outside the photograph folder."""
    world.good("good", 1)
    world.photo("secret.jpg").rename(world.folder / "secret.jpg")
    world.analysis("a", fenced(critique()))
    world.row("a", filename=filename)
    assert reasons(run(world)) == {"a": "unsafe_filename"}


def test_an_absolute_name_does_not_reach_a_file_outside_the_folder(world: World):
    world.good("good", 1)
    outside = world.photo("secret.jpg").rename(world.folder / "secret.jpg")
    world.analysis("a", fenced(critique()))
    world.row("a", filename=str(outside))
    world.analysis("b", fenced(critique()))
    world.row("b", filename="x" * 5000)
    assert set(reasons(run(world)).values()) == {"photograph_missing"}


def test_an_analysis_is_found_by_job_id_by_a_path_of_another_machine_or_in_the_row(world: World):
    """Inline text becomes a file, so that analysis_path is always a real one."""
    world.photo("1.jpg")
    text = fenced(critique())
    cells = {
        "by-id": ("job_id", {}),
        "second (rag)": ("bare_job_id", {}),
        "named": ("analysis_markdown_name", {"analysis_markdown": "analysis_md/named-file.md"}),
        "other": ("analysis_file_name", {"analysis_file": "C:\\Users\\x\\other-file.md"}),
        "../in/line": ("inline", {"analysis_markdown": text, "analysis_file": "/Users/x/y.html"}),
    }
    for name in ("analysis-ansel-by-id.md", "analysis-ansel-second.md", "named-file.md"):
        (world.analyses / name).write_text(text)
    (world.analyses / "other-file.md").write_text("\ufeff" + text, encoding="utf-8")
    for job_id, (_, columns) in cells.items():
        world.row(job_id, filename="1.jpg", **columns)
    result = run(world)
    found = {r["job_id"]: r for r in result.manifest["by_advisor"]["ansel"]["records"]}
    assert {job: record["analysis_rule"] for job, record in found.items()} == {
        job: rule for job, (rule, _) in cells.items()
    }
    inline = Path(found["../in/line"]["analysis_path"])
    assert inline.read_text() == text
    assert inline.parent == world.output / "analyses"
    assert run(world).manifest["by_advisor"] == result.manifest["by_advisor"]
    assert len(list(inline.parent.iterdir())) == 1


def test_a_second_run_does_not_take_the_analysis_of_the_first(world: World):
    """`a (rag)` is its own analysis; the file of `a` belongs to `a` while that row exists."""
    world.good("a", 1)
    world.row("a (rag)", filename="1.jpg")
    assert reasons(run(world)) == {"a (rag)": "no_analysis"}


def test_an_advisors_other_spelling_finds_its_file(world: World):
    world.good("a", 1, advisor="OKeeffe")
    assert only(run(world, "okeefe"))["advisor"] == "okeefe"
    assert only(run(world, "okeeffe"))["advisor"] == "okeefe"


def test_every_dirty_row_has_its_reason(world: World):
    """One of each kind of dirt that real databases hold, beside one good row."""
    world.good("good", 1)
    dirt = {
        "bad-shape": ('{"composition": 1}', "wrong_shape"),
        "no-json": ("Failed to parse model response", "no_json"),
        "cut": (fenced(critique())[:200], "broken_json"),
        "two": (fenced(critique(7)) + fenced(critique(6)), "two_json_blocks"),
        "grade": (fenced(critique(overall_score="A-")), "score_not_a_number"),
        "nan": (fenced(critique(overall_score=float("nan"))), "score_not_a_number"),
        "eleven": (fenced(critique(11)), "score_out_of_range"),
        "blank": (fenced(critique(technical_notes=" ")), "empty_text"),
    }
    for job_id, (text, _) in dirt.items():
        world.analysis(job_id, text)
        world.row(job_id, filename="1.jpg")
    rows = {
        "other": ({"advisor": "watkins"}, "other_advisor"),
        "all": ({"advisor": "all"}, "advisor_unclear"),
        "list": ({"advisor": "ansel,watkins"}, "advisor_unclear"),
        "whose": ({"advisor": None}, "advisor_unclear"),
        "queued": ({"status": "queued"}, "not_finished"),
        "null": ({"status": None}, "not_finished"),
        "empty": ({"analysis_markdown": ""}, "no_analysis"),
        "gone": ({"analysis_markdown": "gone.md"}, "analysis_missing"),
        "html": ({"analysis_markdown": "<h1>HTTP 500</h1>"}, "no_json"),
        "bytes": ({"analysis_markdown": b"\xff\xfe{}"}, "analysis_unreadable"),
        "unnamed": ({"filename": " ", "analysis_markdown": fenced(critique())}, "no_filename"),
        "lost": (
            {"filename": "lost.jpg", "analysis_markdown": fenced(critique())},
            "photograph_missing",
        ),
        None: ({}, "no_job_id"),
    }
    for job_id, (columns, _) in rows.items():
        world.row(job_id, **{"filename": "1.jpg", **columns})
    expected = {job: reason for job, (_, reason) in (dirt | rows).items()}
    result = run(world)
    assert reasons(result) == expected
    assert only(result)["job_id"] == "good"


def test_scores_written_as_text_are_mended_and_the_mend_is_in_manifest_and_report(world: World):
    world.good("a", 1)
    world.analysis("a", fenced(critique(7, overall_score="8/10")))
    result = run(world)
    assert only(result)["overall_score"] == 8
    assert result.report["mended"] == [{"job_id": "a", "mends": only(result)["mends"]}]
    assert len(only(result)["mends"]) == 1


def truncated_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((400, 300), 60).save(stream, "JPEG")
    return stream.getvalue()[:-2000]


def tiny_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (truncated_jpeg(), "photograph_unreadable"),
        (tiny_png(), "photograph_too_small"),
        (b"I am a text file.", "photograph_unreadable"),
        (b"", "photograph_unreadable"),
    ],
    ids=["truncated", "1x1", "text", "0-byte"],
)
def test_a_file_that_is_no_photograph_is_left_out(world: World, content: bytes, reason: str):
    """Checked by decoding, once, when linking: not hours later when training."""
    world.good("good", 1)
    (world.source / "bad.jpg").write_bytes(content)
    for job_id in ("a", "b"):
        world.analysis(job_id, fenced(critique()))
        world.row(job_id, filename="bad.jpg")
    assert reasons(run(world)) == {"a": reason, "b": reason}


def test_any_cut_of_any_format_is_a_reason_and_never_a_crash(tmp_path: Path):
    """A damaged photograph costs its row, not the run."""
    for ending in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        whole = tmp_path / f"whole.{ending}"
        Image.effect_noise((64, 48), 60).convert("RGB").save(whole)
        content = whole.read_bytes()
        assert check_photograph(whole).size == (64, 48)
        for part in range(8):
            cut = tmp_path / f"cut.{ending}"
            cut.write_bytes(content[: len(content) * part // 8])
            with pytest.raises(LeftOut) as caught:
                check_photograph(cut)
            assert caught.value.reason is Reason.PHOTOGRAPH_UNREADABLE


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path):
    """Phone pictures lie on their side unless their EXIF orientation is obeyed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    Image.new("L", (64, 48)).save(path, exif=exif)
    assert check_photograph(path).size == (48, 64)


def test_a_job_id_in_two_databases_is_linked_once(world: World, tmp_path: Path):
    """The first database that can link an id does; the other row is a duplicate with a reason."""
    second = World(tmp_path / "second")
    world.good("a", 1)
    world.good("b", 2, status="queued")
    world.row("c", filename="1.jpg")
    for job_id in ("a", "b"):
        world.row(job_id, second.db, filename="1.jpg")
    result = run(world, db_paths=[world.db, second.db])
    assert result.report["linked"] == 2
    left = {(e["job_id"], e["reason"], e["database"]) for e in result.report["left_out"]}
    assert left == {
        ("b", "not_finished", str(world.db)),
        ("c", "no_analysis", str(world.db)),
        ("a", "duplicate_id", str(second.db)),
    }


def test_without_an_advisor_everybodys_rows_are_linked(world: World):
    world.good("a", 1)
    world.good("b", 2, advisor="watkins")
    manifest = run(world, None).manifest
    assert {name: entry["count"] for name, entry in manifest["by_advisor"].items()} == {
        "ansel": 1,
        "watkins": 1,
    }


def test_the_limit_leaves_rows_out_with_a_reason(world: World):
    for index in range(5):
        world.good(str(index), index)
    assert reasons(run(world, limit=3)) == {"3": "over_limit", "4": "over_limit"}


def test_no_usable_row_counts_the_reasons_and_the_report_is_kept(world: World):
    """An empty training set stops the run at once, and the report says why, row by row."""
    world.row("a", filename="1.jpg", status="queued")
    world.row("b", filename="1.jpg", status="error")
    with pytest.raises(NoUsableRows, match="2 not_finished") as caught:
        link_into(world.output, world.db, world.source, world.analyses, "ansel")
    assert "queued (1)" in str(caught.value)
    report = json.loads((world.output / "link_report.json").read_text())
    assert report["rows"] == 2
    assert report["linked"] == 0
    assert not (world.output / "training_data_manifest.json").exists()


def test_an_unknown_advisor_is_answered_with_the_known_ones(world: World):
    world.good("a", 1)
    with pytest.raises(NoUsableRows, match=r"ansel \(1\); did you mean ansel\?"):
        run(world, "anzel")


def test_a_database_without_rows(world: World):
    with pytest.raises(NoUsableRows, match="has no rows"):
        run(world)


@pytest.mark.parametrize("key", ["source_dir", "analysis_dir"])
def test_a_missing_folder_names_its_key(world: World, key: str):
    world.good("a", 1)
    changes: dict[str, Any] = {key: world.folder / "nowhere"}
    with pytest.raises(DataError, match=f"does not exist; set data.{key}"):
        run(world, **changes)
    changes[key] = world.db
    with pytest.raises(DataError, match=f"is not a folder; set data.{key}"):
        run(world, **changes)


def test_no_database_at_all(world: World):
    with pytest.raises(DataError, match="lists no database"):
        run(world, db_paths=[])


def test_without_an_analysis_folder_analyses_in_the_rows_are_linked(world: World):
    world.photo("1.jpg")
    world.row("a", filename="1.jpg", analysis_markdown=fenced(critique()))
    assert only(run(world, analysis_dir=None))["analysis_rule"] == "inline"


def test_linking_changes_nothing_it_reads(world: World):
    """Database, photographs and analyses belong to the user."""
    world.good("a", 1)
    paths = [world.db, *world.source.iterdir(), *world.analyses.iterdir()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    result = link_into(world.output, world.db, world.source, world.analyses, "ansel")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert json.loads(write(result, world.output).read_text()) == result.manifest


def test_170_rows_are_linked_in_half_a_second(world: World):
    """The promise of a quick `task=link`; each photograph is hashed and decoded once."""
    text = fenced(critique())
    with closing(sqlite3.connect(world.db)) as connection:
        for index in range(170):
            world.analysis(str(index), text)
            world.photo(f"{index % 150}.jpg", index % 150, (320, 240))
            connection.execute(
                "INSERT INTO jobs (id, filename, advisor, status) VALUES (?, ?, 'ansel', 'done')",
                (str(index), f"{index % 150}.jpg"),
            )
        connection.commit()
    check_photograph(world.source / "0.jpg")  # imports Pillow
    start = time.process_time()
    assert run(world).report["linked"] == 170
    # Processor time: a busy machine must not fail the test.
    assert time.process_time() - start < 0.5


@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs the shared real pieces")
def test_the_real_schema_analyses_and_photographs(tmp_path: Path):
    """Real tables, real analysis files, real photographs: linked as they are."""
    real = SHARED / "real"
    world = World(tmp_path / "real", (real / "schema.sql").read_text(encoding="utf-8"))
    photographs = sorted((real / "source").iterdir())
    for photograph in photographs:
        (world.source / photograph.name).write_bytes(photograph.read_bytes())
    files = sorted((real / "analysis_md").iterdir())
    for file, photograph in zip(files, photographs, strict=False):
        job_id = file.stem.removeprefix("analysis-ansel-")
        world.row(job_id, filename=photograph.name)
        (world.analyses / file.name).write_bytes(file.read_bytes())
    responses = (real / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in map(json.loads, responses):
        columns = {key: entry[key] for key in ("created_at", "mode", "model", "adapter")}
        world.row(
            entry["id"],
            filename=f"uploads/{UUID}_{photographs[2].name}",
            analysis_markdown=entry["response"],
            **columns,
        )
    result = run(world)
    assert result.report["rows"] == 19
    assert result.report["linked"] == 11
    assert set(result.report["reasons"]) == {"wrong_shape", "broken_json", "no_json"}

"""Linking: every row ends in the manifest or in the report with a reason, and nothing else."""

import io
import json
import sqlite3
import time
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.data import photographs
from mondrian_ft.data.critique import parse_analysis
from mondrian_ft.data.dataset import prepare
from mondrian_ft.data.link import LinkResult, NoUsableRows, link, link_into, write
from mondrian_ft.data.photographs import check_photograph
from mondrian_ft.data.reasons import LeftOut, Reason
from mondrian_ft.errors import DataError

from .shapes import cards, dimensional, markdown
from .world import SCHEMA, SHARED, World, critique, fenced


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


DIMENSION = critique()["dimensions"][0]


def without(value: dict, *keys: str) -> dict:
    """An object without some keys."""
    return {key: content for key, content in value.items() if key not in keys}


def test_every_dirty_row_has_its_reason(world: World):
    """One of each kind of dirt that real databases hold, beside one good row."""
    world.good("good", 1)
    dirt = {
        "bad-shape": ('{"composition": 1}', "wrong_shape"),
        "failed": ("Failed to parse model response", "analysis_failed"),
        "no-json": ("I like this photograph.", "no_json"),
        "cut": (fenced(critique())[:200], "broken_json"),
        "two": (fenced(critique(7)) + fenced(critique(6)), "two_json_blocks"),
        "grade": (fenced(critique(overall_score="A-")), "score_not_a_number"),
        "nan": (fenced(critique(overall_score=float("nan"))), "score_not_a_number"),
        "eleven": (fenced(critique(11)), "score_out_of_range"),
        "blank": (fenced(critique(dimensions=[{**DIMENSION, "name": " "}])), "empty_text"),
        "missing": (fenced({**critique(), "technical_notes": None}), "wrong_shape"),
        "partial": (fenced(without(critique(), "technical_notes")), "incomplete"),
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
        "html": ({"analysis_markdown": "<h1>HTTP 500</h1>"}, "analysis_failed"),
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
    """Checked once, when linking: not hours later when training."""
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


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_noticed_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: bool
):
    """Also where it is cut just behind the end marker of the thumbnail in its EXIF."""
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 60).save(stream, "JPEG")
    thumbnail = stream.getvalue()
    exif = Image.Exif()
    # A comment (0x9286) is as good a place for the thumbnail's bytes as its own.
    exif.get_ifd(0x8769)[0x9286] = thumbnail
    path, whole = tmp_path / "cut.jpg", tmp_path / "whole.jpg"
    picture = Image.effect_noise((64, 48), 60).convert("RGB")
    picture.save(whole, exif=exif, progressive=progressive)
    content = whole.read_bytes()
    behind = content.index(thumbnail) + len(thumbnail)
    assert content[:behind].endswith(b"\xff\xd9")
    for length in {*range(0, len(content), 37), behind, *range(len(content) - 40, len(content))}:
        path.write_bytes(content[:length])
        with pytest.raises(LeftOut) as caught:
            check_photograph(path)
        assert caught.value.reason is Reason.PHOTOGRAPH_UNREADABLE, length

    def decoded(*_: object) -> None:
        raise AssertionError("it was decoded")

    # What some phones and editors put behind the picture makes it no worse.
    path.write_bytes(content + b"trailer")
    assert check_photograph(path).size == (64, 48)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert check_photograph(whole).size == (64, 48)
    with pytest.raises(AssertionError, match="was decoded"):
        check_photograph(path)


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
    pictures = sorted((real / "source").iterdir())
    for photograph in pictures:
        (world.source / photograph.name).write_bytes(photograph.read_bytes())
    files = sorted((real / "analysis_md").iterdir())
    for file, photograph in zip(files, pictures, strict=False):
        job_id = file.stem.removeprefix("analysis-ansel-")
        world.row(job_id, filename=photograph.name)
        (world.analyses / file.name).write_bytes(file.read_bytes())
    responses = (real / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in map(json.loads, responses):
        columns = {key: entry[key] for key in ("created_at", "mode", "model", "adapter")}
        world.row(
            entry["id"],
            filename=f"uploads/{UUID}_{pictures[2].name}",
            analysis_markdown=entry["response"],
            **columns,
        )
    result = run(world)
    assert result.report["rows"] == 19
    assert result.report["linked"] == 11
    assert set(result.report["reasons"]) == {
        "wrong_shape",
        "broken_json",
        "no_json",
        "incomplete",
    }


# -- where an analysis comes from ----------------------------------------------------------------


FULL = SCHEMA.replace(
    "completed_at TEXT);",
    "completed_at TEXT, llm_outputs TEXT, prompt TEXT, analysis_html TEXT);"
    "CREATE TABLE dimensional_profiles (id TEXT, job_id TEXT, advisor_id TEXT, image_path TEXT,"
    " composition_score REAL, lighting_score REAL, composition_comment TEXT, overall_grade TEXT);",
)


@pytest.fixture
def full(tmp_path: Path) -> World:
    """A database with the columns of a later service."""
    return World(tmp_path / "full", FULL)


def raw(score: float) -> str:
    """``llm_outputs`` with the model's answer in it."""
    return json.dumps({"prompt": "p", "response": json.dumps(critique(score)), "model": "m"})


def test_the_best_source_wins_and_is_named(full: World):
    """Raw answer, text in the row, file, page, each said to be where it was, and as what read."""
    full.photo("1.jpg")
    page = cards(critique(4))
    cells: dict[str, tuple[dict[str, Any], tuple[str, str, float]]] = {
        "raw": (
            {"llm_outputs": raw(1), "analysis_markdown": fenced(critique(2))},
            ("llm_outputs.response", "json", 1),
        ),
        "inline": ({"analysis_markdown": markdown(critique(2))}, ("inline", "markdown", 2)),
        "file": ({"llm_outputs": json.dumps({"ansel": page})}, ("job_id", "json", 3)),
        "page": (
            {"llm_outputs": json.dumps({"ansel": {"html": page, "mode_used": "rag"}})},
            ("llm_outputs.html", "html", 4),
        ),
        "column": ({"analysis_html": page}, ("analysis_html", "html", 4)),
        "graded": ({"analysis_markdown": dimensional(critique(5))}, ("inline", "dimensional", 5)),
    }
    for job_id in ("raw", "inline", "file"):
        full.analysis(job_id, fenced(critique(3)))
    for job_id, (columns, _) in cells.items():
        full.row(job_id, filename="1.jpg", **columns)
    records = run(full).manifest["by_advisor"]["ansel"]["records"]
    found = {
        r["job_id"]: (r["analysis_rule"], r["analysis_parser"], r["overall_score"]) for r in records
    }
    assert found == {job_id: wanted for job_id, (_, wanted) in cells.items()}
    for record in records:
        # Whatever the shape was, the workbook's own tools find fenced or bare JSON at the path.
        text = Path(record["analysis_path"]).read_text(encoding="utf-8")
        assert parse_analysis(text).critique.overall_score == record["overall_score"]
        assert record["json_size"] == len(text.encode())
        assert (record["analysis_source"] is not None) == (record["job_id"] == "file")
        assert bool(record["mends"]) == (record["analysis_parser"] != "json")


def test_a_source_that_cannot_be_used_is_passed_over_and_told(full: World):
    """A raw answer that was cut off does not hide the page that was made of it."""
    full.photo("1.jpg")
    cut = json.dumps({"response": json.dumps(critique(1))[:300]})
    full.row("a", filename="1.jpg", llm_outputs=cut, analysis_html=cards(critique(6)))
    full.row("b", filename="1.jpg", llm_outputs=cut, analysis_markdown="Failed to parse")
    result = run(full)
    assert only(result)["passed_over"] == [
        {"source": "llm_outputs.response", "reason": "broken_json"}
    ]
    assert reasons(result) == {"b": "broken_json"}


@pytest.mark.parametrize("end", ["md", "html"])
def test_a_page_named_after_photograph_and_job_is_found(full: World, end: str):
    """`analysis-{10 of the photo's stem}-{6 of the job id}`; another photograph's page is not."""
    full.photo("photo-B535AA.jpg")
    job = "0552bf00-2b6f"
    for prefix, score in (("photo-B535", 6), ("photo-C999", 2)):
        (full.analyses / f"analysis-{prefix}-0552bf.{end}").write_text(cards(critique(score)))
    full.row(job, filename="photo-B535AA.jpg")
    record = only(run(full))
    assert (record["analysis_rule"], record["overall_score"]) == ("prefix", 6)
    assert record["analysis_source"].endswith(f"analysis-photo-B535-0552bf.{end}")


def test_a_profile_is_the_last_source_and_lacks_texts(full: World):
    """Scores of dimensional_profiles join only with data.accept=all; what lacks is named."""
    full.good("good", 1)
    full.photo("2.jpg", 2)
    full.row("a", filename="2.jpg")
    with closing(sqlite3.connect(full.db)) as connection:
        connection.execute(
            "INSERT INTO dimensional_profiles VALUES "
            "('p', NULL, 'ansel', '/Users/x/2.jpg', 8, 6, 'Calm.', '7.5')"
        )
        connection.commit()
    assert reasons(run(full)) == {"a": "incomplete"}
    records = run(full, accept="all").manifest["by_advisor"]["ansel"]["records"]
    (record,) = [record for record in records if record["job_id"] == "a"]
    assert (record["analysis_rule"], record["overall_score"]) == ("dimensional_profiles", 7.5)
    assert "key_strengths" in record["missing"]
    assert "dimensions[0].comment" not in record["missing"]


def test_a_line_of_a_scored_file_is_a_source(world: World):
    """By job id or by photograph; two different lines about one row are nobody's."""
    for key in (1, 2, 3):
        world.photo(f"{key}.jpg", key)

    def line(score: float, **about: str) -> str:
        return json.dumps({**about, **json.loads(dimensional(critique(score)))})

    lines = [
        line(5, job_id="a"),
        line(6, image="/Users/x/2.jpg", advisor="Ansel"),
        line(1, image="2.jpg", advisor="watkins"),
        line(7, filename="3.jpg"),
        line(8, filename="3.jpg"),
        "[1]",
        "{",
    ]
    (world.analyses / "scored.jsonl").write_text("\n".join(lines))
    for job_id, name in (("a", "1.jpg"), ("b", "2.jpg"), ("c", "3.jpg")):
        world.row(job_id, filename=name)
    result = run(world)
    records = result.manifest["by_advisor"]["ansel"]["records"]
    assert {r["job_id"]: (r["analysis_rule"], r["overall_score"]) for r in records} == {
        "a": ("scored_jsonl", 5),
        "b": ("scored_jsonl", 6),
    }
    assert reasons(result) == {"c": "no_analysis"}


def test_strict_mended_and_all(world: World):
    """Three strictnesses: exact JSON; complete whatever had to be mended; scores without texts."""
    world.good("exact", 1)
    world.good("mended", 1)
    world.analysis("mended", fenced(critique(7, overall_score="8/10")))
    world.good("partial", 1)
    world.analysis("partial", fenced(without(critique(), "technical_notes")))
    assert reasons(run(world, accept="strict")) == {
        "mended": "needs_mending",
        "partial": "incomplete",
    }
    assert reasons(run(world)) == {"partial": "incomplete"}
    result = run(world, accept="all")
    assert result.report["incomplete"] == [{"job_id": "partial", "missing": ["technical_notes"]}]
    prepared = prepare(
        result.manifest,
        advisor="ansel",
        train_split=1.0,
        val_split=0.0,
        test_split=0.0,
        seed=0,
        output_dir=world.output,
    )
    responses = {row.job_id: json.loads(row.response) for row in prepared.train}
    assert "technical_notes" in responses["exact"]
    assert "technical_notes" not in responses["partial"]
    with pytest.raises(DataError, match="strict, mended, all"):
        run(world, accept="most")


def test_an_empty_text_links_and_a_missing_key_does_not(world: World):
    world.good("empty", 1)
    world.analysis("empty", fenced(critique(technical_notes="", key_strengths=[])))
    world.good("missing", 1)
    world.analysis("missing", fenced(without(critique(), "key_strengths")))
    result = run(world)
    assert only(result)["job_id"] == "empty"
    assert reasons(result) == {"missing": "incomplete"}


def test_the_rows_own_prompt_is_the_one_it_was_asked_with(full: World):
    """Else the database's; which one is recorded."""
    full.good("own", 1, prompt="Judge this, Ansel.")
    full.good("none", 2)
    full.good("blank", 3, prompt=" ")
    manifest = run(full).manifest
    found = {
        r["job_id"]: (r["prompt_source"], manifest["prompts"][r["prompt_id"]]["text"][:18])
        for r in manifest["by_advisor"]["ansel"]["records"]
    }
    assert found["own"] == ("jobs.prompt", "Judge this, Ansel.")
    assert (
        found["none"]
        == found["blank"]
        == (
            "config.system_prompt + advisors.prompt",
            "Judge the photogra",
        )
    )


# -- which photograph a row means ----------------------------------------------------------------

OTHER = "7d444840-9dc0-11d1-b245-5ffdce74fad2"


def test_a_photograph_stored_under_an_uploads_id_is_found_if_it_is_one(world: World):
    """Two uploads of one name are one photograph if their bytes are equal; else nobody knows."""
    world.good("good", 9)
    for job_id, name in (("one", "one.jpg"), ("same", "same.jpg"), ("two", "two.jpg")):
        world.analysis(job_id, fenced(critique()))
        world.row(job_id, filename=name)
    world.photo(f"{UUID}_one.jpg", 1)
    for upload, key in ((UUID, 2), (OTHER, 2)):
        world.photo(f"{upload}_same.jpg", key)
    for upload, key in ((UUID, 3), (OTHER, 4)):
        world.photo(f"{upload}_two.jpg", key)
    result = run(world)
    found = {
        r["job_id"]: (r["photograph_rule"], r["photograph_confidence"])
        for r in result.manifest["by_advisor"]["ansel"]["records"]
    }
    assert found == {
        "good": ("exact_name", "certain"),
        "one": ("stored_upload", "medium"),
        "same": ("stored_upload+content", "medium"),
    }
    (left,) = result.report["left_out"]
    assert (left["job_id"], left["reason"]) == ("two", "photograph_ambiguous")
    assert f"{UUID}_two.jpg" in left["detail"]
    assert f"{OTHER}_two.jpg" in left["detail"]


def test_the_analysis_files_name_tells_the_photograph(world: World):
    """By the first ten characters of its stem, if one photograph has them; named as not sure."""
    job = "0552bf00-2b6f"
    file = "/Users/x/analysis/analysis-photo-B535-0552bf.html"
    text = fenced(critique())
    world.photo("photo-B535AA-11.jpg", 1)
    world.row(job, filename=None, analysis_file=file, analysis_markdown=text)
    world.row(f"{job} (rag)", filename="photo-B535AA-99.jpg", analysis_file=file)
    world.analysis(f"{job} (rag)", text)
    world.row("0552bf-x", filename="other.jpg", analysis_file=file, analysis_markdown=text)
    result = run(world)
    for record in result.manifest["by_advisor"]["ansel"]["records"]:
        rule = (record["photograph_rule"], record["photograph_confidence"])
        assert rule == ("prefix", "low")
    assert result.report["linked"] == 2
    # A name of its own that contradicts the page's is not overruled.
    assert reasons(result) == {"0552bf-x": "photograph_missing"}
    world.photo("photo-B535BB-22.jpg", 2)
    with pytest.raises(NoUsableRows, match="2 photograph_ambiguous"):
        run(world)


def test_a_symbolic_link_out_of_a_folder_is_refused(world: World):
    """source_dir and analysis_dir are boundaries; a link that stays inside is a file."""
    world.good("good", 1)
    outside = world.photo("secret.jpg", 5).rename(world.folder / "secret.jpg")
    (world.source / "out.jpg").symlink_to(outside)
    (world.source / "folder").symlink_to(world.folder)
    (world.source / "in.jpg").symlink_to(world.source / "1.jpg")
    for job_id, name in (("a", "out.jpg"), ("b", "folder/secret.jpg"), ("c", "in.jpg")):
        world.analysis(job_id, fenced(critique()))
        world.row(job_id, filename=name)
    secret = world.folder / "secret.md"
    secret.write_text(fenced(critique()))
    (world.analyses / "analysis-ansel-d.md").symlink_to(secret)
    world.row("d", filename="1.jpg")
    result = run(world)
    assert reasons(result) == {
        "a": "unsafe_filename",
        "b": "unsafe_filename",
        "d": "analysis_unreadable",
    }
    assert result.report["linked"] == 2


# -- bad input -----------------------------------------------------------------------------------


def test_two_rows_with_one_id_in_one_database(tmp_path: Path):
    """Some tables have no primary key: the first row that can be linked is, the other is told."""
    world = World(
        tmp_path / "twice", SCHEMA.replace("id TEXT PRIMARY KEY, filename", "id TEXT, filename")
    )
    world.row("a", filename="gone.jpg")
    world.good("a", 1)
    world.row("a", filename="1.jpg")
    result = run(world)
    assert only(result)["image_path"].endswith("1.jpg")
    assert [e["reason"] for e in result.report["left_out"]] == [
        "photograph_missing",
        "duplicate_id",
    ]


def test_nul_bytes_and_invalid_utf8_cost_their_row_and_nothing_else(full: World):
    full.good("good", 1)
    full.row("nul\0id", filename="1.jpg", analysis_markdown=fenced(critique()))
    full.row("b", filename="1.jpg", analysis_markdown="\0" + fenced(critique()))
    full.row("c", filename="1.jpg", analysis_markdown=fenced(critique()).replace("holds", "\0"))
    full.row("d", filename="1\0.jpg", analysis_markdown=fenced(critique()))
    full.row("e", filename="1.jpg", analysis_markdown=b"\xff\xfe" + fenced(critique()).encode())
    full.row("f", filename="1.jpg", llm_outputs=b"\xff" + raw(7).encode())
    full.row("g", filename="1.jpg", analysis_markdown=fenced(critique()), prompt=b"\xffJudge")
    full.analysis("h", "").write_bytes(b"\xff\xfe\x00")
    full.row("h", filename="1.jpg")
    result = run(full)
    assert reasons(result) == {
        "d": "unsafe_filename",
        "e": "analysis_unreadable",
        "f": "no_analysis",
        "h": "analysis_unreadable",
    } | {job: r for job, r in reasons(result).items() if job == "c" and r == "broken_json"}
    linked = {r["job_id"]: r for r in result.manifest["by_advisor"]["ansel"]["records"]}
    assert linked["g"]["prompt_source"] == "config.system_prompt + advisors.prompt"
    assert linked["b"]["mends"]


def test_an_analysis_of_200_megabytes_is_not_read(world: World):
    """A file that ran away, and a cell: a reason, and no memory spent on it."""
    world.good("good", 1)
    world.good("file", 2)
    with (world.analyses / "analysis-ansel-file.md").open("wb") as file:
        file.truncate(200_000_000)
    world.good("cell", 3)
    (world.analyses / "analysis-ansel-cell.md").unlink()
    with closing(sqlite3.connect(world.db)) as connection:
        connection.execute(
            "UPDATE jobs SET analysis_markdown = zeroblob(200000000) WHERE id = 'cell'"
        )
        connection.commit()
    tracemalloc.start()
    try:
        assert reasons(run(world)) == {"file": "analysis_too_long", "cell": "analysis_too_long"}
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_an_analysis_that_a_power_failure_emptied_is_written_again(world: World):
    """Analyses out of rows are not flushed to the disk one by one; their size tells a lost one."""
    world.photo("1.jpg")
    world.row("a", filename="1.jpg", analysis_markdown=fenced(critique(7)))
    path = Path(only(run(world))["analysis_path"])
    content = path.read_bytes()
    path.write_bytes(b"")
    assert Path(only(run(world))["analysis_path"]) == path
    assert path.read_bytes() == content


# -- the cache of photographs --------------------------------------------------------------------


def test_photographs_are_looked_at_again_only_when_they_change(world: World, monkeypatch):
    """Remembered by path, size and time; a damaged cache is made anew."""
    looked: list[str] = []

    def look(path: Path):
        looked.append(path.name)
        return check_photograph(path)

    monkeypatch.setattr(photographs, "check_photograph", look)
    cache = world.folder / "cache" / "photographs.json"
    world.good("a", 1)
    world.good("b", 2)
    (world.source / "bad.jpg").write_bytes(b"text")
    world.analysis("c", fenced(critique()))
    world.row("c", filename="bad.jpg")
    first = run(world, cache=cache)
    assert sorted(looked) == ["1.jpg", "2.jpg", "bad.jpg"]
    again = run(world, cache=cache)
    assert again.manifest["by_advisor"] == first.manifest["by_advisor"]
    assert again.report == first.report
    assert len(looked) == 3
    world.photo("2.jpg", 7)
    run(world, cache=cache)
    assert looked[3:] == ["2.jpg"]
    for damage in ("", "[]", '{"version": 1, "files": {"x": [1]}}', '{"version": 1, "files": 3}'):
        cache.write_text(damage)
        assert run(world, cache=cache).report == first.report

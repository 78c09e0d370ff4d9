"""Bad input: a clear sentence, the right exit code, nothing lost, and never a traceback."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from .conftest import command, read_json, refused, run_folders, succeed
from .world import World

LINK = ("task=link", "data=mondrian", "data.output_dir=./training_data", "tracking=none")


def critique(world: World, job: str) -> dict:
    """The critique in a job's analysis file."""
    text = world.analyses[job].read_text(encoding="utf-8")
    return json.loads(text.replace("```json", "").replace("```", ""))


def write(world: World, job: str, text: str) -> None:
    """Replaces a job's analysis."""
    world.analyses[job].write_text(text, encoding="utf-8")


# --- databases and folders ----------------------------------------------------------------------


def _missing(world: World) -> None:
    world.db.unlink()


def _zero_bytes(world: World) -> None:
    world.db.write_bytes(b"")


def _foreign(world: World) -> None:
    world.db.write_bytes(b"%PDF-1.7 not a database at all\n" * 100)


def _folder(world: World) -> None:
    world.db.unlink()
    world.db.mkdir()


def _damaged(world: World) -> None:
    whole = world.db.read_bytes()
    world.db.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def _no_tables(world: World) -> None:
    world.db.unlink()
    with closing(sqlite3.connect(world.db)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("DROP TABLE t")
        connection.commit()


def _without_jobs(world: World) -> None:
    world.sql("ALTER TABLE jobs RENAME TO tasks")


def _no_rows(world: World) -> None:
    world.sql("DELETE FROM jobs")


def _unfinished(world: World) -> None:
    world.sql("UPDATE jobs SET status = 'analyzing'")


def _no_source(world: World) -> None:
    shutil.rmtree(world.cwd / "mondrian" / "source")


def _no_analyses(world: World) -> None:
    shutil.rmtree(world.cwd / "mondrian" / "analysis_md")


def _misspelt_advisor(world: World) -> None:
    world.sql("UPDATE jobs SET advisor = 'anselm'")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_missing, ["mondrian.db does not exist", "data.db_path"]),
        (_zero_bytes, ["mondrian.db is 0 bytes"]),
        (_foreign, ["is not an SQLite database", "data.db_path"]),
        (_folder, ["is a folder, not a job database"]),
        (_damaged, ["mondrian.db", "damaged"]),
        (_no_tables, ["has no table `jobs`", "no table at all"]),
        (_without_jobs, ["has no table `jobs`", "tasks"]),
        (_no_rows, ["has no rows"]),
        (_unfinished, ["None of the 10 rows", "not_finished", "analyzing", "link_report.json"]),
        (_no_source, ["source", "does not exist", "data.source_dir"]),
        (_no_analyses, ["analysis_md", "does not exist", "data.analysis_dir"]),
        (_misspelt_advisor, ["No row is by advisor 'ansel'", "did you mean anselm?"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_unusable_data(world: World, spoil: Callable[[World], None], told: list[str]) -> None:
    """Data that cannot be used ends the run with one sentence; an earlier manifest stays."""
    earlier = world.cwd / "training_data" / "training_data_manifest.json"
    earlier.parent.mkdir()
    earlier.write_text('{"kept": true}', encoding="utf-8")
    spoil(world)
    sentence = refused(command(*LINK, cwd=world.cwd))
    for words in told:
        assert words in sentence
    assert read_json(earlier) == {"kept": True}
    assert read_json(run_folders(world.cwd)[-1] / "run.json")["status"] == "failed"


def test_locked_database(world: World) -> None:
    """A database that another program holds is waited for, then named; it is not changed."""
    before = world.db.read_bytes()
    with closing(sqlite3.connect(world.db, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        sentence = refused(command(*LINK, cwd=world.cwd))
        holder.execute("ROLLBACK")
    assert "is locked by another program" in sentence
    assert world.db.read_bytes() == before


def test_unusable_rows_have_a_reason(world: World) -> None:
    """Broken photographs and analyses leave their row out, with a reason; the others are linked."""
    jobs = iter(world.jobs)
    expected: dict[str, str] = {}

    job = next(jobs)
    whole = world.photographs[job].read_bytes()
    world.photographs[job].write_bytes(whole[: len(whole) // 2])
    expected[job] = "photograph_unreadable"

    job = next(jobs)
    Image.new("RGBA", (1, 1), (1, 2, 3, 255)).save(world.photographs[job], "PNG")
    expected[job] = "photograph_too_small"

    job = next(jobs)
    world.photographs[job].write_text("This is a note.", encoding="utf-8")
    expected[job] = "photograph_unreadable"

    job = next(jobs)
    write(world, job, "Failed to parse model response")
    expected[job] = "analysis_failed"

    job = next(jobs)
    write(world, job, "I like this photograph.")
    expected[job] = "no_json"

    job = next(jobs)
    first, second = critique(world, job), critique(world, job) | {"overall_score": 1}
    fences = [f"```json\n{json.dumps(one)}\n```\n" for one in (first, second)]
    write(world, job, "".join(fences))
    expected[job] = "two_json_blocks"

    job = next(jobs)
    wild = critique(world, job)
    wild["dimensions"][0]["score"] = 11
    write(world, job, json.dumps(wild))
    expected[job] = "score_out_of_range"

    mended = next(jobs)
    words = critique(world, mended)
    words["dimensions"][0]["score"], words["dimensions"][1]["score"] = "8", "7/10"
    write(world, mended, json.dumps(words))

    done = succeed(*LINK, cwd=world.cwd)
    report = read_json(world.cwd / "training_data" / "link_report.json")
    assert {row["job_id"]: row["reason"] for row in report["left_out"]} == expected
    assert report["linked"] + len(report["left_out"]) == report["rows"] == 10
    assert [row["job_id"] for row in report["mended"]] == [mended]
    assert "Linked 3 of 10 rows, 1 of them mended." in done.stdout


def test_the_main_job_stops_at_bad_data_too(world: World) -> None:
    """The default task tells the same sentence, and starts neither model nor training."""
    world.sql("UPDATE jobs SET status = 'error'")
    done = command("data=mondrian", "model=sample", "tracking=none", cwd=world.cwd)
    assert "None of the 10 rows" in refused(done)
    assert "Base:" not in done.stdout
    assert not (run_folders(world.cwd)[-1] / "adapter").exists()


# --- odd but usable -----------------------------------------------------------------------------


def test_large_photograph_and_few_rows(world: World) -> None:
    """A photograph above the pixel cap is shrunk to it, and a batch may be larger than the data."""
    job = world.jobs[0]
    with Image.open(world.photographs[job]) as small:
        small.resize((4000, 3000)).save(world.photographs[job], "JPEG", quality=60)
    done = succeed(
        "data=sample",
        "data.db_path=./mondrian/mondrian.db",
        "data.source_dir=./mondrian/source",
        "data.analysis_dir=./mondrian/analysis_md",
        "trainer.batch_size=16",
        "trainer.max_steps=1",
        "eval.max_examples=1",
        "eval.max_tokens=8",
        "tracking=none",
        cwd=world.cwd,
    )
    assert "trainer.batch_size=16 is more than the 7 training rows" in done.stderr
    folder = run_folders(world.cwd)[-1]
    facts = read_json(folder / "run.json")
    assert facts["status"] == "done"
    assert any("trainer.batch_size=16" in warning for warning in facts["warnings"])
    assert facts["rows"] == {"train": 7, "val": 1, "test": 2}
    step = json.loads((folder / "training_log.jsonl").read_text().splitlines()[0])
    # At most 24 tokens a picture beside the text: uncapped, one alone would take 11,750.
    assert step["tokens_per_second"] * step["seconds"] < 7 * 700


# --- models and adapters ------------------------------------------------------------------------


def test_model_that_does_not_exist(world: World) -> None:
    """A model path that is no folder is named before anything is trained."""
    argv = ("data=mondrian", "tracking=none", "model.path=./models/none")
    sentence = refused(command(*argv, cwd=world.cwd))
    assert "models/none" in sentence
    assert "is not a folder" in sentence


def test_model_that_needs_the_network(world: World) -> None:
    """A hub id that cannot be fetched says so, and what would work without a network."""
    done = command(
        "data=mondrian",
        "model=qwen3_vl_4b",
        "tracking=none",
        cwd=world.cwd,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(world.cwd / "hub")},
    )
    sentence = refused(done)
    assert "model.path=Qwen/Qwen3-VL-4B-Instruct" in sentence
    assert "could not be downloaded" in sentence
    assert "model=sample" in sentence


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample base with one weight changed: another base of the same shape."""
    from safetensors.numpy import load_file, save_file

    from mondrian_ft.sample import model_dir

    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(model_dir(), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, weights, {"format": "mlx"})
    return folder


def test_adapter_of_another_base(sample_run, other_base: Path) -> None:
    """An adapter is never applied to a base that it was not trained on."""
    done = command(
        "task=evaluate",
        f"task.adapter={sample_run.adapter}",
        f"data.output_dir={sample_run.folder / 'data'}",
        f"model.path={other_base}",
        "tracking=none",
        cwd=sample_run.cwd,
    )
    sentence = refused(done)
    assert "was trained on mondrian_ft sample model" in sentence
    assert str(other_base) in sentence
    assert "model.path" in sentence


def test_adapter_judged_on_its_own_rows(sample_run) -> None:
    """Photographs that an adapter was trained on are no evidence about it."""
    done = command(
        "task=evaluate",
        f"task.adapter={sample_run.adapter}",
        f"data.val_data={sample_run.folder / 'data' / 'training_data_ansel_train.json'}",
        "tracking=none",
        cwd=sample_run.cwd,
    )
    sentence = refused(done)
    assert "photographs" in sentence
    assert "were trained on" in sentence


def test_adapter_that_is_none(sample_run) -> None:
    """A folder that holds no adapter is refused, never taken for the base."""
    done = command(
        "task=evaluate",
        f"task.adapter={sample_run.folder / 'data'}",
        f"data.output_dir={sample_run.folder / 'data'}",
        "tracking=none",
        cwd=sample_run.cwd,
    )
    assert "is no adapter directory" in refused(done)


def test_bad_config_ends_with_two(world: World) -> None:
    """A config that does not validate exits 2 and leaves no run folder behind."""
    sentence = refused(command(*LINK, "data.train_split=0.9", cwd=world.cwd), code=2)
    assert "data.train_split" in sentence
    assert run_folders(world.cwd) == []

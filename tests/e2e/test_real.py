"""A small real set: real rows, analyses and photographs go through the main job as they are."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.data.critique import CritiqueError, parse_analysis

from .conftest import TEST_ALL, Finished, finished, read_json

PHOTOGRAPHS = {
    "skimage": [f"data/{name}" for name in ("astronaut.png", "camera.png", "chelsea.png")]
    + [f"data/{name}" for name in ("coffee.png", "rocket.jpg", "moon.png", "motorcycle_left.png")],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
"""Photographs that scikit-image and scikit-learn carry inside their packages."""

SYSTEM_PROMPT = (
    "You are a photography advisor. Judge the photograph in seven dimensions, each with a score "
    "from 0 to 10, a comment and a recommendation, and answer with one JSON object with the keys "
    "image_description, dimensions, overall_score, key_strengths, priority_improvements and "
    "technical_notes."
)


def photographs(shared: Path) -> list[Path]:
    """Public-domain photographs of the National Archives, then those of two packages."""
    found = sorted((shared / "real" / "source").glob("*.jpg"))
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            (pytest.fail if TEST_ALL else pytest.skip)(f"{package} is not installed; make setup")
        found += [Path(spec.origin).parent / name for name in names]
    return found


def build(shared: Path, home: Path) -> dict[str, str | None]:
    """A real database's layout; returns each row's reason to be left out, None if it is good.

    As in real databases: finished rows say ``done`` and have no ``completed_at``, the system
    prompt is stored as bytes, uploads carry an id in front of their name, analyses lie in a file
    or in ``analysis_markdown``, and failed rows hold an error page.
    """
    source, analyses = home / "source", home / "analysis_md"
    source.mkdir(parents=True)
    analyses.mkdir()
    pictures = photographs(shared)
    for path in pictures:
        shutil.copyfile(path, source / path.name)
    lines = (shared / "real" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for path in sorted((shared / "real" / "analysis_md").glob("*.md")):
        shutil.copyfile(path, analyses / path.name)
        job = path.stem.removeprefix("analysis-ansel-")
        rows.append({"id": job, "analysis_markdown": None, "text": path.read_text("utf-8")})
    for response in map(json.loads, lines):
        text = response["response"]
        kept = {key: response[key] for key in ("id", "created_at", "mode", "model", "adapter")}
        rows.append({**kept, "analysis_markdown": text, "text": text})
    expected: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        name = pictures[number % len(pictures)].name
        uploaded = f"uploads/{uuid.UUID(int=number)}_{name}"
        row |= {"advisor": "ansel", "status": "done"}
        row |= {"filename": uploaded if number % 2 else name}
        try:
            parse_analysis(row.pop("text"))
            expected[row["id"]] = None
        except CritiqueError as error:
            expected[row["id"]] = error.reason.value
    rows.append(
        {
            "id": "failed-1",
            "advisor": "ansel",
            "status": "error",
            "filename": pictures[0].name,
            "analysis_markdown": "<h1>500 Internal Server Error</h1>",
        }
    )
    expected["failed-1"] = "not_finished"
    with closing(sqlite3.connect(home / "mondrian.db")) as connection:
        connection.executescript((shared / "real" / "schema.sql").read_text(encoding="utf-8"))
        connection.execute(
            "INSERT INTO config VALUES ('system_prompt', ?)", (SYSTEM_PROMPT.encode(),)
        )
        connection.execute(
            "INSERT INTO advisors (id, name, prompt) VALUES ('ansel', 'Ansel Adams', ?)",
            ("Judge as Ansel Adams would: by the light, the tones and the whole of the print.",),
        )
        for row in rows:
            marks = ", ".join("?" * len(row))
            connection.execute(
                f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", list(row.values())
            )
        connection.commit()
    return expected


@pytest.fixture(scope="module")
def real(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finished, dict[str, str | None]]:
    """The workbook's recipe on the real set with the sample model, cut to two updates."""
    cwd = tmp_path_factory.mktemp("real")
    expected = build(shared, cwd / "mondrian")
    run = finished(
        cwd,
        "+experiment=ansel_v1",
        "model=sample",
        "data=sample",
        "data.db_path=./mondrian/mondrian.db",
        "data.source_dir=./mondrian/source",
        "data.analysis_dir=./mondrian/analysis_md",
        "data.output_dir=./training_data",
        "task.output_dir=./models/qwen3-vl-4b-lora-ansel",
        "eval.report=./evaluation/comparison_report.json",
        "trainer.max_steps=2",
        "eval.max_examples=2",
        "eval.max_tokens=40",
        "tracking=none",
    )
    return run, expected


def test_every_row_is_accounted_for(
    real: tuple[Finished, dict[str, str | None]],
) -> None:
    """Real rows are linked where they can be, and left out with the reason where they cannot."""
    run, expected = real
    report = read_json(run.cwd / "training_data" / "link_report.json")
    left_out = {row["job_id"]: row["reason"] for row in report["left_out"]}
    assert left_out == {job: reason for job, reason in expected.items() if reason}
    assert report["linked"] == sum(reason is None for reason in expected.values()) >= 8
    assert report["rows"] == len(expected)


def test_trains_and_evaluates(real: tuple[Finished, dict[str, str | None]]) -> None:
    """The real set gives an adapter and a comparison, on photographs that were not trained on."""
    run, _ = real
    assert run.facts["status"] == "done"
    # None of the rows was too long for the model, which would have been a warning.
    assert not [warning for warning in run.facts["warnings"] if "too long" in warning]
    data = run.cwd / "training_data"
    rows = {
        part: read_json(data / f"training_data_ansel_{part}.json")
        for part in ("train", "val", "test")
    }
    for row in rows["train"]:
        assert row["prompt"].startswith(SYSTEM_PROMPT)
        assert Path(row["image_path"]).is_file()
    trained_on = {row["image_sha256"] for row in rows["train"]}
    assert trained_on.isdisjoint(row["image_sha256"] for row in rows["val"] + rows["test"])
    assert (run.cwd / "models/qwen3-vl-4b-lora-ansel/adapter_model.safetensors").is_file()
    report = read_json(run.cwd / "evaluation" / "comparison_report.json")
    assert report["metrics"]["fine_tuned_model"]["total_outputs"] == len(report["sample_results"])
    assert 1 <= len(report["sample_results"]) <= 2
    log = (run.folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [one["loss"] for one in map(json.loads, log) if one["kind"] == "step"]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)

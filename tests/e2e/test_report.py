"""``task=report`` as it is typed: runs of this experiment, and a refusal where there are none."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import command, read_json, refused, succeed


def run_folder(folder: Path, tuned: float | None) -> None:
    """A run as it is left on disk, evaluated unless ``tuned`` is None."""
    folder.mkdir(parents=True)
    facts = {"status": "done", "experiment": "ranks", "config": {"lora": {"rank": 4}}}
    (folder / "run.json").write_text(json.dumps(facts))
    if tuned is not None:
        arms = {"base": {"score_mae": 2.0}, "tuned": {"score_mae": tuned}}
        (folder / "evaluation").mkdir()
        report = {"evidence": {"verdict": "better", "arms": arms}}
        (folder / "evaluation" / "comparison_report.json").write_text(json.dumps(report))


def test_runs_are_gathered_and_words_are_kept(tmp_path: Path) -> None:
    argv = ("task=report", "experiment_name=ranks", "tracking=none")
    told = refused(command(*argv, cwd=tmp_path))
    assert "There is no evaluated run in outputs/ranks" in told
    for name, tuned in (("one", 0.9), ("two", 0.5), ("three", None)):
        run_folder(tmp_path / "outputs" / "ranks" / name, tuned)
    done = succeed(*argv, cwd=tmp_path)
    assert "Gathered 2 runs of ranks." in done.stdout
    path = tmp_path / "experiments" / "ranks" / "README.md"
    text = path.read_text(encoding="utf-8")
    assert text.index("| two ") < text.index("| one ")
    assert [r["run"] for r in read_json(path.with_name("runs.json"))] == ["one", "two"]
    path.write_text(text.replace("_What we want to know, in a sentence._", "Does rank matter?"))
    succeed(*argv, "task.runs=[outputs/ranks/three]", cwd=tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "Does rank matter?" in text
    assert "| three " in text
    assert "| two " not in text
    told = refused(command(*argv, "task.runs=[outputs/nowhere]", cwd=tmp_path))
    assert "holds no run.json, so it is no run folder" in told

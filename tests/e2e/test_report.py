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


def test_a_folder_of_runs_and_a_pattern_are_compared(tmp_path: Path) -> None:
    """A sweep's folder with jobs of every kind in it: each is shown, or left out in words."""
    sweep = tmp_path / "outputs" / "sweeps" / "one"
    for job, tuned in (("0", 0.9), ("1", 0.5), ("10", 0.7), ("2", None)):
        run_folder(sweep / job, tuned)
    (sweep / "0" / "training_log.jsonl").write_text("nonsense\n")
    failed = {"status": "failed", "task": "experiment", "error": f"{tmp_path}/x.db is empty."}
    (sweep / "2" / "run.json").write_text(json.dumps(failed | {"config": {"lora": {"rank": 8}}}))
    run_folder(sweep / "3", None)
    (sweep / "3" / "run.json").write_text(json.dumps({"status": "done", "task": "versions"}))
    run_folder(sweep / "4", None)
    (sweep / "4" / "run.json").write_text("{")
    argv = ("task=report", "experiment_name=ranks", "tracking=none")
    done = succeed(*argv, f"task.runs=[{sweep.relative_to(tmp_path)}]", cwd=tmp_path)
    assert "Gathered 4 runs of ranks." in done.stdout
    assert "warning: 1 run of task=versions was left out" in done.stderr
    assert "warning: A run was left out. The run outputs/sweeps/one/4/run.json" in done.stderr
    assert "warning: The curves of one/0 were left out. Line 1 of outputs" in done.stderr
    folder = tmp_path / "experiments" / "ranks"
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "4 runs compared, 3 with a result" in page
    assert "Failed: x.db is empty." in page
    for text in (page, (folder / "README.md").read_text(encoding="utf-8")):
        assert str(tmp_path) not in text
    assert "[compare.html](compare.html)" in (folder / "README.md").read_text(encoding="utf-8")
    order = [r["run"] for r in read_json(folder / "runs.json")]
    assert order == ["one/0", "one/1", "one/2", "one/10"]
    done = succeed(*argv, "task.runs=['outputs/sweeps/*/1*']", cwd=tmp_path)
    assert "Gathered 2 runs of ranks." in done.stdout

"""What W&B gets of the main job, read back from the file that it keeps offline."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.pipeline import dashboards
from mondrian_ft.tracking.offline import records

from .conftest import Finished, environment, finished, read_json, typed


@dataclass
class Kept:
    """One ``.wandb`` file: its run, rows, summary, axes and artifacts (by name, newest last)."""

    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    exit: int | None = None


def read(path: Path) -> Kept:
    found = Kept(None)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            put(found.config, record.run.config.update)
        elif kind == "history":
            found.rows.append({})
            put(found.rows[-1], record.history.item)
        elif kind == "summary":
            put(found.summary, record.summary.update)
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "files":
            found.files |= {item.path for item in record.files.files}
        elif kind == "exit":
            found.exit = record.exit.exit_code
    return found


def put(values: dict[str, Any], items: Any) -> None:
    """Items as W&B has them, a value below another's key in a dictionary of its own."""
    for item in items:
        *above, key = item.nested_key or [item.key]
        place = values
        for name in above:
            place = place.setdefault(name, {})
        place[key] = json.loads(item.value_json)


def offline(folder: Path) -> Path:
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return path


@pytest.fixture(scope="module")
def kept(sample_run: Finished) -> Kept:
    """The main job's, as W&B would send it."""
    return read(offline(sample_run.folder))


def log(run: Finished, kind: str) -> Iterator[dict[str, Any]]:
    for line in (run.folder / "training_log.jsonl").read_text().splitlines():
        if (entry := json.loads(line)).pop("kind") == kind:
            yield entry


def test_the_run_is_named_and_configured(kept: Kept, sample_run: Finished) -> None:
    """Name, project, job type, and the config as composed."""
    run, facts = kept.run, sample_run.facts
    assert run.display_name == f"sample/{sample_run.folder.name}"
    assert (run.project, run.job_type) == ("mondrian_ft", "experiment")
    config = {key: value for key, value in kept.config.items() if key != "_wandb"}
    assert config.pop("config_hash") == facts["config_hash"]
    assert config == facts["config"]
    assert kept.exit == 0
    assert run.run_id == facts["wandb"]["id"]


def test_every_metric_of_the_log_is_there_over_updates(kept: Kept, sample_run: Finished) -> None:
    """Each number of training_log.jsonl, under its name, with the axis it is drawn over."""
    for name in ("train/*", "eval/*", "end/*", "eval/val_loss"):
        assert kept.axes[name].step_metric == "train/step", name
    best = kept.axes["eval/val_loss"].summary
    assert (best.min, best.last) == (True, True)
    found = {row["train/step"]: row for row in kept.rows if "train/step" in row}
    names = set()
    for kind, prefix in (("step", "train"), ("eval", "eval"), ("end", "end")):
        entries = list(log(sample_run, kind))
        assert entries
        for entry in entries:
            row = found[entry["step"]]
            for key, value in entry.items():
                if key != "step":
                    assert row[f"{prefix}/{key}"] == pytest.approx(value), key
                    names.add(f"{prefix}/{key}")
    assert names >= {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/trained_tokens_per_second",
        "train/token_accuracy",
        "train/padding_share",
        "train/data_wait_seconds",
        "train/peak_memory_gb",
        "train/eta_seconds",
        "eval/val_loss",
        "end/visits_min",
    }


def test_the_closing_figures_are_the_summary(kept: Kept, sample_run: Finished) -> None:
    """Of each arm with its interval, the verdict, and the adapter's hash."""
    evidence = sample_run.report["evidence"]
    assert kept.summary["verdict"] == evidence["verdict"]
    assert kept.summary["adapter_hash"] == sample_run.facts["adapter"]["hash"]
    for arm in ("base", "tuned"):
        facts = evidence["arms"][arm]
        assert kept.summary[f"{arm}/score_mae"] == pytest.approx(facts["score_mae"])
        low, high = facts["score_mae_interval"]
        assert kept.summary[f"{arm}/score_mae_low"] == pytest.approx(low)
        assert kept.summary[f"{arm}/score_mae_high"] == pytest.approx(high)
    val = [entry["val_loss"] for entry in log(sample_run, "eval")]
    assert kept.summary["eval/val_loss"]["min"] == pytest.approx(min(val))
    assert kept.summary["eval/val_loss"]["last"] == pytest.approx(val[-1])


def test_tables_hold_photographs_and_what_each_arm_said(kept: Kept, sample_run: Finished) -> None:
    """With their files: a picture that opens, the reference and the answers, whole."""
    (row,) = [row for row in kept.rows if "evaluation/photographs" in row]
    for name in ("arms", "photographs"):
        path = row[f"evaluation/{name}"]["path"]
        assert path in kept.files
        assert (offline(sample_run.folder).parent / "files" / path).is_file()
    assert row["evaluation/report"]["path"] in kept.files
    tables = {
        entry.path: json.loads(Path(entry.local_path).read_text())
        for artifact in kept.artifacts
        for entry in artifact.manifest.contents
        if entry.path.endswith(".table.json")
    }
    local = {
        entry.path: Path(entry.local_path)
        for artifact in kept.artifacts
        for entry in artifact.manifest.contents
    }
    shown = tables["evaluation/photographs.table.json"]
    samples = sample_run.report["sample_results"]
    assert len(shown["data"]) == len(samples)
    for cells, sample in zip(shown["data"], samples, strict=True):
        said = dict(zip(shown["columns"], cells, strict=True))
        assert said["reference"] == sample["reference"]["full_output"]
        assert said["base"] == sample["base_model"]["full_output"]
        assert said["tuned"] == sample["fine_tuned_model"]["full_output"]
        with Image.open(local[said["picture"]["path"]]) as picture:
            assert picture.format == "JPEG"
    arms = tables["evaluation/arms.table.json"]
    named = {cells[0] for cells in arms["data"]}
    assert named >= {"base", "tuned", "mean_score"}


def test_files_are_artifacts_with_lineage(kept: Kept, sample_run: Finished) -> None:
    """Manifest and split lock are the run's inputs, the adapter its output, named as it is here."""
    lock = sample_run.facts["data_lock"]
    by_name = {artifact.name: artifact for artifact in kept.artifacts}
    for kind, files in (
        ("manifest", {"training_data_manifest.json", "link_report.json"}),
        ("split", {"split.lock.json"}),
    ):
        made = by_name[f"sample-ansel-{kind}"]
        assert made.type == kind
        assert made.use_after_commit, "an input"
        assert f"lock-{lock[:12]}" in made.aliases
        assert json.loads(made.metadata)["data_lock"] == lock
        assert {entry.path for entry in made.manifest.contents} == files
        for entry in made.manifest.contents:
            original = sample_run.folder / "data" / entry.path
            assert Path(entry.local_path).read_bytes() == original.read_bytes()
    adapter = by_name["sample-ansel"]
    assert adapter.type == "adapter"
    assert not adapter.use_after_commit, "an output"
    assert {"registry-v1", "candidate"} <= set(adapter.aliases)
    assert json.loads(adapter.metadata)["hash"] == sample_run.facts["adapter"]["hash"]
    version = sample_run.cwd / "outputs" / "registry" / "sample-ansel" / "v1"
    inside = {str(path.relative_to(version)) for path in version.rglob("*") if path.is_file()}
    assert {entry.path for entry in adapter.manifest.contents} == inside
    (weights,) = [e for e in adapter.manifest.contents if e.path == "adapter_model.safetensors"]
    # Not copied: the registry's own file, which never changes, waits to be sent.
    assert Path(weights.local_path) == version / "adapter_model.safetensors"


def test_one_command_sends_it(sample_run: Finished) -> None:
    """The last line printed, which names what is there."""
    said = sample_run.stdout.splitlines()[-1]
    assert said.startswith("W&B:      kept on disk; send it with: ")
    folder = offline(sample_run.folder).parent.relative_to(sample_run.cwd)
    assert said.endswith(f"wandb sync {folder}")
    assert sample_run.facts["wandb"]["sync"] == said.split(": ")[-1]
    dry = subprocess.run(
        [*said.split(": ")[-1].split(), "--dry-run"],
        cwd=sample_run.cwd,
        env=environment(HOME=str(sample_run.cwd)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert str(folder.name) in dry.stdout + dry.stderr, dry.stdout + dry.stderr


@pytest.mark.full
def test_a_killed_training_goes_on_as_the_same_run(tmp_path: Path, sample_run: Finished) -> None:
    """Its id and name are kept beside the checkpoints, and the command then sends both pieces."""
    argv = (
        "task=train",
        "tracking.mode=offline",
        f"data.output_dir={sample_run.folder / 'data'}",
        "task.output_dir=adapter",
        "trainer.max_steps=4",
        "trainer.save_every=1",
        "trainer.resume=auto",
    )
    first = subprocess.Popen(
        typed(*argv),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("adapter/checkpoints/step_000002")):
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(60) != 0
    done = finished(tmp_path, *argv)
    files = sorted(tmp_path.glob("outputs/sample/*/wandb/offline-run-*/*.wandb"))
    one, two = (read(path) for path in files)
    assert one.run.run_id == two.run.run_id
    assert one.run.display_name == two.run.display_name
    assert (one.run.job_type, one.exit, two.exit) == ("train", 1, 0)
    steps = [row["train/step"] for kept in (one, two) for row in kept.rows if "train/loss" in row]
    assert steps == [1, 2, 3, 4][: len(steps)]
    said = done.facts["wandb"]["sync"]
    assert re.findall(r"offline-run-\S+", said) == [path.parent.name for path in files]
    kept = read_json(tmp_path / "adapter" / "checkpoints" / "wandb.json")
    assert kept["id"] == one.run.run_id


def test_every_panel_of_the_dashboards_is_logged(kept: Kept) -> None:
    """A panel of a metric that no run has would stay empty, and say nothing of it."""
    named = {key for row in kept.rows for key in row}
    for lines in dashboards.LINES.values():
        for panel in lines:
            assert set(panel.metrics) <= named, panel.title
    assert {dashboards.AXIS, dashboards.PAGE, *dashboards.TABLES} <= named
    for bars in dashboards.BARS:
        assert set(bars.metrics) <= kept.summary.keys(), bars.title
    assert dashboards.RESULT in kept.summary
    for key in dashboards.SETTINGS:
        group, _, name = key.partition(".")
        assert name in kept.config[group], key

"""Stopping a run, by hand or by a full disk, loses nothing: it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import command, environment, read_json, refused, run_folders, succeed, typed
from .world import make_world

STEPS = 8
TRAIN = (
    "task=train",
    "data.output_dir=./training_data",
    "trainer.batch_size=1",
    f"trainer.max_steps={STEPS}",
    "trainer.save_every=2",
    # Dropout draws random numbers, which a resume has to go on drawing.
    "lora.dropout=0.05",
    "optimizer.warmup_steps=2",
    "tracking=none",
)
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Prepared:
    """A folder with prepared rows, and the adapter of a run that nothing stopped."""

    cwd: Path
    weights: bytes
    log: list[dict[str, object]]


def log_of(adapter: Path) -> list[dict[str, object]]:
    """An adapter's training log, without what depends on the clock."""
    lines = (adapter / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("kind", "step", "epoch", "loss", "learning_rate", "val_loss")
    return [{key: json.loads(line).get(key) for key in kept} for line in lines]


@pytest.fixture(scope="module")
def prepared(sample_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Ten rows prepared, and one run to the end."""
    cwd = make_world(sample_files, tmp_path_factory.mktemp("stopped"), rows=10).cwd
    paths = [
        f"data.{key}=./mondrian/{name}"
        for key, name in (
            ("db_path", "mondrian.db"),
            ("source_dir", "source"),
            ("analysis_dir", "analysis_md"),
        )
    ]
    # Six of ten rows are trained on, so that eight steps cross the end of an epoch.
    succeed("task=prepare", *paths, "data.output_dir=./training_data", "tracking=none", cwd=cwd)
    succeed(*TRAIN, "task.output_dir=./models/whole", cwd=cwd)
    whole = cwd / "models" / "whole"
    return Prepared(cwd, (whole / WEIGHTS).read_bytes(), log_of(whole))


def _heed_ctrl_c() -> None:
    """A shell without job control starts what it puts in the background deaf to SIGINT, and that
    is inherited: the tests would fail for how they themselves were started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(
    prepared: Prepared,
    folder: str,
    how: signal.Signals,
    *argv: str,
    at: str = "update 1/",
) -> tuple[int, str]:
    """Starts a training and sends it a signal when it prints ``at``; exit code and stderr."""
    process = subprocess.Popen(
        typed(*TRAIN, f"task.output_dir=./models/{folder}", *argv),
        cwd=prepared.cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().startswith(at):
            process.send_signal(how)
            break
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def resume_command(stderr: str) -> list[str]:
    """The command that the last line of standard error says to type."""
    found = re.search(r"go on with: (.+)$", stderr.strip())
    assert found is not None, stderr
    return shlex.split(found[1])


def resumed(prepared: Prepared, stderr: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Types the command that a stopped run printed."""
    return subprocess.run(
        resume_command(stderr),
        cwd=prepared.cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_ctrl_c(prepared: Prepared) -> None:
    """A stop writes a checkpoint and prints a command; typed as printed, it ends as if unstopped.

    The adapter's bytes and its whole training log are those of a run that nothing stopped.
    """
    code, stderr = stop(prepared, "ctrl_c", signal.SIGINT)
    assert code == 130, stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: training was stopped after update ")
    adapter = prepared.cwd / "models" / "ctrl_c"
    assert not (adapter / WEIGHTS).exists()
    saved = sorted(path.name for path in (adapter / "checkpoints").iterdir())
    assert saved
    assert all(re.fullmatch(r"step_\d{6}", name) for name in saved)
    stopped_at = int(saved[-1].removeprefix("step_"))
    assert f"after update {stopped_at} of {STEPS}" in stderr
    assert stopped_at < STEPS
    assert read_json(run_folders(prepared.cwd)[-1] / "run.json")["status"] == "interrupted"

    done = resumed(prepared, stderr)
    assert done.returncode == 0, done.stderr
    assert f"Resumed after update {stopped_at}." in done.stdout
    assert (adapter / WEIGHTS).read_bytes() == prepared.weights
    assert log_of(adapter) == prepared.log


def test_ctrl_c_while_comparing(prepared: Prepared) -> None:
    """A finished training is kept when the comparison is stopped, and not done again."""
    argv = ("task=experiment", "trainer.max_steps=2", "optimizer.warmup_steps=0")
    paths = (
        "data.db_path=./mondrian/mondrian.db",
        "data.source_dir=./mondrian/source",
        "data.analysis_dir=./mondrian/analysis_md",
        "data.output_dir=./compared",
    )
    code, stderr = stop(
        prepared, "compared", signal.SIGINT, *argv, *paths, "eval.max_tokens=400", at="Evaluating"
    )
    assert code == 130, stderr
    assert "stopped while comparing; the adapter is whole in " in stderr
    adapter = prepared.cwd / "models" / "compared"
    weights = (adapter / WEIGHTS).read_bytes()

    done = resumed(prepared, stderr)
    assert done.returncode == 0, done.stderr
    assert "Resumed after update 2." in done.stdout
    assert (adapter / WEIGHTS).read_bytes() == weights
    assert (adapter / "evaluation" / "comparison_report.json").is_file()


def _killed(prepared: Prepared, at: str) -> bool:
    """Starts a training that goes on from wherever it can, and sends it SIGKILL when it prints
    ``at``; false if it had ended by then."""
    process = subprocess.Popen(
        typed(*TRAIN, "trainer.resume=auto", "experiment_name=killed"),
        cwd=prepared.cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.strip().startswith(at):
                process.kill()
                break
    return process.wait(timeout=120) == -signal.SIGKILL


@pytest.mark.full
def test_kill_9_anywhere(prepared: Prepared) -> None:
    """The same command typed again and again, killed five times, in a new run folder each time.

    No farewell and no folder named: each finds what the one before left. The adapter's SHA-256 and
    its whole log are those of the run that nothing stopped.
    """
    points = sorted(random.Random(7).sample(range(1, STEPS), 5))
    assert [_killed(prepared, f"update {point}/") for point in points][:4] == [True] * 4
    done = succeed(*TRAIN, "trainer.resume=auto", "experiment_name=killed", cwd=prepared.cwd)
    assert "Resumed after update " in done.stdout
    adapters = list((prepared.cwd / "outputs" / "killed").glob(f"*/adapter/{WEIGHTS}"))
    (adapter,) = (path.parent for path in adapters)
    assert hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest() == (
        hashlib.sha256(prepared.weights).hexdigest()
    )
    assert log_of(adapter) == prepared.log
    again = succeed(*TRAIN, "trainer.resume=auto", "experiment_name=killed", cwd=prepared.cwd)
    assert "is finished, so this starts afresh" in again.stdout


def _small_files() -> None:
    """No file may grow beyond 1 MB: the optimizer's state does not fit, all else does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_sigterm_and_a_disk_that_fills_up(prepared: Prepared) -> None:
    """SIGTERM stops like Ctrl-C; a checkpoint that cannot be written is named and harms nothing.

    The checkpoint before it is whole: with space again, the same command ends as if unstopped.
    """
    code, stderr = stop(prepared, "full", signal.SIGTERM)
    assert code == 130, stderr
    checkpoints = prepared.cwd / "models" / "full" / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    assert before

    sentence = refused(resumed(prepared, stderr, preexec_fn=_small_files))
    assert "could not be written" in sentence
    assert "trainer.resume=auto" in sentence
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    assert read_json(run_folders(prepared.cwd)[-1] / "run.json")["status"] == "failed"

    done = resumed(prepared, stderr)
    assert done.returncode == 0, done.stderr
    assert (prepared.cwd / "models" / "full" / WEIGHTS).read_bytes() == prepared.weights


def test_another_recipe_does_not_go_on(prepared: Prepared) -> None:
    """``trainer.resume=auto`` refuses a checkpoint of another recipe, and names the difference."""
    argv = (*TRAIN, "task.output_dir=./models/whole", "trainer.resume=auto", "lora.rank=8")
    sentence = refused(command(*argv, cwd=prepared.cwd))
    assert "lora.rank was 16 and is 8" in sentence
    assert (prepared.cwd / "models" / "whole" / WEIGHTS).read_bytes() == prepared.weights


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(prepared: Prepared) -> None:
    """An output folder without permission is named before anything is trained."""
    closed = prepared.cwd / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    sentence = refused(command(*TRAIN, "task.output_dir=./closed/adapter", cwd=prepared.cwd))
    assert "closed" in sentence

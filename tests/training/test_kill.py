"""kill -9 at any point, go on, and end with the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from . import killed

HERE = Path(__file__).resolve()
ENDS = HERE.parents[2]


def child(lab: Any, tmp_path: Path, run: Path, event: int | str = "") -> Any:
    """Starts the training in a process of its own, and waits for its end, whatever that is."""
    words = [str(lab.model_dir), str(tmp_path / "scratch"), str(run)]
    paths = os.pathsep.join([str(ENDS), str(ENDS / "tests")])
    return subprocess.run(
        [sys.executable, killed.__file__, *words, *([str(event)] if event else [])],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def sha256(run: Path) -> str:
    """Of the adapter a run ended with."""
    return hashlib.sha256((run / "final.safetensors").read_bytes()).hexdigest()


def steps(run: Path) -> list[str]:
    """What lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def content(run: Path) -> dict[str, Any]:
    """Every file of a run by name: the tensors of optimizer and average, the state as it is told.

    MLX writes tensors in an order of its own, so they are compared one by one.
    """
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found[name] = {key: (tensors[key].shape, tensors[key].tobytes()) for key in tensors}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def straight(lab, base, tmp_path) -> Path:
    """The run that nothing stops, in this very process."""
    run = tmp_path / "straight"
    killed.train(lab, base, run, lambda: None)
    return run


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint(lab, tmp_path, straight) -> None:
    """The half checkpoint is none; the one before is gone on from, and the bytes are the same."""
    run = tmp_path / "killed"
    first = child(lab, tmp_path, run, "step_000003/optimizer.safetensors")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert steps(run) == [".tmp-step_000003", "step_000002"]
    half = run / "checkpoints" / ".tmp-step_000003"
    written = {path.name: path.stat().st_size for path in half.iterdir()}
    whole = run / "checkpoints" / "step_000002"
    assert written.keys() == {"adapter.safetensors", "optimizer.safetensors"}
    assert written["optimizer.safetensors"] < (whole / "optimizer.safetensors").stat().st_size
    again = child(lab, tmp_path, run)
    assert again.returncode == 0, again.stderr
    assert sha256(run) == sha256(straight)
    assert content(run) == content(straight)


@pytest.mark.full
def test_killed_at_five_random_points(lab, tmp_path, straight) -> None:
    """One run, killed five times wherever chance wants it, and never told of it."""
    counted = child(lab, tmp_path, tmp_path / "counted")
    assert counted.returncode == 0, counted.stderr
    total = int(counted.stdout)
    assert total > 60
    for seed in range(2):
        run = tmp_path / f"killed-{seed}"
        points = random.Random(seed).sample(range(2, total // 3), 5)
        for point in points:
            done = child(lab, tmp_path, run, point)
            assert done.returncode == -signal.SIGKILL, (points, point, done.stderr)
        last = child(lab, tmp_path, run)
        assert last.returncode == 0, (points, last.stderr)
        assert sha256(run) == sha256(straight), points
        assert content(run) == content(straight), points

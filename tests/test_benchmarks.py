"""The benchmarks' bookkeeping; what they measure takes minutes and is not repeated here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure, training_step

ROOT = Path(__file__).resolve().parents[1]


def test_entries_are_recorded_side_by_side(tmp_path: Path) -> None:
    """Promise: measuring one entry again leaves the others of this machine as they were."""
    measure.record("first", {"ratio": 1.0}, tmp_path)
    measure.record("second", {"ratio": 2.0}, tmp_path)
    path = measure.record("first", {"ratio": 3.0}, tmp_path)
    assert path.stem == measure.machine()
    entries = json.loads(path.read_text())["entries"]
    assert {name: entry["ratio"] for name, entry in entries.items()} == {
        "first": 3.0,
        "second": 2.0,
    }
    assert entries["first"]["versions"]["mlx"]


def test_results_tell_nothing_of_the_place() -> None:
    """Promise: a file of results names the kind of machine, and no host, user or folder."""
    found = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert found, "the first figures are missing"
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert json.loads(text)["machine"] == path.stem
        assert not any(word in text for word in ("/home", "/Users", "/tmp", "/root", ".venv", "@"))


def test_mlx_vlms_report_is_read() -> None:
    """Promise: a report of mlx-vlm that lacks a step is an error, not a better figure."""
    line = (
        "Training (iteration 1):\noptimizer_step=1, train_loss=0.336, learning_rate=0.001\n"
        "step_time=0.39, data_time_per_step=0.022, total_processed_tokens=1,039,461\n"
    )
    done = measure.Finished(seconds=20.0, memory=0.3, output=line)
    figures = training_step._read_theirs(done.output, done, 1)
    assert figures["step_seconds"] == 0.39
    assert figures["step_with_data_seconds"] == pytest.approx(0.412)
    assert figures["tokens"] == 1_039_461
    with pytest.raises(RuntimeError, match="1 of 2 steps"):
        training_step._read_theirs(done.output, done, 2)


def test_an_unknown_entry_is_refused() -> None:
    """Promise: a misspelt entry measures nothing, exits 2 and names the entries there are."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "trainingstep"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "training_step" in done.stderr


def test_a_process_that_fails_is_no_measurement(tmp_path: Path) -> None:
    """Promise: a command that ends badly stops the benchmark with what it printed."""
    import os

    with pytest.raises(RuntimeError, match="no such row"):
        measure.process(
            [sys.executable, "-c", "import sys; sys.exit('no such row')"],
            cwd=tmp_path,
            env=dict(os.environ),
        )


@pytest.mark.slow
def test_decoding_with_random_weights_runs_without_config_or_tracking(tmp_path: Path) -> None:
    """Promise: the GPU's benchmark needs neither Hydra nor W&B, and all its sections measure."""
    out = tmp_path / "figures" / "decode.json"
    small = "--layers 2 --hidden 256 --side 4 --prompt 16 --tokens 5 --steps 4 --photographs 2"
    code = (
        "import sys, runpy\n"
        "for name in ('hydra', 'omegaconf', 'wandb'): sys.modules[name] = None\n"
        f"sys.argv = ['benchmarks', *'decode --shapes 4b {small} --out {out}'.split()]\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    sections = {name: value for name, value in found.items() if isinstance(value, dict)}
    assert not [name for name, value in sections.items() if "error" in value]
    assert sections["base_batch_2"]["tokens_per_second"] > 0
    assert sections["evaluation_ours"]["tokens"] == 2 * 2 * 5
    assert found["evaluation_ratio"] > 0


def test_the_documented_peaks_are_the_recorded_ones() -> None:
    """Promise: docs/memory.md shows what was measured, all of it, and none is further off than
    15 %."""
    from benchmarks import memory_fit

    assert memory_fit.table() in memory_fit.DOCS.read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        cases = json.loads(path.read_text())["entries"].get("memory_fit", {}).get("cases", {})
        assert all(abs(one["off"]) <= 0.15 for one in cases.values()), path

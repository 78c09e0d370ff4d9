"""What an epoch costs with 100 to 3,000 rows: seconds and memory, and whether they grow in line.

Each number of rows is a job database of its own, linked, prepared and trained on by its users'
commands, in processes of their own. Five critiques share a photograph; photographs are the sample's
scenes at the sample's size, so that rows are as long as the sample's.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import large_database, measure
from .training_step import ALPHA, BATCH, RANK, RATE, ROOT, environment

ROWS = (100, 300, 1000, 3000)
SHARING = 5
"""Rows of one photograph."""


def run(repeats: int, rows: Sequence[int] = ROWS, updates: int | None = None) -> dict[str, Any]:
    """Train one epoch for each number of rows, once whatever ``repeats`` is: it is minutes long.

    Args:
        updates: most updates that are measured; those of the whole epoch are then taken to cost as
            much as their mean, and the entry says so. None for all of them.
    """
    found = []
    for count in rows:
        with tempfile.TemporaryDirectory() as scratch:
            one = _epoch(Path(scratch), count, updates)
        found.append(one)
        print(
            f"{one['rows']:5} rows: an epoch {one['epoch_seconds']:6.1f} s "
            f"({one['updates_measured']} of {one['updates']} updates measured), before it "
            f"{one['before_seconds']:.1f} s, preparing the data {one['prepare_seconds']:.1f} s, "
            f"{one['peak_mb']:.0f} MB",
            flush=True,
        )
    line = fit([(one["rows"], one["epoch_seconds"]) for one in found])
    print(
        f"epoch = {line['seconds_at_0']:.2f} s + {1000 * line['seconds_a_row']:.1f} ms a row, "
        f"R² {line['r_squared']:.4f}; memory {found[0]['peak_mb']:.0f} to "
        f"{found[-1]['peak_mb']:.0f} MB"
    )
    return {
        "what": "one epoch of LoRA on the sample model, 2 rows an update",
        "subsampled": any(one["updates_measured"] < one["updates"] for one in found),
        "line": line,
        "sizes": found,
    }


def fit(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The straight line of least squares through (rows, seconds), and how well it fits."""
    x, y = np.array(points, float).T
    slope, start = np.polyfit(x, y, 1)
    off = y - (start + slope * x)
    spread = float(((y - y.mean()) ** 2).sum())
    return {
        "seconds_at_0": round(float(start), 3),
        "seconds_a_row": round(float(slope), 5),
        "r_squared": round(1 - float((off**2).sum()) / spread, 5) if spread else 1.0,
        "largest_difference": round(float(np.abs(off / y).max()), 3),
    }


def _epoch(folder: Path, rows: int, most: int | None) -> dict[str, Any]:
    home = folder / "mondrian"
    for name in ("source", "analysis_md"):
        (home / name).mkdir(parents=True)
    photographs = math.ceil(rows / SHARING)
    for number in range(photographs):
        picture = large_database.render(large_database.scene(large_database.original_of(number)))
        # A copy is cut a little, so that it is another file.
        edge = number % 7
        picture = picture.crop((0, 0, picture.width - edge, picture.height - edge))
        picture.save(home / "source" / large_database.name_of(number), "JPEG", quality=88)
    large_database.write_rows(home, photographs, rows)
    common = [sys.executable, "-m", "mondrian_ft", "tracking=none", "data.output_dir=data"]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    prepared = measure.process(
        [
            *common,
            "data=mondrian",
            "task=prepare",
            f"data.db_path={home / 'mondrian.db'}",
            f"data.source_dir={home / 'source'}",
            f"data.analysis_dir={home / 'analysis_md'}",
            "data.train_split=1",
            "data.val_split=0",
            "data.test_split=0",
            "hydra.run.dir=prepared",
        ],
        cwd=folder,
        env=env,
    )
    linked = len(json.loads((folder / "data" / "training_data_ansel_train.json").read_text()))
    updates = math.ceil(linked / BATCH)
    measured = min(updates, most or updates)
    trained = measure.process(
        [
            *common,
            "data.train_split=1",
            "data.val_split=0",
            "data.test_split=0",
            "task=train",
            "trainer.epochs=1",
            f"trainer.max_steps={measured}",
            f"trainer.batch_size={BATCH}",
            f"trainer.save_every={updates}",
            f"lora.rank={RANK}",
            f"lora.alpha={ALPHA}",
            f"optimizer.learning_rate={RATE}",
            "hydra.run.dir=trained",
        ],
        cwd=folder,
        env=env,
    )
    log = (folder / "trained" / "training_log.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, log) if one["kind"] == "step"]
    seconds = sum(one["seconds"] + one["data_wait_seconds"] for one in steps)
    return {
        "rows": linked,
        "photographs": photographs,
        "updates": updates,
        "updates_measured": len(steps),
        "epoch_seconds": round(seconds / len(steps) * updates, 2),
        "before_seconds": round(trained.seconds - seconds, 2),
        "prepare_seconds": round(prepared.seconds, 2),
        "peak_mb": round(trained.memory * 1000),
        "arrays_peak_mb": round(steps[-1]["peak_memory_gb"] * 1000),
    }

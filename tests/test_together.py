"""What several processes cannot do together is refused before anything is read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mondrian_ft.launched import ONLY, Launched
from mondrian_ft.pipeline.together import refusal
from mondrian_ft.schema import Config, EvalConfig, TrainerConfig


@pytest.mark.parametrize(
    ("config", "task", "sweeping", "told"),
    [
        (Config(), "experiment", True, "a sweep (-m) starts its jobs in one process"),
        (Config(), "serve", False, "task=serve is done by one process, and 4 were started"),
        (Config(eval=EvalConfig(folds=3)), "experiment", False, "eval.folds and eval.seeds"),
        (Config(eval=EvalConfig(seeds=2)), "experiment", False, "eval.folds and eval.seeds"),
        (Config(trainer=TrainerConfig(overfit=1, accumulate=2)), "train", False, "trainer.overfit"),
        (Config(), "train", False, "an update has 2 rows"),
    ],
)
def test_what_one_process_does_is_refused(config, task, sweeping, told) -> None:
    error = refusal(config, Launched(1, 4), task=task, sweeping=sweeping)
    assert error is not None
    assert told in str(error)
    assert error.exit_code == 2
    assert error.common  # the first process alone says it
    assert refusal(config, ONLY, task=task, sweeping=sweeping) is None


def test_what_can_be_shared_is_not_refused() -> None:
    config = Config(trainer=TrainerConfig(batch_size=2, accumulate=2))
    for task in ("experiment", "train"):
        assert refusal(config, Launched(0, 4), task=task, sweeping=False) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_says_what_is_wrong(tmp_path: Path, rank: int) -> None:
    """And no run folder is left, nor anything written by the other."""
    done = subprocess.run(
        [sys.executable, "-m", "mondrian_ft", "task=versions"],
        cwd=tmp_path,
        env=os.environ | {"MLX_RANK": str(rank), "MLX_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    told = "error: task=versions is done by one process, and 2 were started"
    assert done.stdout == ""
    assert done.stderr.startswith(told) if rank == 0 else done.stderr == ""
    assert done.returncode == (2 if rank == 0 else 0)
    assert not list(tmp_path.rglob("run.json"))

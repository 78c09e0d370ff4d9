"""mlx-vlm itself loads what we export, and says the same words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mondrian_ft.sample import model_dir

from .conftest import Finished, environment, succeed


@pytest.fixture(scope="module")
def exported(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample run's adapter in mlx-vlm's layout."""
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    argv = ("task=export", "task.format=mlx", f"task.adapter={sample_run.adapter}")
    succeed(*argv, f"task.output_dir={folder}", "tracking=none", cwd=sample_run.cwd)
    return folder


def said(run: Finished, row: dict, *argv: str) -> str:
    """What ``python -m mlx_vlm.generate`` answers to a row, greedily."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_vlm.generate"),
            *("--model", str(model_dir())),
            *("--image", row["image_path"]),
            *("--prompt", row["prompt"]),
            *("--temperature", "0"),
            *("--max-tokens", str(run.report["evidence"]["settings"]["max_tokens"])),
            *argv,
        ],
        cwd=run.cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_same_text(sample_run: Finished, exported: Path) -> None:
    """mlx-vlm's greedy text equals ours, with the adapter and without, on unseen photographs.

    Its command line takes the pixel cap from the model's folder, which states the one the sample
    is trained with, and builds the turn from the model's own template, as we do.
    """
    rows = {row["image_path"]: row for row in sample_run.rows("test")}
    first, second = sample_run.report["sample_results"][:2]
    for sample in (first, second):
        answer = said(sample_run, rows[sample["image_path"]], "--adapter-path", str(exported))
        assert answer == sample["fine_tuned_model"]["full_output"].strip()
    answer = said(sample_run, rows[first["image_path"]])
    assert answer == first["base_model"]["full_output"].strip()
    assert answer != first["fine_tuned_model"]["full_output"].strip()

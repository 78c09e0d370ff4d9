"""Killed between any two steps, the registry is whole, and the next command does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .crash import OPERATIONS

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_step(tmp_path: Path, operation: str) -> None:
    """Every write, flush and rename of the operation is died at once; nothing is ever found wrong.

    A process of its own does it, so that what is forked is small and has no threads.
    """
    done = subprocess.run(
        [sys.executable, "-m", "registry.crash", str(tmp_path), operation],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *findings, deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert findings == []
    assert deaths["deaths"] >= 15, "an operation has many steps; else none of them were counted"

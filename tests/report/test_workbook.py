"""The workbook's own snippets of phases 4.2 and 4.3 run unchanged on our report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKBOOK = Path(__file__).resolve().parents[2].parent / "shared" / "workbook.md"


def snippet(task: str) -> str:
    """The shell block under ``#### Task <task>`` that starts with ``python -c``."""
    part = WORKBOOK.read_text(encoding="utf-8").split(f"#### Task {task}:")[1]
    found = re.search(r"```bash\n(python -c .*?)```", part, flags=re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.skipif(not WORKBOOK.is_file(), reason="the workbook is not beside this checkout")
@pytest.mark.parametrize(
    ("task", "expected"),
    [("4.2", ["Base Model:", "Format Compliance: 100.0%", "score_delta"]), ("4.3", ["Sample 3"])],
)
def test_snippets_run_unchanged(finish, task: str, expected: list[str]) -> None:
    """Typed into a shell beside ``./evaluation/comparison_report.json``, they print the results."""
    finished = finish()
    folder = finished.folder / "evaluation"
    folder.mkdir()
    (folder / "comparison_report.json").write_text(json.dumps(finished.report), encoding="utf-8")
    # A ``python`` that is this one, as in an activated environment.
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", snippet(task)],
        cwd=finished.folder,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for told in expected:
        assert told in done.stdout

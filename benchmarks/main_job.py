"""The main job on the sample as a user types it: a whole process, in an empty folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import measure


def run(repeats: int) -> dict[str, Any]:
    """Time ``python -m mondrian_ft``: all of it, and its evaluation, as ``run.json`` has them.

    Nothing is cached at first, the rendered photographs neither: what a fresh machine waits for.
    """
    whole, evaluation, memory = [], [], []
    n, arms = 0, []
    for _ in range(repeats):
        with TemporaryDirectory() as folder:
            env = {**os.environ, "XDG_CACHE_HOME": folder, "WANDB_MODE": "disabled"}
            argv = [sys.executable, "-m", "mondrian_ft", "tracking=none"]
            done = measure.process(argv, cwd=Path(folder), env=env)
            (written,) = Path(folder).glob("outputs/sample/*/run.json")
            evaluation.append(float(json.loads(written.read_text())["evaluation_seconds"]))
            report = json.loads(
                (written.parent / "evaluation" / "comparison_report.json").read_text()
            )
            n, arms = report["evidence"]["n"], list(report["evidence"]["arms"])
        whole.append(done.seconds)
        memory.append(done.memory)
        print(f"main job {done.seconds:.1f} s, its evaluation {evaluation[-1]:.1f} s", flush=True)
    return {
        "what": f"the main job on the sample; its evaluation of {n} rows, arms {', '.join(arms)}",
        "seconds": {"whole": measure.spread(whole, 1), "evaluation": measure.spread(evaluation, 1)},
        "peak_gb": measure.spread(memory, 2),
    }

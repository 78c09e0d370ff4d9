"""What a job of a sweep finds when it starts: nothing of the job before it.

Numbers need nothing of this: every random draw is seeded by its job. It is about memory, and what
is said of it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

TRIAL = "trial.json"
"""In a job's folder: the study that it is a trial of."""

def slate() -> None:
    """Let go of the last job's memory."""
    gc.collect()
    if "mlx.core" in sys.modules:
        from ..model.backend import mx

        mx.clear_cache()
        # It is written down as the most since the run began.
        mx.reset_peak_memory()


def trial(folder: Path) -> Callable[[float | None, int, int], None] | None:
    """Where a trial of a search reports to; None for a job of a grid."""
    path = folder / TRIAL
    if not path.is_file():
        return None
    from .study import Reporter

    return Reporter(**json.loads(path.read_text(encoding="utf-8")))

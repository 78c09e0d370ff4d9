"""What a job of a sweep finds when it starts: nothing of the job before it.

Numbers need nothing of this: every random draw is seeded by its job. It is about memory, and what
is said of it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TRIAL = "trial.json"
"""In a job's folder: the study that it is a trial of."""


@contextmanager
def slate(words: Sequence[str]) -> Iterator[None]:
    """Let go of the last job's memory, and let the command line be the job's own.

    What a run prints to be typed next, and writes down as where it came from, is then about this
    job and not about the sweep.

    Args:
        words: the job's overrides.
    """
    gc.collect()
    if "mlx.core" in sys.modules:
        from ..model.backend import mx

        mx.clear_cache()
        # It is written down as the most since the run began.
        mx.reset_peak_memory()
    before = sys.argv
    flags = [word for word in before[1:] if word.startswith("--config-")]
    sys.argv = [before[0], *flags, *lone(words)]
    try:
        yield
    finally:
        sys.argv = before


def lone(words: Sequence[str]) -> list[str]:
    """A job's overrides as they run it alone: a preset's own mode would sweep again."""
    preset = any(word.startswith("+sweep=") for word in words)
    return [*words, "hydra.mode=RUN"] if preset else list(words)


def trial(folder: Path) -> Callable[[float | None, int, int], None] | None:
    """Where a trial of a search reports to; None for a job of a grid."""
    path = folder / TRIAL
    if not path.is_file():
        return None
    from .study import Reporter

    return Reporter(**json.loads(path.read_text(encoding="utf-8")))

"""What tracking takes of a training step: the time it holds the loop, and all it slows it by.

W&B offline and the log file together, as a run has them, against no tracking at all. The loops
alternate in short blocks, so that a busy machine is busy for both.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 25
"""Steps of a block."""
FAST = 0.047
"""Seconds of a step of the made-up loop: the least that one of a 4B model can take on an H200."""
NAMES = (
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "trained_tokens_per_second",
    "trained_tokens",
    "data_wait_seconds",
    "peak_memory_gb",
    "seconds",
    "bad_steps",
    "token_accuracy",
    "padding_share",
    "eta_seconds",
)
"""What an update logs."""


def run(repeats: int) -> dict[str, Any]:
    """Measure a step of the sample model and one of the made-up loop."""
    from .pieces import _lora_step

    _, inputs, loss_of = _lora_step()
    loops: dict[str, tuple[Callable[[], object], int]] = {
        "sample model, LoRA step of 2 rows": (lambda: loss_of(inputs), BLOCK // 8),
        f"made-up step of {1000 * FAST:.0f} ms": (lambda: time.sleep(FAST), BLOCK),
    }
    found = {name: _loop(work, steps, repeats) for name, (work, steps) in loops.items()}
    for name, figures in found.items():
        print(
            f"{name}: {1000 * figures['step_seconds']:.1f} ms; held by tracking "
            f"{1e6 * figures['held_seconds']:.0f} us ({figures['held_share']:.2%}), slower by "
            f"{figures['slower']:+.2%}; W&B on the training thread would take "
            f"{1e6 * figures['wandb_log_seconds']:.0f} us"
        )
    return {"what": "training_log.jsonl and W&B offline, against no tracking", **found}


def _loop(work: Callable[[], object], steps: int, repeats: int) -> dict[str, float]:
    """Medians over blocks of ``steps``, tracked and not in turn."""
    from mondrian_ft.config import Config
    from mondrian_ft.run import Run
    from mondrian_ft.schema import TrackingMode
    from mondrian_ft.tasks import Link

    config = Config(task=Link())
    config.tracking.mode = TrackingMode.offline
    taken: dict[bool, list[float]] = {True: [], False: []}
    held: list[float] = []
    work()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Run.open(config, Path(folder) / "run") as opened,
    ):
        number = 0

        def log() -> None:
            nonlocal number
            number += 1
            opened.tracker.log(dict.fromkeys(NAMES, 1.0 / number), number)

        log()
        direct = _direct(Path(folder))
        # W&B is up once its file is there; what it takes to start is not a step's.
        while not list((opened.folder / "wandb").glob("*/files/requirements.txt")):
            time.sleep(0.05)
        for block in range(6 * repeats):
            # The order changes, so that neither is always the one after the other.
            for tracked in (True, False) if block % 2 else (False, True):
                for _ in range(steps):
                    started = time.perf_counter()
                    work()
                    if tracked:
                        before = time.perf_counter()
                        log()
                        held.append(time.perf_counter() - before)
                    taken[tracked].append(time.perf_counter() - started)
    plain = statistics.median(taken[False])
    return {
        "step_seconds": round(plain, 5),
        "held_seconds": round(statistics.median(held), 7),
        "held_share": round(statistics.median(held) / plain, 5),
        "held_share_mean": round(statistics.fmean(held) / plain, 5),
        "slower": round(statistics.median(taken[True]) / plain - 1, 5),
        "wandb_log_seconds": round(direct, 6),
        "steps": len(taken[True]),
    }


def _direct(folder: Path) -> float:
    """Seconds of W&B's own ``run.log``, as the training thread would wait for it."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", reinit="create_new")
    with wandb.init(mode="offline", dir=str(folder), project="p", settings=settings) as run:
        taken = []
        for number in range(100):
            started = time.perf_counter()
            run.log({f"train/{name}": 1.0 / (number + 1) for name in NAMES}, step=number)
            taken.append(time.perf_counter() - started)
            time.sleep(0.005)
    return statistics.median(taken)

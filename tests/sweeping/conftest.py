"""One folder that this folder's tests type their commands in, so that the sample is drawn once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = (
    "task=train",
    "tracking=none",
    "data.limit=12",
    "trainer.max_steps=3",
    "trainer.save_every=1",
    "optimizer.warmup_steps=1",
)
"""A training of seconds; ``model.path`` is added."""


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def typed(bench: Path, lab: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a training's command line there, in this process, and returns the exit code."""
    monkeypatch.chdir(bench)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_"))]:
        monkeypatch.delenv(name)

    def run(*words: str) -> int:
        from mondrian_ft import __main__ as entry

        path = f"model.path={lab.model_dir}"
        flags = [word for word in words if word.startswith("-")]
        rest = [word for word in words if not word.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["mondrian-ft", *flags, *TRAIN, path, *rest])
        return entry.main()

    return run

"""``trainer.resume=auto``: which run is gone on with, and which is not."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mondrian_ft.errors import TrainingError
from mondrian_ft.pipeline import resuming
from mondrian_ft.schema import Config, TrainerConfig
from mondrian_ft.training import lock
from mondrian_ft.training.checkpoint import CheckpointDir

OTHER: dict[str, Any] = {"lora.rank": 8}
MINE = {"lora.rank": 16, "data lock": "abc", "base weights": "def"}


@dataclass
class FakeRun:
    """A run's folder and what it tells."""

    folder: Path
    group: str | None = None
    warnings: list[str] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(file=io.StringIO(), width=300))

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


class Runs:
    """Earlier runs below a folder, each newer than the one before."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.clock = 1_700_000_000

    def earlier(self, name: str, *steps: int, finished: bool = False, **changes: Any) -> Path:
        """A run with checkpoints at these steps; its adapter directory."""
        adapter = self.outputs / name / "adapter"
        adapter.mkdir(parents=True)
        for step in steps:
            folder = adapter / "checkpoints" / f"step_{step:06d}"
            folder.mkdir(parents=True)
            for file in ("adapter.safetensors", "optimizer.safetensors"):
                (folder / file).touch()
            identity = MINE | {name.replace("_", " "): value for name, value in changes.items()}
            (folder / "state.json").write_text(json.dumps({"identity": identity, "state": {}}))
            self.clock += 60
            os.utime(folder, (self.clock, self.clock))
        if finished:
            (adapter / "manifest.json").write_text("{}")
        return adapter

    def found(self, run: FakeRun, resume: str = "auto", *, named: bool = False) -> Path | None:
        """What a new run goes on from."""
        config = Config(trainer=TrainerConfig(resume=resume))
        folder = run.folder / "adapter"
        checkpoints = CheckpointDir(folder / "checkpoints", MINE)
        fake: Any = run
        return resuming.checkpoint(config, fake, checkpoints, folder, named=named)


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "outputs" / "ansel_v1")


@pytest.fixture
def run(runs) -> FakeRun:
    return FakeRun(runs.outputs / "new")


def test_the_newest_unfinished_run_of_the_same_identity(runs, run) -> None:
    """Its newest whole checkpoint; a half one, and an older run, are passed over."""
    runs.earlier("old", 10)
    wanted = runs.earlier("newer", 4, 6)
    (wanted / "checkpoints" / "step_000008").mkdir()
    assert runs.found(run) == wanted / "checkpoints" / "step_000006"
    assert run.warnings == []


def test_nothing_before_is_a_fresh_start(runs, run) -> None:
    """Also where a run was killed before its first checkpoint."""
    assert runs.found(run) is None
    runs.earlier("killed at once")
    assert runs.found(run) is None


def test_a_finished_run_is_not_trained_again_from_its_middle(runs, run) -> None:
    """It says so; an unfinished one from before it was gone on with or given up."""
    runs.earlier("stopped", 4)
    runs.earlier("went_on", 4, 8, finished=True)
    assert runs.found(run) is None
    assert "went_on/adapter is finished" in run.console.file.getvalue()  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora.rank": 8}, "lora.rank was 8 and is 16"),
        ({"data_lock": "xyz"}, "data lock was 'xyz' and is 'abc'"),
        ({"base_weights": "uvw"}, "base weights was 'uvw' and is 'def'"),
    ],
)
def test_a_changed_config_lock_or_base_is_refused(runs, run, changes, told) -> None:
    """Naming the run, what differs, and the way to start afresh."""
    other = runs.earlier("other", 4, **changes)
    with pytest.raises(TrainingError) as caught:
        runs.found(run)
    message = str(caught.value)
    assert told in message
    assert str(other / "checkpoints" / "step_000004") in message
    assert "trainer.resume=never" in message
    assert runs.found(run, "never") is None


def test_another_recipe_that_was_finished_since_does_not_stand_in_the_way(runs, run) -> None:
    """Nor does an unfinished one from before the one that is meant."""
    runs.earlier("given up", 4, **OTHER)
    wanted = runs.earlier("meant", 4)
    runs.earlier("other", 4, finished=True, **{"lora.rank": 4})
    assert runs.found(run) == wanted / "checkpoints" / "step_000004"


def test_a_run_that_is_still_alive_is_left_alone(runs, run) -> None:
    """Two processes would otherwise train the same from there on."""
    alive = runs.earlier("alive", 4)
    with lock.held(alive, print), pytest.raises(TrainingError, match="still being trained by"):
        runs.found(run)
    assert runs.found(run) == alive / "checkpoints" / "step_000004"


def test_a_checkpoint_that_cannot_be_read_is_named(runs, run) -> None:
    """And the run before it is gone on with."""
    wanted = runs.earlier("whole", 2)
    damaged = runs.earlier("damaged", 4)
    (damaged / "checkpoints" / "step_000004" / "state.json").write_text("{")
    assert runs.found(run) == wanted / "checkpoints" / "step_000002"
    (warning,) = run.warnings
    assert "step_000004 cannot be read" in warning


def test_a_folder_that_was_named_is_the_only_one(runs, run) -> None:
    """With task.output_dir nothing else is looked at."""
    runs.earlier("other", 4)
    assert runs.found(run, named=True) is None
    own = runs.earlier("new", 6)
    assert runs.found(run, named=True) == own / "checkpoints" / "step_000006"


def test_jobs_of_a_sweep_and_repeats_find_their_own(tmp_path) -> None:
    """Jobs differ by design, so another one is passed over, not refused."""
    sweeps = Runs(tmp_path / "sweeps")
    wanted = sweeps.earlier("monday/1", 4)
    sweeps.earlier("monday/0", 4, **OTHER)
    found = sweeps.found(FakeRun(tmp_path / "sweeps/tuesday/0", "sweeps/tuesday"))
    assert found == wanted / "checkpoints" / "step_000004"
    repeats = Runs(tmp_path / "outputs" / "ansel_v1")
    wanted = repeats.earlier("monday/repeats/fold1", 4)
    repeats.earlier("monday/repeats/fold2", 4, data_lock="xyz")
    run = FakeRun(tmp_path / "outputs/ansel_v1/tuesday/repeats/fold1", "ansel_v1/tuesday")
    assert repeats.found(run) == wanted / "checkpoints" / "step_000004"

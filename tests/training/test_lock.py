"""One process trains into a folder at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mondrian_ft.errors import TrainingError
from mondrian_ft.training import lock

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_one_is_refused(tmp_path) -> None:
    """It says who, since when, and what to do; afterwards the folder is free."""
    folder = tmp_path / "adapter"
    told: list[str] = []
    with lock.held(folder, told.append):
        with pytest.raises(TrainingError) as caught, lock.held(folder, told.append):
            pass
        assert lock.holder(folder) is not None
        (folder / "something").touch()
    message = str(caught.value)
    assert f"{folder} is being trained into by process " in message
    assert " since 20" in message
    assert "task.output_dir" in message
    assert "\n" not in message
    assert lock.holder(folder) is None
    with lock.held(folder, told.append):
        pass
    assert [path.name for path in folder.iterdir()] == ["something"]
    assert told == []


def test_a_folder_nothing_came_of_is_gone_again(tmp_path) -> None:
    """A run that was refused before it wrote anything leaves no empty folder."""
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "adapter", print):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path) -> None:
    """With a sentence that says whose it was: it may have left more than a lock behind."""
    code = (
        "import os, signal, sys; from pathlib import Path; from mondrian_ft.training import lock\n"
        "with lock.held(Path(sys.argv[1]), print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert dead.wait(60) == -9
    assert (tmp_path / lock.NAME).is_file()
    assert lock.holder(tmp_path) is None
    told: list[str] = []
    with lock.held(tmp_path, told.append):
        assert lock.holder(tmp_path) is not None
    (sentence,) = told
    assert f"process {dead.pid} on " in sentence
    assert "taken over" in sentence


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path) -> None:
    """A file in its place."""
    (tmp_path / "adapter").touch()
    with (
        pytest.raises(TrainingError, match="choose a folder you may write to"),
        lock.held(tmp_path / "adapter", print),
    ):
        pass

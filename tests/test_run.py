"""A run folder always tells what became of the run, however it ended."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft import __version__, files
from mondrian_ft.config import Config, config_hash
from mondrian_ft.errors import Interrupted, MondrianError
from mondrian_ft.run import Run, provenance
from mondrian_ft.schema import TrackingMode
from mondrian_ft.tasks import Link


@pytest.fixture
def config() -> Config:
    config = Config(task=Link())
    config.tracking.mode = TrackingMode.disabled
    return config


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_that_ends_well(tmp_path: Path, config: Config) -> None:
    """run.json says running from the first moment, and done with everything recorded at the end."""
    with Run.open(config, tmp_path) as run:
        assert state(tmp_path)["status"] == "running"
        assert run.folder == tmp_path
        run.record(linked=60, adapter="x")
        assert state(tmp_path)["linked"] == 60
    after = state(tmp_path)
    assert after["status"] == "done"
    assert after["adapter"] == "x"
    assert after["seconds"] >= 0
    assert after["started"] <= after["ended"]
    assert after["config_hash"] == run.config_hash == config_hash(config)
    assert after["config"]["task"] == {"name": "link"}
    assert after["config"]["lora"]["rank"] == 16


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (MondrianError("the database is empty."), "failed", "the database is empty."),
        (ValueError("odd"), "failed", "ValueError: odd"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (Interrupted("resume with x"), "interrupted", "resume with x"),
    ],
)
def test_a_run_that_does_not(
    tmp_path: Path, config: Config, error: BaseException, status: str, sentence: str
) -> None:
    """The error goes on to the caller, and its sentence stays in the folder."""
    with pytest.raises(type(error)), Run.open(config, tmp_path):
        raise error
    after = state(tmp_path)
    assert (after["status"], after["error"]) == (status, sentence)
    # Only what nobody foresaw leaves a traceback, and it leaves it in a file.
    foreseen = not isinstance(error, ValueError)
    assert (tmp_path / "traceback.txt").exists() != foreseen
    if not foreseen:
        assert "ValueError: odd" in (tmp_path / "traceback.txt").read_text()


def test_a_run_whose_reader_ends_says_so(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx.launch was stopped, and run.json said "SystemExit: 1"."""
    with Path(os.devnull).open("w") as elsewhere:

        class Unread(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")

            def fileno(self) -> int:
                return elsewhere.fileno()

        monkeypatch.setattr("sys.stdout", Unread())
        with pytest.raises(SystemExit), Run.open(config, tmp_path / "run") as run:
            run.console.print("update 1/4")
        monkeypatch.undo()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["error"].startswith("what read this program's output has ended, mlx.launch or a")
    assert not (tmp_path / "run" / "traceback.txt").exists()


def test_the_tracker_is_closed_however_the_run_ends(tmp_path: Path, config: Config) -> None:
    """An open W&B run would swallow the next job of a sweep."""
    closed = []
    with pytest.raises(ValueError, match="odd"), Run.open(config, tmp_path) as run:
        run.tracker.close = lambda ok: closed.append(ok)  # type: ignore[method-assign]
        raise ValueError("odd")
    assert closed == [False]


def test_warn_shows_and_keeps(tmp_path: Path, config: Config, capsys: Any) -> None:
    """A warning is on standard error, as it was written, and in run.json."""
    sentence = "warm-up is 100 updates, the run has 24 [bold]: the peak rate is 4.8e-05."
    with Run.open(config, tmp_path) as run:
        run.warn(sentence)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"warning: {sentence}\n"
    assert state(tmp_path)["warnings"] == [sentence]


def test_run_json_keeps_its_own_names(tmp_path: Path, config: Config) -> None:
    """A recorded fact cannot overwrite the status."""
    with Run.open(config, tmp_path) as run, pytest.raises(ValueError, match="status"):
        run.record(status="done", other=1)
    assert "other" not in state(tmp_path)


def test_without_a_folder_it_makes_one(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook needs neither Hydra nor a folder."""
    monkeypatch.chdir(tmp_path)
    with Run.open(config) as first, Run.open(config) as second:
        assert first.folder != second.folder
        assert first.folder.parent == tmp_path / "outputs" / "sample"
        assert first.folder.is_absolute()


def test_sigterm_is_an_interrupt_inside_and_what_it_was_outside(
    tmp_path: Path, config: Config
) -> None:
    """Being asked to stop leaves the same things behind as Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Run.open(config, tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert state(tmp_path)["status"] == "interrupted"


def test_a_run_in_a_thread(tmp_path: Path, config: Config) -> None:
    """Only the main thread may set signals; a run elsewhere does without."""
    statuses = []

    def work() -> None:
        with Run.open(config, tmp_path):
            pass
        statuses.append(state(tmp_path)["status"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == ["done"]


def test_a_full_disk_at_the_end_does_not_hide_the_first_error(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If run.json cannot be closed either, the person still reads what went wrong first."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ValueError, match="first"), Run.open(config, tmp_path):
        monkeypatch.setattr(files.os, "replace", full)
        raise ValueError("first")
    monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err
    assert state(tmp_path)["status"] == "running"


def test_provenance_repeats_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, command and commit are there, and nothing was imported to find them."""
    monkeypatch.setattr("sys.argv", ["mondrian-ft", "lora.rank=8"])
    facts = provenance()
    assert facts["argv"] == ["mondrian-ft", "lora.rank=8"]
    assert facts["versions"]["mondrian_ft"] == __version__
    assert {"mlx", "mlx-vlm", "mlx-lm", "transformers", "numpy"} <= set(facts["versions"])
    assert facts["git"] is None or set(facts["git"]) == {"commit", "dirty"}

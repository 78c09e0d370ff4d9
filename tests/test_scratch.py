"""What a process writes for itself goes with it, also if it is killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from mondrian_ft import scratch

WAITS = """
from mondrian_ft import scratch
with scratch.folder() as folder:
    (folder / "run").mkdir()
    (folder / "run/row.json").write_text("{}")
    print(folder, flush=True)
    input()
"""


def start() -> tuple[subprocess.Popen[str], Path]:
    """A process that waits in a folder of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folders_of_killed_processes_go_with_the_next(tmp_path, monkeypatch) -> None:
    """Nothing took them away before; one held rendered photographs and prepared rows."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (killed, left), (lives, held) = start(), start()
    with killed, lives:
        killed.kill()
        killed.wait(30)
        assert {*tmp_path.iterdir()} == {left, held}
        with scratch.folder() as own:
            assert {*tmp_path.iterdir()} == {held, own}
            assert (held / "run/row.json").is_file()
        assert {*tmp_path.iterdir()} == {held}
        lives.communicate("\n", timeout=30)
        assert lives.returncode == 0
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch) -> None:
    """A link, and a folder that is only just being made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (tmp_path / "mondrian_ft-process-link").symlink_to(elsewhere)
    (tmp_path / "mondrian_ft-process-new").mkdir()
    before = {*tmp_path.rglob("*")}
    with scratch.folder():
        pass
    assert {*tmp_path.rglob("*")} == before

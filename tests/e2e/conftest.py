"""What the end-to-end tests share: the command line as a user types it, and one trained run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .world import World, make_world

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TEST_ALL = os.environ.get("MONDRIAN_FT_TEST_ALL") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is slow: each waits for processes of its own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


def environment(**more: str) -> dict[str, str]:
    """The tester's environment without what would change a run; ``python`` is this very one."""
    foreign = ("WANDB_", "HYDRA_", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": path, **more}


def typed(*argv: str) -> list[str]:
    """The command line of ``python -m mondrian_ft`` with these words after it."""
    return [sys.executable, "-m", "mondrian_ft", *argv]


def command(
    *argv: str, cwd: Path, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m mondrian_ft`` in ``cwd`` and waits for it."""
    return subprocess.run(
        typed(*argv),
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        **options,
    )


def succeed(*argv: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command that must end well."""
    done = command(*argv, cwd=cwd, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one sentence a command failed with; nothing else may be on standard error but warnings.

    Checks the exit code, that there is no traceback, and that ``run.json`` was not left running.
    """
    assert done.returncode == code, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert "Traceback" not in done.stdout + done.stderr
    assert len(told) == 1, done.stderr
    assert told[0].startswith("error: "), told[0]
    assert "fault of the program" not in told[0], told[0]
    return told[0].removeprefix("error: ")


def read_json(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_folders(cwd: Path) -> list[Path]:
    """The run folders below ``cwd/outputs``, oldest first."""
    return sorted(
        (path.parent for path in (cwd / "outputs").rglob("run.json")), key=lambda path: path.name
    )


@dataclass(frozen=True)
class Finished:
    """A finished run: where it was typed, its run folder, and what it printed."""

    cwd: Path
    folder: Path
    stdout: str
    stderr: str

    @property
    def adapter(self) -> Path:
        """The adapter directory at its default place."""
        return self.folder / "adapter"

    @property
    def report(self) -> dict[str, Any]:
        """The comparison."""
        return read_json(self.folder / "evaluation" / "comparison_report.json")

    @property
    def facts(self) -> dict[str, Any]:
        """``run.json``."""
        return read_json(self.folder / "run.json")

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The prepared rows of a part."""
        return read_json(self.folder / "data" / f"training_data_ansel_{part}.json")


def finished(cwd: Path, *argv: str) -> Finished:
    """Runs a command in ``cwd`` that must end well and is the last run there."""
    done = succeed(*argv, cwd=cwd)
    return Finished(cwd, run_folders(cwd)[-1], done.stdout, done.stderr)


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The main job as it is typed first, in an empty folder, with W&B writing to disk."""
    return finished(tmp_path_factory.mktemp("sample"), "tracking.mode=offline")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder beside the checkout; a user's clone has none."""
    if not SHARED.is_dir():
        (pytest.fail if TEST_ALL else pytest.skip)(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def sample_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered sample's ``mondrian`` folder, to take photographs and rows from."""
    from mondrian_ft.sample import sample_data

    return sample_data(0, tmp_path_factory.mktemp("rendered")).db_path.parent


@pytest.fixture
def world(sample_files: Path, tmp_path: Path) -> World:
    """Ten good rows at the workbook's paths below an empty folder, for a test to break."""
    return make_world(sample_files, tmp_path, rows=10)

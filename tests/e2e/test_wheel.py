"""The built wheel, alone in an empty environment, does everything from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, read_json, run_folders

pytestmark = pytest.mark.full

SHORT = ("trainer.max_steps=2", "eval.max_examples=1", "eval.max_tokens=16", "tracking=none")


def call(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program with nothing of this checkout in its environment; it must end well."""
    foreign = ("PYTHONPATH", "WANDB_", "HYDRA_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder)
    call(*pip, ROOT, cwd=folder)
    (built,) = folder.glob("mondrian_ft-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that holds the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    binaries = folder / "venv" / "bin"
    # On macOS the package needs no backend of its own.
    what = f"{wheel}[cpu]" if sys.platform == "linux" else str(wheel)
    pip = (binaries / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    call(*pip, what, cwd=folder)
    return binaries


def test_contents(wheel: Path) -> None:
    """The configs, the sample model and the templates are inside; tests and outputs are not."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"mondrian_ft/{name}" for name in configs} <= names
    assert "mondrian_ft/sample/weights/model.safetensors" in names
    assert "hydra_plugins/mondrian_ft_sweepers.py" in names
    assert "hydra_plugins/__init__.py" not in names, "other packages' plugins would be hidden"
    assert not [name for name in names if name.startswith(("tests/", "outputs/", "benchmarks/"))]
    assert wheel.stat().st_size < 13_000_000


def test_console_script(installed: Path, tmp_path: Path) -> None:
    """``mondrian-ft`` runs the sample from an empty folder, and tells commands that it can run."""
    assert "task=" in call(installed / "mondrian-ft", "--help", cwd=tmp_path).stdout
    done = call(installed / "mondrian-ft", *SHORT, cwd=tmp_path)
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "run.json")["status"] == "done"
    assert (folder / "report.html").is_file()
    assert f"  {installed / 'mondrian-ft'} task=export" in done.stdout


def test_sweep(installed: Path, tmp_path: Path) -> None:
    """Hydra finds our sweepers in the wheel: ``-m`` ends in a ranking."""
    done = call(installed / "mondrian-ft", "-m", "task=link", "tracking=none", cwd=tmp_path)
    assert "1 job: 1 done." in done.stdout
    (folder,) = run_folders(tmp_path)
    assert (folder.parent / "sweep.json").is_file()


def test_module(installed: Path, tmp_path: Path) -> None:
    """``python -m mondrian_ft`` does the same, with an experiment out of the wheel."""
    argv = ("-m", "mondrian_ft", "+experiment=ansel_v1", "model=sample", "data=sample", *SHORT)
    call(installed / "python", *argv, cwd=tmp_path)
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "run.json")["experiment"] == "ansel_v1"

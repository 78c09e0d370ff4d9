"""Sweeps as a user types them, killed, shared, and sent through other launchers."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from .conftest import environment, succeed, typed

pytestmark = [pytest.mark.full]

TRAIN = (
    "task=train",
    "tracking=none",
    "data.limit=12",
    "trainer.max_steps=4",
    "trainer.eval_every=1",
    "trainer.save_every=1",
    "optimizer.warmup_steps=2",
)
GRID = ("-m", *TRAIN, "lora.rank=4,8", "lora.dropout=0.0,0.1")


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """One thread for each process's products: joblib gives its processes fewer of them than a lone
    one takes, which changes the last digits of a validation loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield


def weights(folder: Path) -> str:
    return sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def pages(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def killed_when(words: tuple[str, ...], cwd: Path, ready: Callable[[], bool]) -> None:
    """Starts a command and kills it, as the operating system would, once something is there."""
    with subprocess.Popen(
        typed(*words),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        end = time.monotonic() + 600
        while not ready() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert child.poll() is None, "it ended before it could be killed"
        child.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(threads: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A 2 x 2 grid on the sample, killed in its second job and started again by the same command:
    where it was typed, the sweep's folder, and what the second start printed."""
    place = tmp_path_factory.mktemp("grid")
    sweeps = place / "outputs" / "sweeps"
    killed_when(GRID, place, lambda: any(sweeps.glob("*/1/adapter/checkpoints/step_000002")))
    (folder,) = sweeps.iterdir()
    first = (folder / "0" / "run.json").read_bytes()
    assert json.loads((folder / "1" / "run.json").read_text())["status"] == "running"
    done = succeed(*GRID, cwd=place)
    assert (folder / "0" / "run.json").read_bytes() == first
    assert [folder] == list(sweeps.iterdir())
    return place, folder, done.stdout + done.stderr


def test_a_killed_grid_runs_what_is_missing(killed: tuple[Path, Path, str]) -> None:
    """Done when: a 2 x 2 grid, killed half way and started again, runs exactly the missing jobs and
    prints the ranking; each job's adapter is the lone run's, byte by byte."""
    place, folder, printed = killed
    started = [line.split(":")[0] for line in printed.splitlines() if line.startswith("job ")]
    assert started == ["job 1", "job 2", "job 3"]
    assert "1 of 4 jobs are done" in printed
    assert "Resumed after update 2." in printed
    content = pages(folder)
    assert content["status"] == "done"
    assert len(content["ranking"]) == 4
    for name, job in {job["job"]: job for job in content["jobs"]}.items():
        rank, dropout = job["settings"]["lora.rank"], job["settings"]["lora.dropout"]
        succeed(
            *TRAIN,
            f"lora.rank={rank}",
            f"lora.dropout={dropout}",
            f"hydra.run.dir=alone/{name}",
            cwd=place,
        )
        assert weights(place / "alone" / name) == weights(folder / name)
        facts = json.loads((place / "alone" / name / "run.json").read_text())
        assert facts["adapter"]["hash"] == job["adapter"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_give_the_same(killed: tuple[Path, Path, str], launcher: str) -> None:
    """Done when: joblib and submitit's local executor run the same grid with equal results."""
    place, folder, _ = killed
    more = (f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}")
    slots = ("hydra.launcher.n_jobs=2",) if launcher == "joblib" else ()
    succeed(*GRID, *more, *slots, cwd=place)
    mine, theirs = pages(place / launcher), pages(folder)
    assert mine["ranking"] == theirs["ranking"]
    facts = ("job", "settings", "value", "adapter", "data_lock", "identity")
    assert [{key: job[key] for key in facts} for job in mine["jobs"]] == [
        {key: job[key] for key in facts} for job in theirs["jobs"]
    ]
    for name in "0123":
        assert weights(place / launcher / name) == weights(folder / name)


@pytest.mark.parametrize("pruner", ["promote", "median"])
def test_a_search_is_killed_shared_and_right(tmp_path: Path, pruner: str) -> None:
    """Done when: a search is killed and resumed, two processes share its study, it prunes a trial
    for a reason it tells, and returns the best config of the whole grid."""
    # Rates whose curves do not cross: which is best shows at the first evaluation.
    space = ("lora.rank=4,8", "optimizer.learning_rate=1e-5,1e-4,1e-3")
    succeed("-m", *TRAIN, *space, "hydra.sweep.dir=grid", cwd=tmp_path)
    grid = pages(tmp_path / "grid")
    best = next(job for job in grid["jobs"] if job["job"] == grid["best"])
    study = tmp_path / "study"
    search = (
        "-m",
        *TRAIN,
        *space,
        "hydra/sweeper=optuna",
        f"hydra.sweep.dir={study}",
        f"hydra.sweeper.pruner={pruner}",
        "hydra.sweeper.keep_fraction=0.4",
        "hydra.sweeper.n_trials=24",
        "hydra.sweeper.n_startup_trials=2",
        "hydra.sweeper.candidates=0",
    )
    killed_when(search, tmp_path, lambda: any(study.glob("[1-9]*/adapter/checkpoints/step_000002")))
    left = [path.parent.name for path in study.glob("*/run.json") if "running" in path.read_text()]
    assert len(left) == 1
    both = [
        subprocess.Popen(
            typed(*search),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [one.communicate(timeout=900)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], printed
    assert sum(f"trial {left[0]} was left by its process" in each for each in printed) == 1
    content = pages(study)
    pruned = [job for job in content["jobs"] if job["status"] == "pruned"]
    went_on = [job for job in pruned if job["error"].startswith("went on as trial")]
    assert len(content["jobs"]) == 24 + len(went_on)
    reasons = {
        "median": ("the median of the",),
        "promote": ("there, and of ", "waits for others", "went on as trial"),
    }
    assert len(pruned) > len(went_on)
    assert all(any(one in job["error"] for one in reasons[pruner]) for job in pruned)
    chosen = next(job for job in content["jobs"] if job["job"] == content["best"])
    assert chosen["settings"] == best["settings"]
    assert chosen["value"] == best["value"]
    assert chosen["adapter"] == best["adapter"]

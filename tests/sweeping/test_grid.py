"""A grid: each job as if alone, nothing twice, nothing stopped by another, all of it ranked."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.errors import ConfigError
from mondrian_ft.schema import Config
from mondrian_ft.sweeping import book
from mondrian_ft.sweeping.jobs import Job, Outcome, differing
from mondrian_ft.training import lock

Typed = Callable[..., int]
GRID = ("-m", "lora.rank=2,4", "lora.dropout=0.0,0.2")


def weights(folder: Path) -> str:
    return sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def pages(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def edit(folder: Path, **facts: Any) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.fixture
def sweep(typed: Typed, bench: Path) -> Path:
    """A 2 x 2 grid that was run once for all tests, in a copy."""
    kept = bench / "kept"
    if not kept.exists():
        assert typed(*GRID) == 0
        (made,) = (bench / "outputs" / "sweeps").iterdir()
        shutil.copytree(made, kept)
    (made,) = [path for path in (bench / "outputs" / "sweeps").iterdir() if path.name[0] == "2"]
    shutil.rmtree(made)
    shutil.copytree(kept, made)
    return made


def test_a_job_gives_what_it_gives_alone(sweep: Path, typed: Typed, bench: Path) -> None:
    """Promise: the first and the last job of a sweep, dropout on or off, give the very bytes of a
    lone run; the last one follows three others in its process."""
    for name, rank, dropout in (("0", 2, 0.0), ("3", 4, 0.2)):
        words = (f"lora.rank={rank}", f"lora.dropout={dropout}", f"hydra.run.dir=alone-{name}")
        assert typed(*words) == 0
        assert weights(bench / f"alone-{name}") == weights(sweep / name)
    assert len({weights(sweep / name) for name in "0123"}) == 4


def test_the_ranking_is_printed_and_kept(sweep: Path, typed: Typed, capsys: Any) -> None:
    """Promise: best first, with the keys that differ and no others; and the same as JSON. All jobs
    being done, none is run again: the folder is found by what the command asks for."""
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*/run.json")}
    assert typed(*GRID) == 0
    out = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*/run.json")} == before
    assert "4 of 4 jobs are done" in out
    content = pages(sweep)
    assert content["keys"] == ["lora.rank", "lora.dropout"]
    assert content["metric"] == "val_loss"
    values = {job["job"]: job["value"] for job in content["jobs"]}
    assert content["ranking"] == sorted(values, key=lambda name: values[name])
    assert content["best"] == content["ranking"][0]
    rows = [line.split() for line in out.splitlines() if line.strip().endswith("done earlier")]
    assert [row[1] for row in rows] == content["ranking"]
    assert f"{min(values.values()):.4f}" in " ".join(rows[0])
    for job in content["jobs"]:
        facts = json.loads((sweep / job["job"] / "run.json").read_text())
        assert job["adapter"] == facts["adapter"]["hash"]
        assert facts["training"]["val_loss"] == job["value"]


@pytest.mark.parametrize("name", ["ranks", "two ranks, a=b"])
def test_the_command_that_compares_the_jobs_does_it(
    sweep: Path, typed: Typed, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also in a folder whose name means something to Hydra and to the shell. What was put aside
    when a job was run again was once compared as a run of its own."""
    from mondrian_ft import __main__ as entry
    from mondrian_ft.sweeping.screen import compared

    assert typed(*GRID) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line[:7] == "compare")
    folder = shutil.copytree(sweep, sweep.parent / name)
    shutil.copytree(folder / "0", folder / "unfinished" / "0-20261129-120000-000000")
    here = told.removeprefix("compare  ").replace(f"outputs/sweeps/{sweep.name}", "HERE")
    job: Any = None
    done = [Outcome(n, job, "done", 0.5, "val_loss", {"experiment": "sample"}) for n in "01"]
    words = shlex.split(compared(done, folder.relative_to(Path.cwd())) or "")
    assert shlex.split(here)[:-1] == words[:-1]
    monkeypatch.setattr(sys, "argv", ["mondrian-ft", *words[3:]])
    assert entry.main() == 0
    assert "Gathered 4 runs of sample." in capsys.readouterr().out
    assert compared(done[:1], folder) is None
    shutil.rmtree(folder)


def test_only_what_is_missing_runs_again(sweep: Path, typed: Typed, capsys: Any) -> None:
    """Promise: of a sweep that was killed, the job it was at goes on from its checkpoint, the one
    after it is run, and one whose data have changed is run again; the others stay."""
    hashes = {name: weights(sweep / name) for name in "0123"}
    # Killed in its third update, as the operating system would: nothing is closed.
    edit(sweep / "2", status="running")
    for name in ("adapter_model.safetensors", "manifest.json", "adapter_config.json"):
        (sweep / "2" / "adapter" / name).unlink()
    shutil.rmtree(sweep / "2" / "adapter" / "checkpoints" / "step_000003")
    shutil.rmtree(sweep / "3")
    edit(sweep / "1", data_lock="of other photographs")
    before = (sweep / "0" / "run.json").read_bytes()
    assert typed(*GRID) == 0
    told = capsys.readouterr()
    assert "1 of 4 jobs are done" in told.out
    assert "Resumed after update 2." in told.out
    assert "job 1 is run again: its data have changed" in told.err
    started = [line.split(":")[0] for line in told.err.splitlines() if line.startswith("job ")]
    assert started == ["job 1 is run again", "job 1", "job 2", "job 3"]
    assert (sweep / "0" / "run.json").read_bytes() == before
    assert {name: weights(sweep / name) for name in "0123"} == hashes
    assert [job["kept"] for job in pages(sweep)["jobs"]] == [True, False, False, False]


def test_a_larger_grid_keeps_the_smaller_ones_jobs(
    sweep: Path, typed: Typed, capsys: Any, bench: Path
) -> None:
    """Promise: in a chosen folder a job is known by what it is and not by its place in the grid."""
    shutil.copytree(sweep, bench / "mine")
    words = ("-m", "lora.rank=4", "lora.dropout=0.2,0.3", "hydra.sweep.dir=mine")
    assert typed(*words) == 0
    assert "1 of 2 jobs are done" in capsys.readouterr().out
    assert [job["job"] for job in pages(bench / "mine")["jobs"]] == ["3", "4"]


def test_a_job_that_fails_stops_nothing(
    typed: Typed, bench: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a value that does not validate, and a job that fails at work, are each told with
    their error in the table; the others run, and the exit code is the worst of them."""
    from mondrian_ft.errors import TrainingError
    from mondrian_ft.pipeline import training

    real = training.train

    def failing(config: Any, *rest: Any) -> Any:
        if config.lora.rank == 4:
            raise TrainingError("the disk is gone")
        return real(config, *rest)

    monkeypatch.setattr(training, "train", failing)
    assert typed("-m", "lora.rank=0,4,2", "hydra.sweep.dir=failing") == 2
    told = capsys.readouterr()
    assert "error: job 0: lora.rank is 0, but it must be 1 or more." in told.err
    assert "error: job 1: the disk is gone" in told.err
    assert told.err.endswith("error: 2 of 3 jobs failed; the others are done.\n")
    assert "3 jobs: 1 done, 2 failed." in told.out
    assert "failed: the disk is gone" in told.out
    jobs = pages(bench / "failing")["jobs"]
    assert [job["status"] for job in jobs] == ["failed", "failed", "done"]
    assert not (bench / "failing" / "0").exists()


def test_two_sweeps_do_not_share_a_folder(sweep: Path, typed: Typed, capsys: Any) -> None:
    """Promise: the second is refused, told who holds the folder and what to do; nothing is run."""
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*") if path.is_file()}
    with lock.held(sweep, print, name=book.LOCK, doing="swept into", key="hydra.sweep.dir"):
        assert typed(*GRID) == 1
    err = capsys.readouterr().err
    assert f"is being swept into by process {os.getpid()}" in err
    assert "choose another hydra.sweep.dir" in err
    after = {path: path.stat().st_mtime_ns for path in sweep.rglob("*") if path.is_file()}
    assert after == before


def test_a_read_only_disk_is_told(
    typed: Typed, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a folder that cannot be written is one sentence with the key that chooses another,
    before anything is trained."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).endswith(book.LOCK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert typed("-m", "lora.rank=2", "hydra.sweep.dir=readonly") == 1
    err = capsys.readouterr().err
    assert "Read-only file system; choose a folder you may write to with hydra.sweep.dir" in err
    assert err.count("\n") == 1


def test_jobs_are_numbered(typed: Typed, capsys: Any) -> None:
    """Promise: a folder's name of one's own, which would not be kept, is refused."""
    assert typed("-m", "lora.rank=2,4", "hydra.sweep.subdir=x${hydra.job.num}") == 2
    assert "hydra.sweep.subdir" in capsys.readouterr().err


def test_a_preset_is_a_sweep(typed: Typed, bench: Path, capsys: Any) -> None:
    """Promise: +sweep=NAME needs no -m, and a job's own command, which it prints, is no sweep."""
    words = ("+sweep=seeds", "trainer.seed=-1,1", "hydra.sweep.dir=preset", "trainer.max_steps=1")
    assert typed(*words, "optimizer.warmup_steps=0") == 2
    assert [job["status"] for job in pages(bench / "preset")["jobs"]] == ["failed", "done"]
    assert "trainer.seed is -1" in capsys.readouterr().err
    facts = json.loads((bench / "preset" / "1" / "run.json").read_text())
    assert facts["provenance"]["argv"][-1] == "hydra.mode=RUN"
    assert "trainer.seed=1" in facts["provenance"]["argv"]
    assert "+sweep=seeds" in facts["provenance"]["argv"]


def test_joblib_gives_the_same_bytes(sweep: Path, typed: Typed, bench: Path) -> None:
    """Promise: a job in a process of its own gives what it gives in the sweep's."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=joblib")
    assert typed("-m", "lora.rank=4", "lora.dropout=0.2", *words) == 0
    assert weights(bench / "joblib" / "0") == weights(sweep / "3")


def test_a_key_differs_where_one_of_two_values_is_wrong() -> None:
    """With the other job alone its column was left out, and nobody saw which job had which."""
    rate = f"optimizer.learning_rate={Config().optimizer.learning_rate:e}"
    good = Job(("lora.rank=16", rate), Config())
    bad = Job(("lora.rank=0", rate), None, ConfigError("lora.rank is 0"))
    assert differing([good, bad]) == ["lora.rank"]
    assert differing([good, good]) == []
    assert differing([bad]) == []

"""Several processes train one adapter from the command line: as one does, and never for ever."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import environment, read_json, refused, succeed
from .test_interrupt import TRAIN, WEIGHTS, Prepared, prepared

__all__ = ["prepared"]

pytestmark = pytest.mark.full
OPTIONS = (*TRAIN, "trainer.batch_size=2", "lora.dropout=0.0", "trainer.max_steps=4")
MLX = re.compile(
    r"(\[ring\]|Socket|was closed by the peer|(Sending to|Receiving from) socket|failed with errno"
    r"|Too many send/recv errors\. Failing pending tasks\.\.\.|\d+|\s)+"
)
"""What MLX's threads say of their connections. Each writes a piece at a time, so that a line of one
may hold pieces of another's, and lack its own ``[ring]``."""


@dataclass
class Ranks:
    """Processes that were started as one, each with its own command; what mlx.launch does."""

    processes: list[subprocess.Popen[str]]

    def end(self, rank: int, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """A process that has ended, and what it wrote."""
        process = self.processes[rank]
        out, err = process.communicate(timeout=seconds)
        err = "".join(line for line in err.splitlines(True) if not MLX.fullmatch(line))
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            with process:
                process.kill()


def start(cwd: Path, *commands: tuple[str, ...]) -> Ranks:
    """Start one process for each command."""
    sockets = [socket.socket() for _ in commands]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    listed = cwd / f"hosts-{time.monotonic_ns()}.json"
    listed.write_text(json.dumps(hosts))
    return Ranks(
        [
            subprocess.Popen(
                [sys.executable, "-m", "mondrian_ft", *words],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment() | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(listed)},
            )
            for rank, words in enumerate(commands)
        ]
    )


def wait_for(folder: Path, ranks: Ranks, seconds: float = 240) -> None:
    """Until a folder is there."""
    until = time.monotonic() + seconds
    while not folder.is_dir():
        assert ranks.processes[0].poll() is None, ranks.end(0)
        assert time.monotonic() < until, f"{folder} was not written in {seconds} s"
        time.sleep(0.05)


def equal(mine: Path, whole: Path) -> None:
    """Two adapters agree to float tolerance."""
    a, b = load_file(mine / WEIGHTS), load_file(whole / WEIGHTS)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.quantile(np.abs(value - b[name]), 0.99) < 1e-4, name


def test_two_processes_train_what_one_trains_and_go_on_after_a_kill(prepared: Prepared) -> None:
    """One is killed in the middle; the other says so at once, and how to go on."""
    cwd = prepared.cwd
    succeed(*OPTIONS, "task.output_dir=./models/alone", cwd=cwd)
    words = (*OPTIONS, "task.output_dir=./models/two", "trainer.save_every=1")
    ranks = start(cwd, words, words)
    try:
        wait_for(cwd / "models/two/checkpoints/step_000001", ranks)
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        told = refused(ranks.end(0))
    finally:
        ranks.kill()
    assert "another process of this run has failed or can no longer be reached" in told
    assert "go on with: mlx.launch -n 2 -- " in told
    runs = [read_json(path) for path in (cwd / "outputs").rglob("run.json")]
    mine = [run for run in runs if run.get("processes") == 2]
    assert [run["status"] for run in mine] == ["failed"]

    words = (*words, "trainer.resume=auto")
    ranks = start(cwd, words, words)
    try:
        first, second = ranks.end(0), ranks.end(1)
    finally:
        ranks.kill()
    assert first.returncode == 0, first.stderr
    assert "Resumed after update" in first.stdout
    # The second has nothing to say and writes nothing.
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    equal(cwd / "models/two", cwd / "models/alone")


def test_the_last_process_says_that_the_first_was_killed(prepared: Prepared) -> None:
    """Nobody else could: it ended without a word, and what it wrote says that it is running."""
    cwd = prepared.cwd
    words = (*OPTIONS, "task.output_dir=./models/first", "trainer.max_steps=200")
    words = (*words, "trainer.save_every=1")
    ranks = start(cwd, words, words)
    try:
        wait_for(cwd / "models/first/checkpoints/step_000001", ranks)
        os.kill(ranks.processes[0].pid, signal.SIGKILL)
        told = refused(ranks.end(1))
    finally:
        ranks.kill()
    assert told.startswith("process 1: another process of this run has failed or can no longer")
    assert told.endswith(
        "if it was process 0, go on from its checkpoints with task.output_dir=(its adapter folder) "
        "and trainer.resume=auto"
    )


def test_processes_with_different_commands_are_refused(prepared: Prepared) -> None:
    words = (*OPTIONS, "task.output_dir=./models/differ")
    ranks = start(prepared.cwd, words, (*words, "lora.rank=4"))
    try:
        told, second = refused(ranks.end(0)), ranks.end(1)
    finally:
        ranks.kill()
    assert "process 1 of 2 would train something else" in told
    assert "lora.rank is 4 there and 16 in process 0" in told
    assert second.stdout == second.stderr == ""


def test_a_stop_asked_of_any_process_stops_all_after_the_same_update(prepared: Prepared) -> None:
    """The first one writes the checkpoint in peace: the others end well."""
    cwd = prepared.cwd
    words = (*OPTIONS, "task.output_dir=./models/stop", "trainer.max_steps=200")
    words = (*words, "trainer.save_every=2")
    ranks = start(cwd, words, words)
    try:
        wait_for(cwd / "models/stop/checkpoints/step_000002", ranks)
        ranks.processes[1].send_signal(signal.SIGTERM)
        told, second = refused(ranks.end(0), code=130), ranks.end(1)
    finally:
        ranks.kill()
    assert "training was stopped after update" in told
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")

"""The real W&B, and what can go wrong with it: training goes on, and the local log is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wandb_server import refusing, taking

ROOT = Path(__file__).resolve().parents[1]
KEY = "0" * 40
STEPS = 30

SCRIPT = f"""
import json, os, resource, signal, subprocess, sys, time, urllib.request
from pathlib import Path
from mondrian_ft.config import Config
from mondrian_ft.run import Run
from mondrian_ft.schema import TrackingMode
from mondrian_ft.tasks import Link
from mondrian_ft.tracking import weights_and_biases

mode, fault, jobs = sys.argv[1:4]
weights_and_biases.CLOSING["offline"] = 5.0 if fault == "stop" else 30.0
weights_and_biases.WRITTEN = 1.0
weights_and_biases.SENDING = 5.0 if fault == "gone" else 60.0

def service():
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True)
    return int(found.stdout.split()[0])

config = Config(task=Link())
config.tracking.mode = TrackingMode(mode)
config.tracking.entity = "nobody"
slowest = 0.0
for job in range(int(jobs)):
    with Run.open(config, Path(str(job)), group="sweep") as run:
        for step in range({STEPS}):
            if step == 1 and mode == "offline":
                until = time.monotonic() + 60  # the first number starts W&B
                while not list(Path(str(job)).glob("wandb/*/files/requirements.txt")):
                    assert time.monotonic() < until
                    time.sleep(0.02)
            if fault == "gone" and step == 5:
                while not list(Path(str(job)).glob("wandb/*/files/requirements.txt")):
                    time.sleep(0.02)
                urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/quit").read()
            elif step == 5 and job == 0 and fault != "none":
                if fault == "full":
                    # What a full disk is for its writes: they fail.
                    resource.prlimit(service(), resource.RLIMIT_FSIZE, (2000, 2000))
                else:
                    os.kill(service(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            started = time.perf_counter()
            run.tracker.log({{"loss": 1 / (step + 1), "note": 0.0}}, step=step)
            slowest = max(slowest, time.perf_counter() - started)
            time.sleep(0.02)
print(json.dumps(slowest))
"""


def run(
    folder: Path, mode: str, fault: str, jobs: int = 1, **env: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, fault, str(jobs)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "HOME": str(folder)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Nothing but our own sentences, and no number waited for W&B.
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    assert float(done.stdout.splitlines()[-1]) < 2
    for job in range(jobs):
        log = (folder / str(job) / "training_log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(STEPS))
        assert json.loads((folder / str(job) / "run.json").read_text())["status"] == "done"
    return done


def warnings(folder: Path, job: int = 0) -> list[str]:
    return json.loads((folder / str(job) / "run.json").read_text())["warnings"]


def test_wandb_killed_in_mid_run(tmp_path: Path) -> None:
    """One plain warning; the sweep's next job has a W&B of its own again."""
    done = run(tmp_path, "offline", "kill", jobs=2)
    (warning,) = warnings(tmp_path, 0)
    assert "W&B failed and is left out of the rest of this run (Connection lost)" in warning
    assert "training_log.jsonl has every number" in warning
    assert warnings(tmp_path, 1) == []
    assert done.stdout.splitlines()[-2].startswith("W&B:      kept on disk; send it with: ")
    # What the killed one had not written yet cannot be sent, so nobody is told to.
    for line in done.stdout.splitlines()[:-1]:
        assert "1/wandb/offline-run-" in line


def test_a_wrong_key(tmp_path: Path) -> None:
    """The run is kept, the next job does not ask again, and what to do is said."""
    with refusing(401, "user is not logged in") as server:
        done = run(tmp_path, "online", "none", 2, WANDB_BASE_URL=server.address, WANDB_API_KEY=KEY)
    first, second = warnings(tmp_path, 0), warnings(tmp_path, 1)
    assert len(first) == len(second) == 1
    assert "W&B does not take the key (returned error 401: user is not logged in)" in first[0]
    assert "wandb login --relogin" in first[0]
    assert "training goes on" in first[0]
    assert "took no run of an earlier job" in second[0]
    said = done.stdout.splitlines()[:-1]
    assert [f"wandb sync {job}/wandb/offline-run-" in line for job, line in enumerate(said)] == [
        True,
        True,
    ]


def test_online_every_number_arrives(tmp_path: Path) -> None:
    """Each job is a run of its own, asked for as one to go on with, and finished."""
    with taking() as server:
        done = run(tmp_path, "online", "none", 2, WANDB_BASE_URL=server.address, WANDB_API_KEY=KEY)
    assert warnings(tmp_path, 0) == warnings(tmp_path, 1) == []
    ids = [given["name"] for name, given in server.asked if name == "RunResumeStatus"]
    kept = [json.loads((tmp_path / str(job) / "run.json").read_text())["wandb"] for job in (0, 1)]
    assert ids == [facts["id"] for facts in kept]
    assert len(set(ids)) == 2
    for job, (one, facts) in enumerate(zip(ids, kept, strict=True)):
        assert [row["train/step"] for row in server.rows[one]] == list(range(STEPS))
        assert [row["train/loss"] for row in server.rows[one]] == pytest.approx(
            [1 / (step + 1) for step in range(STEPS)]
        )
        assert server.exits[one] == 0
        assert facts["url"] == f"{server.address}/nobody/mondrian_ft/runs/{one}"
        assert "sync" not in facts
        named = [given for name, given in server.asked if name == "UpsertBucket"]
        told = [given for given in named if given["name"] == one and given["displayName"]]
        assert told[0]["displayName"] == f"sample/{job}"
        assert told[0]["groupName"] == "sweep"
        assert told[0]["jobType"] == "link"
    assert [line.split()[1] for line in done.stdout.splitlines()[:-1]] == [
        facts["url"] for facts in kept
    ]


@pytest.mark.full
def test_a_server_that_goes_away(tmp_path: Path) -> None:
    """In mid-run: the run ends as well as it would have, and can be sent later."""
    with taking() as server:
        done = run(tmp_path, "online", "gone", WANDB_BASE_URL=server.address, WANDB_API_KEY=KEY)
    (warning,) = warnings(tmp_path)
    assert "it has not taken everything within 5 seconds" in warning
    assert "wandb sync 0/wandb/run-" in done.stdout


@pytest.mark.full
def test_wandb_that_hangs(tmp_path: Path) -> None:
    """It is waited for at the end, for as long as is allowed, and ended."""
    run(tmp_path, "offline", "stop", jobs=2)
    (warning,) = warnings(tmp_path, 0)
    assert "it has not finished within 5 seconds" in warning
    assert warnings(tmp_path, 1) == []


@pytest.mark.full
def test_a_disk_that_wandb_can_no_longer_write(tmp_path: Path) -> None:
    """W&B itself says nothing of it."""
    run(tmp_path, "offline", "full")
    (warning,) = warnings(tmp_path)
    assert "was not written to its end, as on a full disk" in warning


@pytest.mark.full
@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (
            404,
            "entity nobody not found during upsertBucket",
            "W&B does not let this run into entity nobody, project mondrian_ft (returned error "
            "404: entity nobody not found during upsertBucket); look at tracking.entity and "
            "tracking.project",
        ),
        (403, "permission denied", "W&B does not let this run into entity nobody"),
        (500, "down for maintenance", "/graphql: down for maintenance)"),
    ],
)
def test_a_server_that_refuses(tmp_path: Path, status: int, message: str, told: str) -> None:
    """An entity that is not there or not ours, a server in trouble: why, and what to look at."""
    with refusing(status, message) as server:
        done = run(tmp_path, "online", "none", WANDB_BASE_URL=server.address, WANDB_API_KEY=KEY)
    (warning,) = warnings(tmp_path)
    assert told in warning
    assert "wandb sync 0/wandb/offline-run-" in done.stdout


@pytest.mark.full
def test_no_network(tmp_path: Path) -> None:
    """Nobody listens."""
    run(tmp_path, "online", "none", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    (warning,) = warnings(tmp_path)
    assert "W&B cannot be reached (http://127.0.0.1:9/graphql: connection refused)" in warning

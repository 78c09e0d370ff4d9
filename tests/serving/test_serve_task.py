"""``task=serve`` and ``task=migrate`` as they are typed, with a fake model in the model's place."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hydra import compose, initialize_config_dir

from mondrian_ft.config import load, register_schemas
from mondrian_ft.errors import AdapterError
from mondrian_ft.pipeline.serving import check_adapter
from mondrian_ft.serving import migration
from tests.data.world import World

from .made import photograph

ROOT = Path(__file__).resolve().parents[2]
FILES = {"image": ("a.jpg", photograph())}
CLIENT = httpx.Client(timeout=60, headers={"Connection": "close"})
"""Patient: other tests may keep every core busy."""
pytestmark = pytest.mark.slow


def command(*argv: str) -> list[str]:
    fake = ROOT / "tests" / "serving" / "serve_fake.py"
    return [sys.executable, str(fake), "tracking=none", *argv]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


@dataclass
class Running:
    """A service in a process of its own; ``told`` is what it printed before it listened."""

    url: str
    told: str
    child: subprocess.Popen[str]
    printed: str = ""
    err: str = ""

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.child.send_signal(how)
        rest, self.err = self.child.communicate(timeout=30)
        self.printed = self.told + rest
        return self.child.returncode


@contextmanager
def serving(
    cwd: Path, *argv: str, knobs: Mapping[str, Any] | None = None, **env: str
) -> Iterator[Running]:
    with subprocess.Popen(
        command("task=serve", "task.port=0", *argv),
        cwd=cwd,
        env=environment(FAKE_MODEL=json.dumps(knobs or {}), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        guard = threading.Timer(90, child.kill)
        guard.start()
        try:
            assert child.stdout is not None
            told = ""
            while "Ctrl-C stops it" not in told:
                line = child.stdout.readline()
                assert line, told + (child.stderr.read() if child.stderr else "")
                told += line
            yield Running(re.findall(r"http://127\.0\.0\.1:\d+", told)[0], told, child)
        finally:
            guard.cancel()
            if child.poll() is None:
                child.kill()


def refused(cwd: Path, *argv: str, knobs: Mapping[str, Any] | None = None) -> str:
    """What a command that exits 1 says."""
    done = subprocess.run(
        command(*argv),
        cwd=cwd,
        env=environment(FAKE_MODEL=json.dumps(knobs or {})),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Ctrl-C" not in done.stdout, "it never listened"
    return " ".join(done.stderr.split())


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "mondrian")
    for n in range(4):
        world.row(f"job-{n}", filename=f"{n}.jpg", status="queued")
    return world


def data(world: World) -> list[str]:
    return [
        f"data.db_path={world.db}",
        f"data.source_dir={world.source}",
        f"data.analysis_dir={world.analyses}",
    ]


def adapter(folder: Path) -> str:
    """A directory that looks like an adapter's; what is in it is the model's process to judge."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def statuses(world: World) -> dict[str, tuple[str, str | None]]:
    with closing(sqlite3.connect(world.db)) as connection:
        found = connection.execute("SELECT id, status, model_used FROM jobs").fetchall()
    return {row[0]: (row[1], row[2]) for row in found}


def test_from_migration_to_ctrl_c(world: World, tmp_path: Path) -> None:
    """Refused with the command, which is then typed; base after a restart without an adapter."""
    serve = ["task=serve", "task.port=0", f"task.db_path={world.db}", *data(world)]
    said = refused(tmp_path, *serve)
    assert f"task=migrate task.db_path={world.db}" in said
    done = subprocess.run(
        command("task=migrate", f"task.db_path={world.db}"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert "Added to jobs: mode, model, adapter, model_used," in done.stdout
    assert "Backup: mondrian/mondrian.db.backup-" in done.stdout
    place = adapter(tmp_path / "production")
    with serving(
        tmp_path,
        f"task.adapter={place}",
        "task.model_mode=ab_test",
        f"task.db_path={world.db}",
        *data(world),
        knobs={"arms": [place]},
    ) as service:
        for n in range(3):
            answer = CLIENT.post(f"{service.url}/analyze", files=FILES, data={"job_id": f"job-{n}"})
            assert answer.status_code == 200
            assert answer.json()["prompt_source"] == "config.system_prompt + advisors.prompt"
        health = CLIENT.get(f"{service.url}/health").json()
        assert (health["model_mode"], health["fine_tuned"]) == ("ab_test", True)
        assert service.stop(signal.SIGINT) == 0, service.err
        assert (tmp_path / "stopped").exists(), "the model's process was ended in good order"
    logged = [json.loads(line) for line in service.printed.splitlines() if line.startswith("{")]
    assert [line["route"] for line in logged] == ["/analyze"] * 3 + ["/health"]
    assert all(
        used and used.startswith("ab_test_")
        for _, used in [statuses(world)[f"job-{n}"] for n in range(3)]
    )
    with serving(tmp_path, f"task.db_path={world.db}", *data(world)) as service:
        answer = CLIENT.post(f"{service.url}/analyze", files=FILES, data={"job_id": "job-3"})
        assert answer.json()["model_used"] == "base"
        arms = CLIENT.get(f"{service.url}/ab").json()["arms"]
        assert sum(arm["answers"] for name, arm in arms.items() if name != "base") == 3
        assert arms["base"]["answers"] == 1
        (tmp_path / "stopped").unlink()
        assert service.stop() == 0, service.err
        assert (tmp_path / "stopped").exists()
    assert statuses(world)["job-3"] == ("done", "base")


def test_a_tuned_model_that_cannot_be_had_exits_1_before_it_listens(
    world: World, tmp_path: Path
) -> None:
    """No adapter, none there, one that is not loaded, and one that the model's process refuses."""
    tuned = ["task=serve", "task.port=0", "task.model_mode=fine_tuned", *data(world)]
    assert "needs an adapter" in refused(tmp_path, *tuned)
    assert "cannot be served" in refused(tmp_path, *tuned, "task.adapter=./nowhere")
    place = adapter(tmp_path / "adapter")
    said = refused(tmp_path, *tuned, f"task.adapter={place}")
    assert "is ready without the adapter" in said
    knobs = {"state": "failed", "reason": "The adapter changes nothing."}
    said = refused(tmp_path, *tuned, f"task.adapter={place}", knobs=knobs)
    assert "The adapter changes nothing." in said


def test_adapters_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is loaded: a version, a path, and a channel of another name in the
    registry, which is neither."""
    monkeypatch.chdir(tmp_path)
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = load(compose("config", ["task=serve"]))
    for name in ("v7", "production", "./nowhere"):
        with pytest.raises(AdapterError, match="cannot be served"):
            check_adapter(name, config)
    hint = r"name a version or channel of registry.name=sample-ansel, or an adapter directory"
    with pytest.raises(AdapterError, match=hint):
        check_adapter("other/production", config)


def test_advisors_without_an_adapter_are_named(world: World, tmp_path: Path) -> None:
    """A service that is to be tuned refuses them; its start is the time to hear of it."""
    with closing(sqlite3.connect(world.db)) as connection:
        connection.execute("INSERT INTO advisors VALUES ('watkins', 'Carleton Watkins', 'Judge.')")
        connection.commit()
    place = adapter(tmp_path / "adapter")
    with serving(
        tmp_path,
        "task.model_mode=fine_tuned",
        f"serve.adapters={{ansel: {place}}}",
        *data(world),
        knobs={"arms": [place]},
    ) as service:
        refused = CLIENT.post(f"{service.url}/analyze", files=FILES, data={"advisor": "watkins"})
        assert (refused.status_code, "needs an adapter" in refused.text) == (400, True)
        assert service.stop() == 0
    assert "no adapter for watkins: with model_mode=fine_tuned" in " ".join(service.err.split())


def test_a_killed_service_leaves_no_job_open(world: World, tmp_path: Path) -> None:
    migration.migrate(world.db)
    argv = [f"task.db_path={world.db}", *data(world)]
    with serving(tmp_path, *argv, knobs={"delay": 60}) as service:
        with CLIENT.stream(
            "POST", f"{service.url}/analyze_stream", files=FILES, data={"job_id": "job-1"}
        ) as answer:
            assert next(answer.iter_text()).startswith("event: start")
        thread = threading.Thread(target=_ignored, args=(service.url, "job-2"))
        thread.start()
        until(lambda: statuses(world)["job-2"][0] == "analyzing")
        until(lambda: statuses(world)["job-1"][0] == "failed")
        # Another service on the same folder would write this one's jobs.
        said = refused(tmp_path, "task=serve", "task.port=0", *argv)
        assert "Another service uses outputs/service" in said
        assert service.stop(signal.SIGKILL) == -signal.SIGKILL
        thread.join()
    assert statuses(world)["job-2"][0] == "analyzing"
    with serving(tmp_path, *argv) as service:
        assert statuses(world)["job-2"][0] == "failed"
        assert service.stop() == 0
    assert "left open have failed: 1" in service.err


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _ignored(url: str, job: str) -> None:
    try:
        CLIENT.post(f"{url}/analyze", files=FILES, data={"job_id": job})
    except httpx.TransportError:
        return


def test_a_token_is_nowhere_on_the_disk(world: World, tmp_path: Path) -> None:
    """Neither in run.json nor in what Hydra writes, nor in a line of the log."""
    with serving(tmp_path, "serve.token=s3cret-of-mine", *data(world)) as service:
        assert CLIENT.get(f"{service.url}/advisors").status_code == 401
        headers = {"Authorization": "Bearer s3cret-of-mine"}
        assert CLIENT.get(f"{service.url}/advisors", headers=headers).status_code == 200
        assert service.stop() == 0
    assert "s3cret-of-mine" not in service.printed + service.err
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"s3cret-of-mine" not in path.read_bytes(), path


def test_loading_is_told(world: World, tmp_path: Path) -> None:
    """The base is listened for at once; /health says 202 meanwhile, also without the token, here
    one of the environment."""
    knobs = {"state": "loading", "progress": 0.5}
    with serving(tmp_path, *data(world), knobs=knobs, MONDRIAN_FT_TOKEN="other") as service:
        assert CLIENT.get(f"{service.url}/health").status_code == 202
        assert CLIENT.get(f"{service.url}/advisors").status_code == 401
        headers = {"Authorization": "Bearer other"}
        answer = CLIENT.post(f"{service.url}/analyze", files=FILES, headers=headers)
        assert (answer.status_code, "is loading" in answer.json()["error"]) == (503, True)
        assert service.stop() == 0


def test_an_advisor_that_is_not_there_gets_no_adapter(world: World, tmp_path: Path) -> None:
    """A mistyped id would else be served by the wrong model, in silence."""
    place = adapter(tmp_path / "adapter")
    done = subprocess.run(
        command("task=serve", f"serve.adapters={{anzel: {place}}}", *data(world)),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 2
    assert "no such advisor; did you mean ansel?" in " ".join(done.stderr.split())


def test_migrate_needs_a_database(tmp_path: Path) -> None:
    done = subprocess.run(
        command("task=migrate"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 2
    assert "set task.db_path" in done.stderr

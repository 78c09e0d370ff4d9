"""The review as it is typed: started, used, stopped with Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib import request

from .conftest import command, environment, read_json, refused, run_folders, succeed, typed
from .world import World

MINE = ("data=mondrian", "data.output_dir=./training_data", "tracking=none")


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a GET, or to a POST of ``body`` from the page's own origin."""
    asked = request.Request(
        f"{url}{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json", "Origin": url},
    )
    with request.urlopen(asked, timeout=20) as answer:
        return json.loads(answer.read())


def decide(url: str, index: int, decision: str, **more: Any) -> None:
    row = ask(url, f"/api/rows/{index}")
    body = {name: row[name] for name in ("job_id", "analysis_sha256")}
    ask(url, f"/api/rows/{index}/decision", {**body, "decision": decision, **more})


def test_from_start_to_ctrl_c(world: World) -> None:
    """Exit 0 and a summary; the decision is on the disk, the database untouched; then applied."""
    database = world.db.read_bytes()
    with subprocess.Popen(
        typed("task=review", *MINE, "task.port=0"),
        cwd=world.cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        # A server that never answers is stopped, and the test fails on what it printed.
        stop = threading.Timer(120, child.kill)
        stop.start()
        assert child.stdout is not None
        told = ""
        # To the last line that is printed before Ctrl-C: communicate passes over what was buffered.
        while "Ctrl-C stops it" not in told:
            line = child.stdout.readline()
            assert line, told
            told += line
        url = re.findall(r"http://127\.0\.0\.1:\d+", told)[0]
        critique = ask(url, "/api/rows/1")["critique"]
        critique["dimensions"][0]["score"] = 1.5
        decide(url, 0, "reject", remark="not his")
        decide(url, 1, "correct", critique=critique)
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
        stop.cancel()
    assert child.returncode == 0, err
    assert err == ""
    assert "Reviewed: 0 accepted, 1 corrected, 1 rejected, 8 left." in rest
    assert read_json(run_folders(world.cwd)[-1] / "run.json")["status"] == "done"
    assert world.db.read_bytes() == database
    path = world.cwd / "training_data" / "corrections.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["decision"] for line in lines] == ["reject", "correct"]

    # One more, about a text that is no longer there, and one of a job that never was.
    lines[1] |= {"job_id": world.jobs[5]}
    lines[0] |= {"job_id": "never-was"}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write('{"job_id": "cut sho')
    done = succeed("task=prepare", *MINE, cwd=world.cwd)
    assert "Reviewed: 0 accepted, 1 corrected, 1 rejected" in done.stdout
    assert f"changed since: {world.jobs[5]};" in done.stderr
    assert "not in the manifest: never-was" in done.stderr
    assert "cut short" in done.stderr
    meta = read_json(world.cwd / "training_data" / "training_data_ansel_meta.json")
    assert list(meta["rejected"].values()) == ["rejected in review: not his"]
    assert meta["total_examples"] == 9
    responses = [
        json.loads(row["response"])
        for part in ("train", "val")
        for row in read_json(world.cwd / "training_data" / f"training_data_ansel_{part}.json")
    ]
    assert critique in responses

    looked = succeed("task=audit", *MINE, cwd=world.cwd)
    assert "Reviewed: 0 accepted, 1 corrected, 1 rejected" in looked.stdout
    found = read_json(world.cwd / "training_data" / "audit.json")
    assert found["corrections"]["corrected"] == 1
    assert found["verdict"]["rows"] == 9
    assert world.db.read_bytes() == database


def test_what_it_refuses(world: World) -> None:
    """No folder that outlives the run, a port that is taken, a damaged corrections file."""
    asked = command("task=review", "data=mondrian", "tracking=none", cwd=world.cwd)
    assert "data.output_dir is null; set it" in refused(asked, 2)
    assert not list((world.cwd / "outputs").rglob("training_data_manifest.json"))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = command("task=review", *MINE, f"task.port={port}", cwd=world.cwd)
    assert refused(asked).startswith(f"Port {port} of 127.0.0.1 cannot be used: ")
    assert "must be 0 to 65535" in refused(
        command("task=review", "task.port=70000", cwd=world.cwd), 2
    )

    folder = world.cwd / "training_data"
    folder.mkdir(exist_ok=True)
    (folder / "corrections.jsonl").write_text("{}\n", encoding="utf-8")
    for task in ("review", "prepare"):
        asked = command(f"task={task}", *MINE, cwd=world.cwd)
        assert refused(asked).startswith("Line 1 of the corrections ")
    assert (folder / "corrections.jsonl").read_text(encoding="utf-8") == "{}\n"


def test_a_manifest_elsewhere_keeps_its_corrections(world: World) -> None:
    """Corrections belong to the manifest they are about, wherever the rows are prepared."""
    succeed("task=link", *MINE, cwd=world.cwd)
    folder = world.cwd / "training_data"
    from mondrian_ft.data import corrections
    from mondrian_ft.data.audit import entries_of_manifest

    entry = entries_of_manifest(read_json(folder / "training_data_manifest.json"))[0]
    line = corrections.decide(entry.seen(), corrections.Decision.REJECT)
    corrections.append(Path(folder) / "corrections.jsonl", line)
    done = succeed(
        *("task=prepare", "data=mondrian", "tracking=none", "data.output_dir=./other"),
        "data.manifest=./training_data/training_data_manifest.json",
        cwd=world.cwd,
    )
    assert "Prepared" in done.stdout
    meta = read_json(world.cwd / "other" / "training_data_ansel_meta.json")
    assert list(meta["rejected"]) == [entry.job_id]

"""The blind comparison as it is typed: started, used, stopped with Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mondrian_ft.registry import REPORT
from tests.serving.compared import make_report
from tests.serving.test_assess import is_tuned

from .conftest import command, environment, read_json, refused, run_folders, typed
from .test_review import ask
from .test_workbook import snippet


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of eight pairs; the tests work on copies."""
    return make_report(tmp_path_factory.mktemp("made") / "evaluation").parent


@pytest.fixture
def report(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "evaluation")
    return tmp_path / "evaluation" / "comparison_report.json"


@contextmanager
def serving(cwd: Path, *argv: str) -> Iterator[tuple[str, list[str]]]:
    """(Address, what it printed in the end) of a server that is stopped with Ctrl-C."""
    with subprocess.Popen(
        typed("task=assess", "tracking=none", "task.port=0", *argv),
        cwd=cwd,
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
        while "Ctrl-C stops it" not in told:
            line = child.stdout.readline()
            assert line, told
            told += line
        printed: list[str] = []
        yield re.findall(r"http://127\.0\.0\.1:\d+", told)[0], printed
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
        stop.cancel()
    assert child.returncode == 0, err
    printed += [told + rest, err]


def prefer_tuned(url: str, *indices: int) -> None:
    for index in indices:
        row = ask(url, f"/api/pairs/{index}")
        choice = "left" if is_tuned(row["left"]) else "right"
        ask(url, f"/api/pairs/{index}/judgement", {"key": row["key"], "choice": choice})


def test_from_start_to_ctrl_c(report: Path, tmp_path: Path) -> None:
    """Exit 0 and a summary; the report and its page tell it, and keep everything else."""
    before, page = read_json(report), (report.parent / "report.html").read_text(encoding="utf-8")
    with serving(tmp_path, "eval.report=evaluation/comparison_report.json") as (url, printed):
        prefer_tuned(url, *range(6))
    told, err = printed
    assert err == ""
    sentence = (
        "People: in 6 of 6 photographs the tuned critique was preferred, in 0 the base's, "
        "0 equal; exact sign test p = 0.031."
    )
    assert sentence in told
    assert "2 of 8 photographs were not judged." in told
    after = read_json(report)
    people = after["evidence"].pop("people")
    assert after == before
    assert (people["n"], people["tuned"], people["photographs"]) == (6, 6, 8)
    assert read_json(run_folders(tmp_path)[-1] / "run.json")["assess"] == people
    written = (report.parent / "report.html").read_text(encoding="utf-8")
    assert sentence.replace("'", "&#39;") in written
    start, end = page.split("<!-- people -->")[0], page.split("<!-- /people -->")[1]
    assert written.startswith(start)
    assert written.endswith(end)

    # On to the end: the reveal writes at once; a second count takes the first one's place.
    with serving(tmp_path, f"task.report={report.parent}") as (url, printed):
        assert ask(url, "/api/pairs")["counts"]["judged"] == 6
        prefer_tuned(url, 6, 7)
        assert ask(url, "/api/reveal", {"key": ""})["people"]["n"] == 8
        assert read_json(report)["evidence"]["people"]["n"] == 8
    written = (report.parent / "report.html").read_text(encoding="utf-8")
    assert written.count("exact sign test") == 1
    assert "in 8 of 8 photographs" in written


def test_the_workbooks_snippets_still_work(report: Path, tmp_path: Path, shared: Path) -> None:
    with serving(tmp_path, f"task.report={report}") as (url, _):
        prefer_tuned(url, 0)
    workbook = (shared / "workbook.md").read_text(encoding="utf-8")
    for task, expected in (("4.2", "Base Model:"), ("4.3", "=== Sample 2: ")):
        done = subprocess.run(
            ["bash", "-c", snippet(workbook, task)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_a_run_is_found_and_its_copies_are_told(report: Path, tmp_path: Path) -> None:
    """The newest run of the experiment; its own page and the adapter's copy say the same."""
    run = tmp_path / "outputs" / "sample" / "2026-01-01_00-00-00-000000"
    adapter = run / "adapter"
    content = read_json(report) | {"lora_path": str(adapter)}
    report.write_text(json.dumps(content), encoding="utf-8")
    shutil.copytree(report.parent, run / "evaluation")
    shutil.copytree(report.parent, adapter / "evaluation")
    shutil.copy(report.parent / "report.html", run)
    (run / "run.json").write_text("{}", encoding="utf-8")
    with serving(tmp_path) as (url, printed):
        prefer_tuned(url, 0)
    assert printed[1] == ""
    for path in (run / "evaluation", adapter / "evaluation"):
        assert read_json(path / REPORT.name)["evidence"]["people"]["tuned"] == 1
    for path in (run, run / "evaluation", adapter / "evaluation"):
        assert "in 1 of 1 photograph " in (path / "report.html").read_text(encoding="utf-8")
    assert (run / "evaluation" / "assessments.jsonl").is_file()


def test_a_read_only_report_stays_as_it_is(report: Path, tmp_path: Path) -> None:
    """As in the registry: judgements and copies are kept aside, and found again."""
    for name in ("comparison_report.json", "report.html"):
        (report.parent / name).chmod(0o444)
    before = report.read_bytes()
    with serving(tmp_path, f"task.report={report}") as (url, printed):
        prefer_tuned(url, 0, 1)
    aside = tmp_path / "outputs" / "assessments" / "abc123"
    assert "is read-only; judgements are kept in outputs/assessments/abc123." in printed[0]
    assert report.read_bytes() == before
    assert {path.name for path in report.parent.iterdir() if path.suffix != ".jpg"} == {
        *("comparison_report.json", "report.html")
    }
    assert read_json(aside / "comparison_report.json")["evidence"]["people"]["n"] == 2
    assert "in 2 of 2 photographs" in (aside / "report.html").read_text(encoding="utf-8")
    with serving(tmp_path, f"task.report={report}") as (url, _):
        assert ask(url, "/api/pairs")["counts"]["judged"] == 2


def test_nothing_judged_changes_nothing(report: Path, tmp_path: Path) -> None:
    before = report.read_bytes()
    with serving(tmp_path, f"task.report={report}") as (url, printed):
        assert ask(url, "/api/pairs")["counts"]["left"] == 8
    assert "Nothing was judged." in printed[0]
    assert report.read_bytes() == before


def test_judgements_of_an_earlier_evaluation_are_told(report: Path, tmp_path: Path) -> None:
    """Evaluated again with other answers: what was said of the first ones does not count."""
    with serving(tmp_path, f"task.report={report}") as (url, _):
        prefer_tuned(url, 0)
    content = read_json(report)
    for sample in content["sample_results"]:
        sample["base_model"]["full_output"] += " "
    report.write_text(json.dumps(content), encoding="utf-8")
    with serving(tmp_path, f"task.report={report}") as (url, printed):
        assert ask(url, "/api/pairs")["counts"]["judged"] == 0
    assert "warning: 1 judgement in " in printed[1]
    assert "people" not in read_json(report)["evidence"]
    assert "exact sign test" not in (report.parent / "report.html").read_text(encoding="utf-8")


def test_a_report_that_breaks_meanwhile_loses_no_work(report: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"task.report={report}") as (url, printed):
        prefer_tuned(url, 0)
        report.write_text("{", encoding="utf-8")
    assert "is not JSON" in printed[1]
    assert "in 1 of 1 photograph the tuned" in printed[0]
    assert (report.parent / "assessments.jsonl").is_file()


def test_what_it_refuses(report: Path, tmp_path: Path) -> None:
    """No run yet, no report, no JSON, one arm only, no answers, a port that is taken."""

    def asked(*argv: str, code: int = 1) -> str:
        return refused(command("task=assess", "tracking=none", *argv, cwd=tmp_path), code)

    assert "no evaluated run of the experiment sample" in asked(code=2)
    assert "no such file" in asked("task.report=evaluation/none.json")
    named = f"task.report={report}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} of 127.0.0.1 cannot be used" in asked(named, f"task.port={port}")
    content = read_json(report)
    for sample in content["sample_results"]:
        del sample["fine_tuned_model"]
    report.write_text(json.dumps(content), encoding="utf-8")
    assert "no answer of the tuned model" in asked(named)
    report.write_text("{}", encoding="utf-8")
    assert "has no sample_results" in asked(named)
    report.write_text("half of it", encoding="utf-8")
    assert "is not JSON" in asked(named)
    assert "task.reviewer is blank" in asked("task.reviewer=' '", code=2)

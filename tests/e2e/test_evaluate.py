"""``task=evaluate`` as it is typed when something is wrong, killed, or asks a judge."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint import closer, endpoint

from .conftest import (
    Finished,
    command,
    environment,
    read_json,
    refused,
    run_folders,
    succeed,
    typed,
)
from .test_assess import prefer_tuned, serving
from .test_interrupt import _heed_ctrl_c

pytestmark = pytest.mark.full  # three minutes of processes that are killed and started again

ANSWERS = Path("outputs/cache/answers")


def words(run: Finished, *more: str, adapter: Path | None = None) -> tuple[str, ...]:
    """``task=evaluate`` of the sample run's adapter on four of its held-out photographs."""
    return (
        "task=evaluate",
        f"task.adapter={adapter or run.adapter}",
        f"data.output_dir={run.folder / 'data'}",
        "eval.max_examples=4",
        "tracking=none",
        *more,
    )


def report_of(cwd: Path) -> dict[str, Any]:
    """The newest run's comparison."""
    return read_json(run_folders(cwd)[-1] / "evaluation" / "comparison_report.json")


def texts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What both models said."""
    return [
        (sample["base_model"]["full_output"], sample["fine_tuned_model"]["full_output"])
        for sample in report["sample_results"]
    ]


# --- killed -------------------------------------------------------------------------------------


def kept_in(cwd: Path) -> int:
    """Whole lines in the kept answers."""
    return sum(path.read_bytes().count(b"\n") for path in (cwd / ANSWERS).glob("*.jsonl"))


def kill_after(cwd: Path, argv: tuple[str, ...], answers: int) -> None:
    """Starts an evaluation and kills it, without a word, once it has kept so many answers."""
    with subprocess.Popen(
        typed(*argv),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_ctrl_c,
    ) as child:
        until = time.monotonic() + 300
        while kept_in(cwd) < answers and child.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        told, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, told


def test_a_killed_evaluation_goes_on(sample_run: Finished, tmp_path: Path) -> None:
    """SIGKILL among the base's answers: those that were there are kept, and the end is the same."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    # One at a time, so that there is a moment between the first answer and the last.
    argv = words(sample_run, "eval.batch_size=1", "eval.max_examples=6")
    kill_after(killed, argv, answers=2)
    before = kept_in(killed)
    assert 2 <= before < 12
    assert read_json(run_folders(killed)[-1] / "run.json")["status"] == "running"
    assert not (run_folders(killed)[-1] / "evaluation" / "comparison_report.json").exists()
    # The kill of a process that was writing: half a line.
    (kept,) = (killed / ANSWERS).glob("*.jsonl")
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"picture": "ab')

    done = succeed(*argv, cwd=killed)
    assert "Answers given before, with their times of then: " in done.stdout
    report = report_of(killed)
    reused = report["evidence"]["settings"]["answers_reused"]
    assert reused["base"] + reused["tuned"] == before
    succeed(*argv, cwd=whole)
    undisturbed = report_of(whole)
    assert undisturbed["evidence"]["settings"]["answers_reused"]["base"] == 0
    assert texts(report) == texts(undisturbed)
    assert report["evidence"]["change"] == undisturbed["evidence"]["change"]


# --- bad models ---------------------------------------------------------------------------------


def spoilt(folder: Path, weights: str, part: str) -> None:
    """Puts NaN into the tensors of a safetensors file whose name holds ``part``."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / weights)
    names = [name for name in tensors if part in name]
    assert names
    for name in names:
        tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, folder / weights, {"format": "pt"})


def test_a_base_that_gives_no_numbers(sample_run: Finished, tmp_path: Path) -> None:
    """It is named with its path; no page claims anything."""
    from mondrian_ft.sample import model_dir

    folder = tmp_path / "base"
    shutil.copytree(model_dir(), folder)
    spoilt(folder, "model.safetensors", "layers.0.self_attn.q_proj.weight")
    sentence = refused(
        command(
            "task=evaluate",
            f"model.path={folder}",
            f"data.output_dir={sample_run.folder / 'data'}",
            "eval.arms=[base]",
            "eval.max_examples=2",
            "tracking=none",
            cwd=tmp_path,
        )
    )
    assert str(folder) in sentence
    assert "not finite" in sentence
    assert not list(tmp_path.rglob("report.html"))
    assert not (tmp_path / ANSWERS).exists(), "answers of a broken model were kept"


def test_an_adapter_that_gives_no_numbers(sample_run: Finished, tmp_path: Path) -> None:
    """Whole by its hash and still broken: it is named, the base is judged, and the exit is 1."""
    from mondrian_ft.model.adapter import identity_hash

    folder = tmp_path / "adapter"
    shutil.copytree(sample_run.adapter, folder)
    spoilt(folder, "adapter_model.safetensors", "lora_B")
    manifest = read_json(folder / "manifest.json")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    manifest["hash"] = identity_hash(weights, manifest["lora"]["scale"])
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    sentence = refused(command(*words(sample_run, adapter=folder), cwd=tmp_path))
    assert str(folder) in sentence
    assert "not finite" in sentence
    evidence = report_of(tmp_path)["evidence"]
    assert "not finite" in evidence["arms_failed"]["tuned"]
    assert evidence["arms"]["base"]["n_readable"] == 4
    assert evidence["verdict"] == "inconclusive"


def test_answers_do_not_outlive_the_chat_template(sample_run: Finished, tmp_path: Path) -> None:
    """The same weights asked through another template: nothing that was kept is an answer."""
    from mondrian_ft.sample import model_dir

    model = Path(shutil.copytree(model_dir(), tmp_path / "model"))
    asked = [
        "task=evaluate",
        "tracking=none",
        "eval.max_examples=1",
        "eval.max_tokens=8",
        "model.path=./model",
        f"data.output_dir={sample_run.folder / 'data'}",
    ]
    reused = []
    for change in ("", "", "{# reworded #}"):
        template = model / "chat_template.jinja"
        template.write_text(change + template.read_text(encoding="utf-8"), encoding="utf-8")
        succeed(*asked, cwd=tmp_path)
        reused.append(report_of(tmp_path)["evidence"]["settings"]["answers_reused"]["base"])
    assert reused == [0, 1, 0]


def test_answers_without_an_end(sample_run: Finished, tmp_path: Path) -> None:
    """The token limit ends them; they are counted, detected, and no answer is made of them."""
    succeed(*words(sample_run, "eval.max_tokens=30"), cwd=tmp_path)
    report = report_of(tmp_path)
    evidence = report["evidence"]
    for arm in ("base", "tuned"):
        assert evidence["arms"][arm]["unfinished"] == 4
        assert evidence["arms"][arm]["tokens_mean"] == 30
        assert evidence["arms"][arm]["format_strict"] == 0
    cut = next(one for one in evidence["detections"] if one["name"] == "truncated")
    assert (cut["fired"], cut["value"], len(cut["rows"])) == (True, 1.0, 4)
    assert not report["sample_results"][0]["fine_tuned_model"]["finished"]
    page = (run_folders(tmp_path)[-1] / "report.html").read_text(encoding="utf-8")
    assert "The token limit cut this answer." in page
    assert "a higher eval.max_tokens lets them finish" in page


# --- bad data -----------------------------------------------------------------------------------


def test_critiques_without_scores(sample_run: Finished, tmp_path: Path) -> None:
    """Rows of one's own with prose for critiques: evaluated, and said what cannot be."""
    for part in ("train", "test"):
        rows = sample_run.rows(part)
        for number, row in enumerate(rows):
            row["response"] = f"Photograph {number} has a fine light, and the horizon leans."
        (tmp_path / f"{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    done = succeed(
        "task=evaluate",
        f"task.adapter={sample_run.adapter}",
        "data.train_data=train.json",
        "data.val_data=test.json",
        "eval.max_examples=4",
        "eval.max_tokens=300",
        "tracking=none",
        cwd=tmp_path,
    )
    sentence = "hold no scores, so only the format of the answers can be compared."
    assert sentence in " ".join(done.stdout.split())
    page = (run_folders(tmp_path)[-1] / "report.html").read_text(encoding="utf-8")
    assert sentence in page
    evidence = report_of(tmp_path)["evidence"]
    assert evidence["n_references_with_scores"] == 0
    assert evidence["arms"]["tuned"]["score_mae"] is None
    assert evidence["verdict"] in ("inconclusive", "worse")


# --- people ---


def test_evaluating_again_keeps_what_people_said(sample_run: Finished, tmp_path: Path) -> None:
    """The same answers in the same file once lost their judgements until the next assess."""
    argv = words(sample_run, "eval.report=evaluation/comparison_report.json")
    succeed(*argv, cwd=tmp_path)
    report = tmp_path / "evaluation" / "comparison_report.json"
    with serving(tmp_path, f"task.report={report}") as (url, _):
        prefer_tuned(url, 0, 1, 2)
    before = read_json(report)["evidence"]["people"]
    assert before["n"] == 3
    succeed(*argv, cwd=tmp_path)
    assert read_json(report)["evidence"]["people"] == before
    assert "exact sign test" in (report.parent / "report.html").read_text(encoding="utf-8")


# --- a judge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("works", [True, False], ids=["works", "refuses"])
def test_a_judge_as_it_is_typed(sample_run: Finished, tmp_path: Path, works: bool) -> None:
    """Asked in both orders with the key of the environment, or a warning; the exit is 0."""
    with endpoint(closer("{")) as served:
        served.failures = [] if works else [(401, "{}")]
        argv = words(
            sample_run,
            f"eval.judge_url={served.url}",
            "eval.judge_model=fake",
            "eval.judge_key_env=FAKE_KEY",
        )
        done = succeed(*argv, cwd=tmp_path, env={"FAKE_KEY": "sk-fake", "NO_PROXY": "127.0.0.1"})
    assert f"4 photographs will be sent to {served.url} (with the key of FAKE_KEY)" in done.stdout
    assert set(served.keys) == {"Bearer sk-fake"}
    report = report_of(tmp_path)
    facts = report["evidence"]["judge"]
    page = (run_folders(tmp_path)[-1] / "report.html").read_text(encoding="utf-8")
    if works:
        assert len(served.requests) == 8
        # It goes by the first brace, which both have: the first place wins each time.
        assert facts["order_dependent"] == 4
        assert "Judge fake: in 0 of 4 photographs" in page
        assert done.stderr == ""
    else:
        assert "does not accept the key in FAKE_KEY (HTTP 401)" in facts["error"]
        assert "warning: the judge could not be asked" in done.stderr
        assert "The judge could not be asked." in page
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-fake" not in path.read_bytes(), path

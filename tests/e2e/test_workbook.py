"""The workbook's files at the workbook's paths, and its own verification snippets run on them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import Finished, environment, finished, read_json

COMMAND = (
    "+experiment=ansel_v1",
    "model=sample",
    "data=sample",
    "data.output_dir=./training_data",
    "task.output_dir=./models/qwen3-vl-4b-lora-ansel",
    "eval.report=./evaluation/comparison_report.json",
)
ADAPTER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "manifest.json",
    "training_args.json",
    "training_log.jsonl",
    "README.md",
    "evaluation/comparison_report.json",
    "evaluation/report.html",
)
SNIPPETS = {
    "0.2": ["Total advisors: 1", r"  ansel: \d\d\d examples"],
    "1.1": [r"train: 8\d examples", r"val: 1\d examples"],
    "1.2": ["Example 3:", r"Image: /.*\.(jpe?g|png)", r"Prompt len: \d{3}", r"Response len: \d{3}"],
    "4.2": ["Base Model:", r"Format Compliance: \d+\.\d%", "Fine-tuned Model:", "score_delta:"],
    "4.3": ["=== Sample 2: ", "Base Output", "Fine-tuned Output"],
}
"""What each snippet prints, as patterns, by the workbook's number of the task."""


def snippet(workbook: str, task: str) -> str:
    """The ``python -c`` command that the workbook gives to verify a task, unchanged."""
    part = re.split(r"^#### Task ", workbook, flags=re.MULTILINE)
    found = next(text for text in part if text.startswith(f"{task}:"))
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", found, flags=re.DOTALL))
    match = re.search(r'^python -c "\n.*?^"$', shell, flags=re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[0]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The workbook's run, cut short: a few updates, two photographs compared."""
    cwd = tmp_path_factory.mktemp("workbook")
    shorter = ("trainer.max_steps=4", "eval.max_examples=2", "eval.max_tokens=300", "tracking=none")
    return finished(cwd, *COMMAND, *shorter)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The workbook's run as it is written."""
    return finished(tmp_path_factory.mktemp("workbook"), *COMMAND)


def check_files(run: Finished) -> None:
    """Every file of the workbook is where the workbook looks for it."""
    for name in ("manifest", "ansel_train", "ansel_val", "ansel_meta"):
        assert (run.cwd / "training_data" / f"training_data_{name}.json").is_file()
    adapter = run.cwd / "models" / "qwen3-vl-4b-lora-ansel"
    for name in ADAPTER:
        assert (adapter / name).is_file(), name
    log = (adapter / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in log]
    assert all(step["loss"] > 0 for step in steps if step["kind"] == "step")
    assert read_json(adapter / "training_args.json")["optimizer"]["warmup_steps"] == 100
    assert (run.cwd / "evaluation" / "comparison_report.json").is_file()
    assert not (run.folder / "adapter").exists()


def check_snippets(run: Finished, shared: Path) -> None:
    """Each snippet, typed into a shell beside the files, prints what the workbook expects."""
    workbook = (shared / "workbook.md").read_text(encoding="utf-8")
    for task, expected in SNIPPETS.items():
        done = subprocess.run(
            ["bash", "-c", snippet(workbook, task)],
            cwd=run.cwd,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for pattern in expected:
            assert re.search(pattern, done.stdout), f"task {task}: {pattern} in {done.stdout}"


def check_warnings(run: Finished, updates: int) -> None:
    """A warm-up of most of the run, or more, is obeyed, and told with the peak that it reaches."""
    told = " ".join(run.stderr.split())
    if updates < 100:
        peak = 2e-4 * updates / 100
        assert (
            f"optimizer.warmup_steps=100 is longer than the whole run of {updates} updates" in told
        )
        assert f"peaks at {peak:.2g} and never reaches 0.0002" in told
    else:
        peak = 2e-4
        assert f"optimizer.warmup_steps=100 takes up most of the run of {updates} updates" in told
        assert "peaks at 0.0002 in update 100" in told
    assert f"trainer.save_every=250 never comes in a run of {updates} updates" in told
    assert len(run.facts["warnings"]) == 2
    log = (run.folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [one["learning_rate"] for one in map(json.loads, log) if one["kind"] == "step"]
    assert len(rates) == updates
    assert rates[:100] == sorted(rates[:100])
    assert max(rates) == pytest.approx(peak, rel=1e-5)


def test_files(quick: Finished) -> None:
    """The run leaves the workbook's files, and those of interface.md, at the workbook's paths."""
    check_files(quick)


def test_warnings(quick: Finished) -> None:
    """Settings that are surely not meant are obeyed, with a warning that gives the numbers."""
    check_warnings(quick, 4)


def test_snippets(quick: Finished, shared: Path) -> None:
    """The verification snippets of phases 0.2, 1.1, 1.2, 4.2 and 4.3 run unchanged."""
    check_snippets(quick, shared)


@pytest.mark.full
def test_as_written(whole: Finished, shared: Path) -> None:
    """The command exactly as it is promised, uncut."""
    check_files(whole)
    rows = len(read_json(whole.cwd / "training_data" / "training_data_ansel_train.json"))
    check_warnings(whole, 3 * -(-rows // 2))
    # Without a network and a key, W&B writes to disk.
    assert list((whole.folder / "wandb").glob("offline-run-*/*.wandb"))
    check_snippets(whole, shared)

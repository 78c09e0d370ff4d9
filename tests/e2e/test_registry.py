"""The registry as it is typed: the workbook's phase 6, refusals, and what a command costs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Finished, command, environment, read_json, refused, run_folders, succeed

NAME = "qwen3-vl-4b-lora-ansel"
SAMPLE = ("model=sample", "data=sample", "tracking=none")
"""Put behind the commands of the page, which are for the 4B model."""


def phase_6() -> list[list[str]]:
    """The commands of docs/registry.md for the workbook's folders, as words."""
    page = (ROOT / "docs" / "registry.md").read_text(encoding="utf-8")
    block = page.split("## The workbook's folders")[1].split("```")[1]
    lines = re.findall(r"^\$ python -m mondrian_ft (.*)$", block, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def made(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample's rows, a hasty adapter as v1 and the sample run's as v2."""
    cwd = tmp_path_factory.mktemp("registry")
    shutil.copytree(sample_run.folder / "data", cwd / "training_data")
    succeed(
        "task=train",
        "trainer.max_steps=40",
        "data.output_dir=training_data",
        f"task.output_dir=models/{NAME}",
        "tracking=none",
        cwd=cwd,
    )
    shutil.copytree(
        sample_run.adapter,
        cwd / "models" / f"{NAME}-v2",
        ignore=shutil.ignore_patterns("checkpoints", "evaluation"),
    )
    return cwd


def served(cwd: Path) -> str:
    """The version that everything which resolves the channel comes to."""
    found = json.loads(
        succeed(
            *SAMPLE, f"registry.name={NAME}", "task=versions", "task.format=json", cwd=cwd
        ).stdout
    )
    (version,) = [v["version"] for v in found if "production" in v["channels"]]
    active = cwd / "models" / f"{NAME}-active"
    assert active.is_symlink()
    assert not Path(active.readlink()).is_absolute()
    assert active.resolve() == cwd / "models" / "versions" / f"{NAME}-{version}"
    manifest = read_json(active / "manifest.json")
    assert manifest["hash"] == next(v["hash"] for v in found if v["version"] == version)
    return version


@pytest.mark.full
def test_phase_6_as_written(made: Path) -> None:
    """v1, v2, evaluate both, switch, switch back; the link and the channel follow at once."""
    commands = phase_6()
    assert [words[3] for words in commands] == [
        "task=register",
        "task=evaluate",
        "task=promote",
        "task=register",
        "task=evaluate",
        "task=promote",
        "task=rollback",
    ]
    told: list[str] = []
    seen: list[str] = []
    for words in commands:
        told.append(succeed(*words, *SAMPLE, cwd=made).stdout)
        if words[3] in ("task=promote", "task=rollback"):
            seen.append(served(made))
    assert seen == ["v1", "v2", "v1"]
    assert f"Registered as {NAME} v2." in told[3]
    assert f"Filed as evidence for {NAME} v2." in told[4]
    assert "production is v2 now (it was v1)." in told[5]
    assert "against v1 (95 % interval" in told[5]
    assert "production is v1 again (it was v2)." in told[6]
    history = (made / "outputs" / "registry" / NAME / "history.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in history]
    assert events == [
        "register",
        "evaluate",
        "promote",
        "register",
        "evaluate",
        "promote",
        "rollback",
    ]
    evidence = evaluated(made, f"./models/{NAME}-active")
    assert evidence["adapter_hash"] == read_json(made / "models" / NAME / "manifest.json")["hash"]
    assert "production" not in evidence["arms"], "it is what production means"
    assert evidence["latency"]["n"] == 0 or evidence["latency"]["ratio"] > 0


def evaluated(cwd: Path, adapter: str) -> dict[str, Any]:
    """The evidence of an evaluation, whose report is filed."""
    done = succeed(
        *SAMPLE,
        f"registry.name={NAME}",
        "task=evaluate",
        f"task.adapter={adapter}",
        "data.output_dir=training_data",
        cwd=cwd,
    )
    assert "Filed as evidence" in done.stdout
    return read_json(run_folders(cwd)[-1] / "evaluation" / "comparison_report.json")["evidence"]


@pytest.fixture
def shelf(sample_run: Finished, tmp_path: Path) -> Path:
    """A folder with the sample run's registry."""
    shutil.copytree(sample_run.cwd / "outputs" / "registry", tmp_path / "outputs" / "registry")
    return tmp_path


def test_the_command_that_the_first_run_prints(sample_run: Finished, shelf: Path) -> None:
    """Typed as it stands it promotes the first adapter; typed again it has nothing to do."""
    (line,) = [line for line in sample_run.stdout.splitlines() if "task=promote" in line]
    words = shlex.split(line)
    done = command(*words[words.index("mondrian_ft") + 1 :], "tracking=none", cwd=shelf)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 8
    assert "production is v1 now (it was empty)." in done.stdout
    facts = read_json(run_folders(shelf)[-1] / "run.json")["registry"]
    assert (facts["event"], facts["version"], facts["before"]) == ("promote", "v1", None)
    again = succeed("task=promote", "task.version=v1", "tracking=none", cwd=shelf)
    assert again.stdout == "production is v1 already.\n"


def test_a_refusal_names_the_command_that_is_missing(shelf: Path, sample_run: Finished) -> None:
    """Exit 1, the reasons, and what to type; the channel is where it was."""
    words = ("task=promote", "task.version=v1", "tracking=none")
    home = shelf / "outputs" / "registry" / "sample-ansel"
    lock = shelf / "rows" / "split.lock.json"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"advisors": {"ansel": {"data_lock": "0" * 64}}}))
    sentence = refused(command(*words, "data.output_dir=rows", cwd=shelf))
    assert "the current one is 000000000000 (of rows/split.lock.json)" in sentence
    assert "task=evaluate task.adapter=v1 data.output_dir=rows" in sentence
    assert "task.reason overrules it" in sentence
    assert not (home / "channels" / "production.json").exists()
    told = [json.loads(line) for line in (home / "history.jsonl").read_text().splitlines()]
    assert told[-1]["event"] == "refuse"
    assert [why["rule"] for why in told[-1]["reasons"] if not why["passed"]] == ["data"]
    done = succeed(*words, "task.force=true", "task.reason=seen by eye", cwd=shelf)
    assert "production is v1 now" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("task=promote", "task.force=true"), 2, "task.reason"),
        (("task=promote", "task.version=v9"), 1, "no version or channel 'v9'"),
        (("task=promote", "task.channel=v1"), 1, "no plain word"),
        (("task=rollback",), 1, "is empty"),
        (("task=prune",), 1, "task.keep is not set"),
        (("task=prune", "task.keep=0"), 2, "1 or more"),
        (("task=promote", "registry.gate.latency=-1"), 2, "registry.gate.latency is -1"),
        (("task=promote", "registry.gate.inconclusive=maybe"), 2, "inconclusive"),
        (("task=promote", "+registry.gate.latenzy=1"), 2, "registry.gate.latency"),
    ],
)
def test_what_cannot_be_done(shelf: Path, words: tuple[str, ...], code: int, told: str) -> None:
    """One sentence each."""
    done = command(*words, "tracking=none", cwd=shelf)
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stderr


def test_commands_are_quick_and_import_no_mlx(shelf: Path) -> None:
    """Every one of them as a whole process; the bound is generous, for a busy machine."""
    commands = [
        ("task=versions",),
        ("task=promote", "task.version=v1"),
        ("task=promote", "task.version=v1", "task.channel=staging"),
        ("task=rollback",),
        ("task=prune", "task.keep=1"),
        ("task=register", "task.adapter=outputs/registry/sample-ansel/v1"),
    ]
    code = (
        "import sys; from mondrian_ft.__main__ import main; main();"
        "heavy = {'mlx', 'mlx_vlm', 'transformers', 'numpy', 'scipy', 'wandb', 'pydantic'};"
        "print('heavy', sorted({m.split('.')[0] for m in sys.modules} & heavy))"
    )
    for words in commands:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code, *words, "tracking=none"],
                cwd=shelf,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            times.append(time.perf_counter() - started)
        assert done.stdout.splitlines()[-1] == "heavy []", words
        assert min(times) < 3, f"{words}: {times}"

"""The advisor service as it is typed: real processes, the real model, real clients."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.sample import sample_data

from .conftest import ROOT, Finished, environment, read_json
from .service import free_port

ADAPTER = "models/qwen3-vl-4b-lora-ansel"
SAMPLE = "model=sample data.min_pixels=4096 data.max_pixels=24576 tracking=none"
"""Put behind the documented commands, which are for the 4B model and its photographs."""


def scripts() -> list[str]:
    """The shell scripts of docs/workbook.md for phase 5: tasks 5.2, 5.3 and 5.4."""
    page = (ROOT / "docs" / "workbook.md").read_text(encoding="utf-8")
    part = page.split("## Phase 5, as commands")[1].split("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", part, flags=re.DOTALL)
    return [re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in blocks]


def type_in(script: str, cwd: Path, port: int) -> subprocess.CompletedProcess[str]:
    """A script as documented, but for the port, the model and curl's second between attempts."""
    script = script.replace("5100", str(port)).replace("task=serve", f"task=serve {SAMPLE}")
    done = subprocess.run(
        ["bash", "-c", f"set -m\n{script}"],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "error:" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def deployed(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workbook's folders: ``mondrian/`` with ``source/test.jpg``, and the adapter."""
    cwd = tmp_path_factory.mktemp("service")
    made = sample_data(0, cwd / "rendered")
    (cwd / "mondrian").symlink_to(made.db_path.parent)
    photograph = read_json(sample_run.folder / "data" / "training_data_ansel_test.json")[0]
    shutil.copy(photograph["image_path"], made.source_dir / "test.jpg")
    shutil.copytree(sample_run.adapter, cwd / ADAPTER, ignore=shutil.ignore_patterns("checkpoints"))
    # Whom the lot gives which model is drawn with a secret; a fixed one makes it known here.
    (cwd / "outputs" / "service").mkdir(parents=True)
    (cwd / "outputs" / "service" / "secret").write_text("5a" * 32)
    return cwd


def checked(answer: dict[str, Any], used: str, digest: str | None) -> None:
    """A whole critique, by whom it should be."""
    assert answer["model_used"] == used
    assert answer["parse_success"] is True
    assert json.loads(answer["raw"])["dimensions"]
    assert answer["analysis"]["dimensions"]
    assert (answer["adapter"] or {}).get("hash") == digest


def test_the_workbooks_commands(deployed: Path) -> None:
    """5.2, 5.3 and 5.4 as they stand in docs/workbook.md, then 5.2 once more."""
    base, tuned, both = scripts()
    digest = read_json(deployed / ADAPTER / "manifest.json")["hash"]
    port = free_port()
    type_in(base, deployed, port)
    first = read_json(deployed / "base.json")
    checked(first, "base", None)
    type_in(tuned, deployed, port)
    second = read_json(deployed / "tuned.json")
    checked(second, "fine_tuned", digest)
    assert second["raw"] != first["raw"]

    told = type_in(both, deployed, port).stdout
    found = [read_json(deployed / f"result_{number}.json") for number in range(1, 11)]
    arms = {"ab_test_base": (first, None), "ab_test_fine_tuned": (second, digest)}
    assert {one["model_used"] for one in found} == set(arms)
    for one in found:
        alone, by = arms[one["model_used"]]
        checked(one, one["model_used"], by)
        assert one["raw"] == alone["raw"], "it is what that arm gives alone"
    with closing(sqlite3.connect(deployed / "mondrian" / "mondrian.db")) as database:
        kept = dict(
            database.execute("SELECT id, model_used FROM jobs WHERE generated_by IS NOT NULL")
        )
    assert kept == {one["job_id"]: one["model_used"] for one in found}
    for arm in arms:
        count = sum(one["model_used"] == arm for one in found)
        assert f"{arm} {count}" in told.splitlines()

    (deployed / "base.json").unlink()
    type_in(base, deployed, port)
    again = read_json(deployed / "base.json")
    checked(again, "base", None)
    assert again["raw"] == first["raw"]

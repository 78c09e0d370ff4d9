"""`task=verify` as it is typed: a table, and exit 0 only if every check holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from .conftest import Finished, command, read_json, refused, run_folders, succeed

TYPED = ("task=verify", "tracking=none")


def checks_of(cwd: Path) -> dict[str, dict[str, Any]]:
    """The last run's checks by name."""
    facts = read_json(run_folders(cwd)[-1] / "run.json")["verify"]
    assert facts["holds"] == all(check["holds"] for check in facts["checks"])
    return {check["name"]: check for check in facts["checks"]}


def test_what_a_run_wrote_and_registered_is_proved(sample_run: Finished) -> None:
    """A directory, a version and a channel; the registered ones with their files."""
    for adapter in (str(sample_run.adapter), "v1", "candidate"):
        done = succeed(*TYPED, f"task.adapter={adapter}", cwd=sample_run.cwd)
        assert "FAILED" not in done.stdout
        checks = checks_of(sample_run.cwd)
        assert f"All {len(checks)} checks hold." in done.stdout
        assert ("registered files" in checks) == (adapter in ("v1", "candidate"))
        for name in ("hash", "base", "pixels", "prompt", "effect", "text logits", "picture logits"):
            assert checks[name]["holds"]
            assert name in done.stdout


def copied(sample_run: Finished, folder: Path) -> Path:
    """The run's adapter, free to be damaged."""
    shutil.copytree(sample_run.adapter, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    content = read_json(folder / "manifest.json")
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def another_base(folder: Path) -> None:
    edit(folder, lambda m: m["base"].update(weights="0" * 16))


def another_prompt(folder: Path) -> None:
    edit(folder, lambda m: m["probe"]["digests"].update(prompt="0" * 16))


def other_logits(folder: Path) -> None:
    edit(folder, lambda m: m["probe"]["inputs"][1]["tuned"].__setitem__(0, 1.0))


def forged(folder: Path) -> None:
    """Weights halved, and the hash made to agree."""
    from mondrian_ft.model.adapter import identity_hash

    path = folder / "adapter_model.safetensors"
    save_file(
        {name: value * value.dtype.type(0.5) for name, value in load_file(path).items()}, path
    )
    scale = read_json(folder / "manifest.json")["lora"]["scale"]
    edit(folder, lambda m: m.update(hash=identity_hash(path.read_bytes(), scale)))


def unproved(folder: Path) -> None:
    edit(folder, lambda m: m.pop("probe"))


@pytest.mark.parametrize(
    ("damage", "failed"),
    [
        (another_base, {"base"}),
        (another_prompt, {"prompt"}),
        (other_logits, {"picture logits"}),
        (forged, {"text logits", "picture logits"}),
        (unproved, {"proof"}),
    ],
)
def test_a_broken_one_is_shown_whole_and_refused(
    sample_run: Finished, tmp_path: Path, damage: Callable[[Path], None], failed: set[str]
) -> None:
    """Exit 1, one sentence, and the other checks are made all the same."""
    damage(copied(sample_run, tmp_path / "adapter"))
    done = command(*TYPED, "task.adapter=./adapter", cwd=tmp_path)
    sentence = refused(done)
    checks = checks_of(tmp_path)
    assert {name for name, check in checks.items() if not check["holds"]} == failed
    assert done.stdout.count("FAILED") == len(failed)
    assert f"{len(failed)} of {len(checks)} checks of adapter failed" in sentence
    assert checks["effect"]["holds"]


def test_a_registered_version_that_was_touched(sample_run: Finished, tmp_path: Path) -> None:
    """A file that no other check looks at was changed; others were put in or taken out."""
    shutil.copytree(sample_run.cwd / "outputs" / "registry", tmp_path / "outputs" / "registry")
    version = next((tmp_path / "outputs" / "registry").glob("*/v1"))
    (version / "README.md").chmod(0o644)
    (version / "README.md").write_text("Better than it is.", encoding="utf-8")
    (version / "training_args.json").unlink()
    (version / "more.txt").write_text("x", encoding="utf-8")
    sentence = refused(command(*TYPED, "task.adapter=v1", cwd=tmp_path))
    assert "README.md was changed, more.txt is new, training_args.json is missing" in sentence
    assert checks_of(tmp_path)["picture logits"]["holds"]


def test_what_cannot_be_verified(sample_run: Finished, tmp_path: Path) -> None:
    """No adapter named, none there, a name that is none; the base is not even loaded for them."""
    for words, told in (
        ((), "task.adapter is not set"),
        (("task.adapter=./none",), "none does not exist"),
        (("task.adapter=v9",), "has no version or channel 'v9'"),
    ):
        done = command(*TYPED, *words, cwd=tmp_path)
        assert told in refused(done)
        assert "Base:" not in done.stdout


def test_evaluating_refuses_what_is_not_proved(sample_run: Finished, tmp_path: Path) -> None:
    """The same sentence, and the base is judged without it."""
    unproved(copied(sample_run, tmp_path / "adapter"))
    done = command(
        "task=evaluate",
        "tracking=none",
        "eval.max_examples=2",
        "task.adapter=./adapter",
        f"data.output_dir={sample_run.folder / 'data'}",
        cwd=tmp_path,
    )
    assert "holds no proof" in refused(done)
    report = read_json(run_folders(tmp_path)[-1] / "evaluation" / "comparison_report.json")
    assert "holds no proof" in report["evidence"]["arms_failed"]["tuned"]


@pytest.mark.full
def test_dora_from_the_command_line(tmp_path: Path) -> None:
    """Trained, evaluated, registered and proved."""
    succeed("lora=dora", "trainer.max_steps=2", "tracking=none", cwd=tmp_path)
    adapter = run_folders(tmp_path)[-1] / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert any(name.endswith("lora_magnitude_vector") for name in tensors)
    succeed(*TYPED, "task.adapter=v1", cwd=tmp_path)

"""The main job on a model of another architecture, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import architectures
import pytest

from .conftest import command, refused, run_folders, succeed


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_the_main_job_trains_and_judges_it(tmp_path: Path, kind: str) -> None:
    """Linked, prepared, checked, trained, answered free and under the schema, registered, verified,
    and exported to mlx-vlm; with layers recomputed, as this experiment has it."""
    folder = getattr(architectures, kind)(tmp_path / kind)
    typed = ("+experiment=ansel_v1", f"model.path={folder}", "data=sample", "tracking=none")
    done = succeed(
        *typed,
        *("trainer.max_steps=3", "eval.max_examples=2", "eval.max_tokens=40", "eval.latency=2"),
        "eval.arms=[base,tuned,tuned_constrained]",
        cwd=tmp_path,
    )
    assert f"a {kind} model, by mlx-vlm's own forward" in done.stdout
    (run,) = run_folders(tmp_path)
    facts = json.loads((run / "run.json").read_text())
    assert facts["training"]["updates"] == 3
    report = json.loads((run / "evaluation" / "comparison_report.json").read_text())
    assert set(report["evidence"]["arms"]) >= {"base", "tuned", "tuned_constrained"}
    assert report["evidence"]["arms_failed"] == {}
    adapter = f"task.adapter={run / 'adapter'}"
    assert "checks hold" in succeed(*typed, "task=verify", adapter, cwd=tmp_path).stdout
    done = command(*typed, "task=serve", adapter, "task.port=0", cwd=tmp_path)
    assert "the service answers with qwen3_vl models alone" in refused(done)
    succeed(*typed, "task=export", "task.format=mlx", adapter, "task.output_dir=out", cwd=tmp_path)
    assert (tmp_path / "out" / "adapters.safetensors").is_file()
    for name in ("peft", "fused"):
        done = command(*typed, "task=export", f"task.format={name}", adapter, cwd=tmp_path)
        told = refused(done)
        assert f"is a {kind}; use task.format=mlx" in told


@pytest.mark.full
def test_the_tower_is_trained_as_it_is_typed(tmp_path: Path) -> None:
    """The sample with adapters in the tower and their own rate: evaluated, verified, merged; and
    no feature of the tuned tower in the cache."""
    typed = ("lora=vision", "optimizer.vision_learning_rate=1e-3", "tracking=none")
    done = succeed(
        *typed,
        *("trainer.max_steps=4", "eval.max_examples=2", "eval.max_tokens=40", "eval.latency=2"),
        cwd=tmp_path,
    )
    assert "20 matrices of the vision tower (linear_fc1, linear_fc2, proj, qkv)" in done.stdout
    (run,) = run_folders(tmp_path)
    cache = tmp_path / "outputs/cache/features"
    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    adapter = f"task.adapter={run / 'adapter'}"
    # The same photographs, so the base needs no others; a tuned feature would replace one of them.
    data = (f"data.output_dir={run / 'data'}", "eval.max_examples=2", "eval.max_tokens=40")
    succeed(*typed, "task=evaluate", adapter, *data, "eval.latency=2", cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == kept
    assert "checks hold" in succeed(*typed, "task=verify", adapter, cwd=tmp_path).stdout
    for name in ("peft", "fused"):
        succeed(
            *typed,
            *("task=export", f"task.format={name}", adapter, f"task.output_dir={name}"),
            cwd=tmp_path,
        )

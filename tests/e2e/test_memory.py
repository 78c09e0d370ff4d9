"""Will it fit, and can it learn: what a person asks before a night of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import command, finished, read_json, refused


def test_memory_is_predicted_from_the_rows(tmp_path: Path) -> None:
    """Done: the peak by its parts, whether it fits, and each change with its figure; no weights
    are read."""
    found = finished(tmp_path, "task=memory", "tracking=none", "trainer.batch_size=4")
    plan = read_json(found.folder / "memory.json")
    assert plan["rows"] == len(found.rows("train"))
    assert sum(one["rows"] for one in plan["tokens"]["histogram"]) == plan["rows"]
    parts = [value for name, value in plan["bytes"].items() if name != "total"]
    assert sum(parts) == plan["bytes"]["total"] < 1e9
    assert plan["fits"] is True
    overrides = [key for change in plan["changes"] for key in change["overrides"]]
    assert "trainer.grad_checkpoint=true" in overrides
    assert "trainer.batch_size=1" in overrides
    said = " ".join(found.stdout.split())
    assert "Training is predicted to take 0." in said
    assert "Base:" not in said


@pytest.mark.full
def test_one_batch_is_learnt_by_heart(tmp_path: Path) -> None:
    """Done: exit 0 and the loss near zero; every check of the preflight told before it."""
    found = finished(tmp_path, "+experiment=overfit", "tracking=none")
    said = " ".join(found.stdout.split())
    for name in ("memory", "masks", "pictures", "adapter", "first step", "disk"):
        assert f" {name} " in said
    assert "Learnt by heart: the loss of 2 rows went from" in said
    record = read_json(found.folder / "run.json")["overfit"]
    assert record["last"] <= 0.02 < record["first"]
    assert not (found.folder / "adapter").exists()


@pytest.mark.full
def test_what_cannot_be_learnt_fails(tmp_path: Path) -> None:
    """Done: exit 1, with what to change."""
    done = command(
        "+experiment=overfit",
        "tracking=none",
        "trainer.max_steps=2",
        "optimizer.learning_rate=1e-7",
        cwd=tmp_path,
    )
    assert "cannot even learn these by heart" in " ".join(refused(done).split())

"""Folds as they are typed: dealt once, chosen by number, and refused where they do not fit."""

from __future__ import annotations

from .conftest import command, read_json, refused, run_folders, succeed
from .world import World

MINE = ("data=mondrian", "tracking=none", "data.output_dir=./rows", "data.folds=3")


def test_each_fold_is_validated_on_once(world: World) -> None:
    """Over the folds every row validates once, and no run trains on what it validates."""
    succeed("task=prepare", *MINE, cwd=world.cwd)
    seen: list[str] = []
    for fold in range(3):
        done = succeed(
            "task=train",
            *MINE,
            f"data.fold={fold}",
            "trainer.max_steps=1",
            f"task.output_dir=./models/{fold}",
            cwd=world.cwd,
        )
        assert f"Fold {fold} of 0 to 2 is the validation part." in done.stdout
        rows = read_json(run_folders(world.cwd)[-1] / "run.json")["rows"]
        assert rows["train"] + rows["val"] == len(world.jobs)
        trained = read_json(world.cwd / "models" / str(fold) / "manifest.json")["trained_on"]
        held = {
            row["image_sha256"]
            for part in ("train", "val")
            for row in read_json(world.cwd / "rows" / f"training_data_ansel_{part}.json")
            if row["fold"] == fold
        }
        assert held
        assert not held & set(trained)
        seen += held
    assert len(seen) == len(set(seen))


def test_a_fold_that_was_not_dealt(world: World) -> None:
    """Rows without folds, and a fold beyond the last, are a sentence each."""
    plain = [word for word in MINE if not word.startswith("data.folds")]
    succeed("task=prepare", *plain, cwd=world.cwd)
    told = refused(command("task=train", *MINE, "data.fold=1", cwd=world.cwd))
    assert "were prepared with no folds, but data.folds is 3" in told
    beyond = command("task=train", *MINE, "data.fold=3", cwd=world.cwd)
    assert beyond.returncode == 2
    assert "data.fold is 3, but it must be below data.folds, 3" in beyond.stderr

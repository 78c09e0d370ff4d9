"""Stop anywhere, go on, and end with the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import Interrupted, TrainingError
from mondrian_ft.model import lora
from mondrian_ft.training import checkpoint


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(lab, base) -> Any:
    """Start a run with dropout from fresh layers; the same call continues one."""

    def start(folder: Path, method: str = "lora", **options: Any) -> Any:
        lora.detach(base.model)
        lab.attach(base, live=False, dropout=0.3, method=method)
        return lab.trainer(
            base,
            lab.examples(5),
            folder,
            **{"validation": lab.examples(2, "val"), "accumulate": 2, **options},
        )

    return start


class StopAt:
    """Presses Ctrl-C after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: Any, update: Any) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def on_eval(self, state: Any) -> None: ...
    def on_end(self, state: Any) -> None: ...


@pytest.mark.parametrize(
    ("stop", "method"), [(1, "lora"), (2, "lora"), (3, "lora"), (5, "lora"), (2, "dora")]
)
def test_a_resumed_run_ends_with_the_same_bits(lab, base, run, tmp_path, stop, method) -> None:
    """Dropout on, in the middle of an epoch, at an evaluation or beside one: equal weights.

    With DoRA the magnitudes as well.
    """
    straight = run(tmp_path / "straight", method)
    straight.fit()
    expected, state = lab.weights(base), straight.state
    assert any(name.endswith(".m") for name in expected) == (method == "dora")
    first = run(tmp_path / "stopped", method, callbacks=[StopAt(stop)])
    with pytest.raises(Interrupted):
        first.fit()
    second = run(tmp_path / "stopped", method)
    second.checkpointer.restore(second, second.checkpointer.last())
    assert second.state.step == stop
    second.fit()
    assert same(expected, lab.weights(base))
    assert second.state == state
    assert (tmp_path / "stopped/checkpoints/best.json").read_text() == (
        tmp_path / "straight/checkpoints/best.json"
    ).read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"optimizer": "adam", "plus": 4.0},
        {"ema": 0.9},
    ],
    ids=["muon", "adam, LoRA+", "average"],
)
def test_whatever_a_run_keeps_comes_back(lab, base, run, tmp_path, options) -> None:
    """Other optimizers, two optimizers in one, and the average: equal weights, equal average."""
    straight = run(tmp_path / "straight", **options)
    straight.fit()
    expected = lab.weights(base)
    first = run(tmp_path / "stopped", **options, callbacks=[StopAt(3)])
    with pytest.raises(Interrupted):
        first.fit()
    second = run(tmp_path / "stopped", **options)
    second.checkpointer.restore(second, second.checkpointer.last())
    second.fit()
    assert same(expected, lab.weights(base))
    if straight.average:
        kept, again = (
            {name: np.array(value) for name, value in one.average.values.items()}
            for one in (straight, second)
        )
        assert same(kept, again)
        assert not same(kept, expected)


def test_a_checkpoint_gives_its_average(lab, base, run, tmp_path) -> None:
    """Where a run keeps an average, that is what is made into an adapter."""
    trainer = run(tmp_path, ema=0.9, max_steps=4)
    trainer.fit()
    average = {name: np.array(value) for name, value in trainer.average.values.items()}
    trainer.checkpointer.load_adapter(trainer.checkpointer.last(), base.model)
    assert same(average, lab.weights(base))


def test_a_run_goes_on_in_another_folder(lab, base, run, tmp_path) -> None:
    """With the checkpoint and the best one; the end is that of a run that was never stopped.

    The best was once left behind, so that the end found no checkpoint to keep.
    """
    straight = run(tmp_path / "straight")
    straight.fit()
    expected = lab.weights(base)
    first = run(tmp_path / "first", max_steps=4)
    first.fit()
    best, last = first.checkpointer.best(), first.checkpointer.last()
    assert best is not None
    last = first.checkpointer.folder / "step_000003"
    first.checkpointer.mark_best(3)
    second = run(tmp_path / "second")
    second.checkpointer.restore(second, last)
    second.checkpointer.adopt(last)
    assert second.checkpointer.best().name == "step_000003"
    assert second.checkpointer.last().name == "step_000003"
    # The newest run is told by its checkpoint's time, which must not be that of the old one.
    assert second.checkpointer.last().stat().st_mtime_ns > last.stat().st_mtime_ns
    second.fit()
    assert same(expected, lab.weights(base))
    # What was found to be the best later than there is not taken along.
    first.checkpointer.mark_best(4)
    third = run(tmp_path / "third")
    third.checkpointer.adopt(last)
    assert third.checkpointer.best() is None


def test_leftovers_of_a_kill_are_cleaned_away(run, tmp_path) -> None:
    """A half written or half removed checkpoint does not lie there for ever."""
    trainer = run(tmp_path, max_steps=3)
    trainer.fit()
    folder = trainer.checkpointer.folder
    shutil.copytree(folder / "step_000003", folder / ".tmp-step_000009")
    shutil.copytree(folder / "step_000003", folder / "step_000001")
    (folder / "step_000001" / "adapter.safetensors").unlink()
    trainer.state.step = 5
    trainer.checkpointer.save(trainer)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert names == ["step_000003", "step_000005"]


def test_a_run_resumes_from_a_scheduled_checkpoint(lab, base, run, tmp_path) -> None:
    """As after a kill: no farewell checkpoint, the newest scheduled one is what there is."""
    straight = run(tmp_path / "straight")
    straight.fit()
    expected = lab.weights(base)
    killed = run(tmp_path / "killed", max_steps=5)
    original = killed.update

    def update(batches: Any) -> Any:
        if killed.state.step == 3:
            raise OSError("killed")
        return original(batches)

    killed.update = update
    with pytest.raises(OSError, match="killed"):
        killed.fit()
    second = run(tmp_path / "killed")
    second.checkpointer.restore(second, second.checkpointer.last())
    assert second.state.step == 3
    second.fit()
    assert same(expected, lab.weights(base))


def test_the_resumed_optimizer_counts_on(lab, base, run, tmp_path) -> None:
    """Moments and step come back, so the rate goes on where it stood (it restarted elsewhere)."""
    from mlx.utils import tree_flatten

    first = run(tmp_path, max_steps=3)
    first.fit()
    path = first.checkpointer.last()
    states = {name: np.array(value) for name, value in tree_flatten(first.optimizer.state)}
    second = run(tmp_path)
    second.checkpointer.restore(second, path)
    restored = {name: np.array(value) for name, value in tree_flatten(second.optimizer.state)}
    assert same(states, restored)
    assert int(second.optimizer.step.item()) == 3
    trainable = [name for name, _ in tree_flatten(base.model.trainable_parameters())]
    assert sorted(trainable) == sorted(lora.tensors(base.model))


def test_a_checkpoint_of_another_run_is_refused(lab, base, run, tmp_path) -> None:
    """It says what differs, and what it was; the trainer is not touched."""
    first = run(tmp_path, max_steps=2, identity={"lora.rank": 4, "data lock": "abc", "old": 1})
    first.fit()
    second = run(tmp_path, identity={"lora.rank": 8, "data lock": "abc"})
    before = lab.weights(base)
    with pytest.raises(TrainingError) as caught:
        second.checkpointer.restore(second, first.checkpointer.last())
    message = str(caught.value)
    assert "lora.rank was 4 and is 8" in message
    assert "data lock" not in message
    assert "trainer.resume=never" in message
    assert same(before, lab.weights(base))
    assert second.state.step == 0


def test_half_written_checkpoints_are_ignored(run, tmp_path) -> None:
    """A folder without all its files, or under its temporary name, is none."""
    first = run(tmp_path, max_steps=4)
    first.fit()
    folder = first.checkpointer.folder
    shutil.copytree(folder / "step_000004", folder / ".tmp-step_000005")
    shutil.copytree(folder / "step_000004", folder / "step_000006")
    (folder / "step_000006" / "state.json").unlink()
    assert first.checkpointer.last().name == "step_000004"
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        first.checkpointer.restore(first, folder / "step_000006")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"{"),
        ("state.json", b"{}"),
        ("adapter.safetensors", b"\0" * 20),
        ("optimizer.safetensors", b""),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(lab, base, run, tmp_path, file, content) -> None:
    """It once was a traceback; nothing of it is taken."""
    trainer = run(tmp_path, max_steps=2)
    trainer.fit()
    path = trainer.checkpointer.last()
    (path / file).write_bytes(content)
    fresh = run(tmp_path)
    before = lab.weights(base)
    with pytest.raises(TrainingError, match=r"is damaged .*trainer.resume"):
        fresh.checkpointer.restore(fresh, path)
    assert same(before, lab.weights(base))


def test_the_last_two_and_the_best_are_kept(run, tmp_path, monkeypatch) -> None:
    """And none holds a file that an adapter loader would take for an adapter."""
    trainer = run(tmp_path, save_every=1, eval_every=1)
    losses = iter([3.0, 2.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(trainer, "validation_loss", lambda: next(losses))
    trainer.fit()
    folder = trainer.checkpointer.folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best.json", "step_000002", "step_000005", "step_000006"]
    assert trainer.checkpointer.best().name == "step_000002"
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert files.isdisjoint({"adapter_model.safetensors", "adapters.safetensors"})


@pytest.mark.parametrize("where", ["adapter", "state", "rename", "folder"])
def test_a_full_disk_leaves_the_previous_checkpoint(lab, run, tmp_path, monkeypatch, where) -> None:
    """One sentence with the reason and the way on; no half of the new one stays."""
    trainer = run(tmp_path, max_steps=2)
    trainer.fit()
    before = {p: p.read_bytes() for p in trainer.checkpointer.folder.rglob("*") if p.is_file()}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: Any, **__: Any) -> None:
        raise full

    def fail_as_mlx(path: Path, values: Any) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 390092 bytes to file.")

    if where == "adapter":
        monkeypatch.setattr(checkpoint, "_save_tensors", fail_as_mlx)
    elif where == "state":
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif where == "rename":
        monkeypatch.setattr(os, "rename", fail)
    else:
        monkeypatch.setattr(Path, "mkdir", fail)
    trainer.state.step = 5
    with pytest.raises(TrainingError) as caught:
        trainer.checkpointer.save(trainer)
    monkeypatch.undo()
    message = str(caught.value)
    assert "step_000005 could not be written" in message
    assert "Unable to write" in message or "No space left on device" in message
    assert "\n" not in message
    after = {p: p.read_bytes() for p in trainer.checkpointer.folder.rglob("*") if p.is_file()}
    assert after == before
    assert trainer.checkpointer.last().name == "step_000002"


def test_an_adapter_alone_is_loaded_from_a_checkpoint(lab, base, run, tmp_path) -> None:
    """For the best checkpoint at the end of a run."""
    trainer = run(tmp_path, max_steps=2)
    trainer.fit()
    expected = lab.weights(base)
    other = run(tmp_path)
    assert not same(expected, lab.weights(base))
    other.checkpointer.load_adapter(trainer.checkpointer.last(), base.model)
    assert same(expected, lab.weights(base))

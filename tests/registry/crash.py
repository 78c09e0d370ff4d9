"""Kills operations of the registry at every step that touches the disk; run as a script.

    python -m registry.crash FOLDER OPERATION

Each step is counted: every call of the operating system that changes or flushes something, and the
middle of every write. For n = 1, 2, … a forked process runs the operation and dies at its n-th
step, as by SIGKILL, until one lives through all of them. After each death the registry is looked
at as it is, then by the next command, then after the operation was done again. What is found wrong
is printed, one JSON line a finding; the last line counts the deaths.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mondrian_ft import registry
from mondrian_ft.registry import Rules, store

from .made import NAME, adapter, comparison

STEPS = ("replace", "rename", "link", "symlink", "unlink", "rmdir", "mkdir", "chmod")
STEPS += ("fsync", "truncate", "ftruncate")


class Place:
    """A registry with its mirror, and the adapters that go into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root, self.models = folder / "registry", folder / "models"

    def prepare(self) -> None:
        """v1 to v4, of which production was v1 and is v2; v5 and a report wait outside."""
        for seed in range(1, 5):
            self.register(seed, against=2)
        for version in ("v1", "v2"):
            self.promote(version, force=True, reason="first")
        adapter(self.folder / "adapter-5", 5, against=2)
        report = comparison(4, against=2, date="2026-05-05")
        (self.folder / "report.json").write_text(json.dumps(report))

    def register(self, seed: int, **report: Any) -> None:
        source = self.folder / f"adapter-{seed}"
        if not source.exists():
            adapter(source, seed, **report)
        registry.register(self.root, NAME, source, facts={"seed": seed}, mirror=self.models)

    def promote(self, version: str, **how: Any) -> None:
        how = {"mirror": self.models} | how
        registry.promote(self.root, NAME, version, "production", Rules(), **how)

    def rollback(self) -> None:
        registry.rollback(self.root, NAME, "production", mirror=self.models)

    def prune(self) -> None:
        registry.prune(self.root, NAME, 1, mirror=self.models)

    def evaluate(self) -> None:
        report = self.folder / "report.json"
        registry.file_report(self.root, NAME, "v4", report, facts={}, mirror=self.models)

    def repair(self) -> None:
        registry.repair(self.root, NAME, mirror=self.models)

    # --- what is there

    def state(self) -> dict[str, Any]:
        """What counts: channels, versions, events; every byte of it checked on the way."""
        entries = registry.history(self.root, NAME)
        channels = {}
        for channel in ("candidate", "production"):
            place = registry.serves(self.root, NAME, channel)
            found = registry.resolve(self.root, NAME, channel)
            assert place is not None
            assert found.name == place.version
            channels[channel] = place.version
        labels = [version.version for version in registry.versions(self.root, NAME)]
        for label in labels:
            registry.resolve(self.root, NAME, label)
        for entry in entries:
            if proof := entry.get("evidence"):
                assert store.sha256_file(self.home / proof["file"]) == proof["sha256"]
        events = [(e["event"], e["version"], e.get("channel")) for e in entries]
        return {"channels": channels, "labels": labels, "events": events}

    def active(self) -> str:
        """The version that the mirror's link leads to, whole."""
        real = (self.models / f"{NAME}-active").resolve(strict=True)
        label = real.name.removeprefix(f"{NAME}-")
        entries = registry.history(self.root, NAME)
        files = next(
            e["files"] for e in entries if e["event"] == "register" and e["version"] == label
        )
        store.check_unchanged(real, files)
        return label

    def leftovers(self) -> list[str]:
        found = [*self.root.rglob(".*"), *self.models.rglob(".*")]
        return sorted(path.name for path in found if path.name != ".lock")

    def copies(self) -> dict[str, Any]:
        """What other programs read: pointers, folders, the mirror."""
        pointers = sorted((self.home / "channels").iterdir())
        return {
            "pointers": {p.stem: json.loads(p.read_text())["version"] for p in pointers},
            "folders": sorted(p.name for p in self.home.glob("v*")),
            "mirror": sorted(p.name for p in (self.models / "versions").iterdir()),
            "active": self.active(),
        }

    @property
    def home(self) -> Path:
        return self.root / NAME


OPERATIONS: dict[str, Callable[[Place], None]] = {
    "register": lambda place: place.register(5),
    "promote": lambda place: place.promote("v4"),
    "refuse": lambda place: place.promote("v1"),
    "rollback": Place.rollback,
    "prune": Place.prune,
    "evaluate": Place.evaluate,
    "repair": Place.repair,
}


def die_at(step: int) -> None:
    """Let this process die at its step of that number."""
    count = 0

    def due() -> bool:
        nonlocal count
        count += 1
        return count == step

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step_of(*args: Any, **kwargs: Any) -> Any:
            if due():
                die()
            return call(*args, **kwargs)

        return step_of

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    write, write_bytes, copyfile = os.write, Path.write_bytes, shutil.copyfile

    def half_write(handle: int, data: bytes) -> int:
        if due():
            die()
        if due():
            write(handle, data[: len(data) // 2])
            die()
        return write(handle, data)

    def half_file(path: Path, data: bytes) -> int:
        if due():
            die()
        if due():
            write_bytes(path, data[: len(data) // 2])
            die()
        return write_bytes(path, data)

    def half_copy(source: Path, target: Path) -> Any:
        if due():
            die()
        if due():
            write_bytes(target, source.read_bytes()[:7])
            die()
        return copyfile(source, target)

    os.write = half_write  # pyright: ignore[reportAttributeAccessIssue]
    Path.write_bytes = half_file  # pyright: ignore[reportAttributeAccessIssue]
    shutil.copyfile = half_copy  # pyright: ignore[reportAttributeAccessIssue]


def killed(place: Place, operation: Callable[[Place], None], step: int) -> bool:
    """Whether the operation, in a process of its own, died at this step."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at(step)
            operation(place)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"step {step} failed instead of dying"
    return False


def leave_planned(place: Place, folder: Path) -> None:
    """Kill a registration when it is planned and not yet in the history, for ``repair`` to do."""
    events, before = len(registry.history(place.root, NAME)), folder / "before"
    shutil.copytree(place.folder, before, symlinks=True)
    step = 0
    while not (place.home / ".pending.json").exists():
        step += 1
        shutil.rmtree(place.folder)
        shutil.copytree(before, place.folder, symlinks=True)
        assert killed(place, OPERATIONS["register"], step)
    assert len(registry.history(place.root, NAME)) == events


def main(folder: Path, name: str) -> int:
    """Prints findings, and returns how many deaths there were."""
    operation = OPERATIONS[name]
    first = Place(folder / "first")
    first.prepare()
    if name == "repair":
        leave_planned(first, folder)
    old = first.state()
    shutil.copytree(folder / "first", folder / "last", symlinks=True)
    last = Place(folder / "last")
    operation(last)
    new = last.state()
    after = last.copies()
    events = len(new["events"]) - len(old["events"])
    assert events == 1
    step = 0
    while True:
        step += 1
        copy = folder / str(step)
        shutil.copytree(folder / "first", copy, symlinks=True)
        place = Place(copy)
        if not killed(place, operation, step):
            return step - 1

        def expect(holds: bool, what: str, *more: Any, at: int = step) -> None:
            if not holds:
                print(json.dumps({"step": at, "what": what, "more": [repr(m) for m in more]}))

        try:
            seen = place.state()
            expect(seen in (old, new), "as it was left", seen)
            active = place.active()
            possible = {old["channels"]["production"], new["channels"]["production"]}
            expect(active in possible, "the link as it was left", active)
            place.repair()
            mended = place.state()
            expect(mended in (old, new), "after the next command", mended)
            expect(mended == new or seen == old, "what counted is lost", seen, mended)
            expect(place.leftovers() == [], "left over", place.leftovers())
            whole = place.copies()
            meant = mended["channels"]
            expect(whole["pointers"] == meant, "pointers", whole, meant)
            expect(whole["active"] == meant["production"], "link", whole, meant)
            expect(whole["folders"] == sorted(mended["labels"]), "folders", whole, mended)
            named = sorted(f"{NAME}-{label}" for label in mended["labels"])
            expect(whole["mirror"] == named, "mirrored folders", whole, named)
            if mended == old:
                operation(place)
                expect(place.state() == new, "done again", place.state())
                expect(place.copies() == after, "copies when done again", place.copies(), after)
        except Exception as error:
            expect(False, f"{type(error).__name__}: {error}")
        shutil.rmtree(copy)


if __name__ == "__main__":
    print(json.dumps({"deaths": main(Path(sys.argv[1]), sys.argv[2])}))

"""Channels move on evidence, go back in one step, and what they need is never pruned."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft import registry
from mondrian_ft.errors import RegistryError
from mondrian_ft.registry import (
    Lock,
    Outcome,
    Rules,
    history,
    journal,
    mirror,
    promote,
    prune,
    rollback,
    serves,
)

from .made import LOCK, NAME, adapter, comparison


class Shelf:
    """A registry to move things in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "r"

    def add(self, seed: int, **report: Any) -> str:
        source = adapter(self.folder / f"adapter-{seed}", seed, **report)
        return registry.register(self.root, NAME, source, facts={}).version

    def judge(self, version: str, seed: int, **report: Any) -> None:
        path = self.folder / "report.json"
        path.write_text(json.dumps(comparison(seed, **report)))
        assert registry.file_report(self.root, NAME, version, path, facts={})

    def promote(self, version: str, **how: Any) -> Outcome:
        return promote(self.root, NAME, version, "production", how.pop("rules", Rules()), **how)

    def force(self, *versions: str) -> None:
        for version in versions:
            assert self.promote(version, force=True, reason="for the test").moved

    def rollback(self) -> str:
        return rollback(self.root, NAME, "production")[1].version

    @property
    def production(self) -> str | None:
        place = serves(self.root, NAME, "production")
        if place is None:
            return None
        assert registry.resolve(self.root, NAME, "production").name == place.version
        return place.version

    @property
    def last(self) -> dict[str, Any]:
        return history(self.root, NAME)[-1]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_the_first_is_judged_against_its_base(shelf: Shelf) -> None:
    """And the decision is kept, with its reasons, by whom and when."""
    shelf.add(1)
    done = shelf.promote("candidate")
    assert (done.version, done.before, done.moved, done.forced) == ("v1", None, True, False)
    assert shelf.production == "v1"
    entry = shelf.last
    assert (entry["event"], entry["channel"], entry["version"]) == ("promote", "production", "v1")
    assert entry["by"] == registry.who()
    assert entry["at"].startswith("20")
    assert [reason["passed"] for reason in entry["reasons"]] == [True] * 8
    assert entry["rules"] == {"inconclusive": "refuse", "no_worse": "refuse", "latency": 0.1}
    assert entry["evidence_sha256"] == history(shelf.root, NAME)[0]["evidence"]["sha256"]


def test_promoting_what_is_there_changes_nothing(shelf: Shelf) -> None:
    """There is nothing to decide."""
    shelf.add(1)
    shelf.force("v1")
    before = history(shelf.root, NAME)
    done = shelf.promote("v1")
    assert (done.moved, done.decision) == (False, None)
    assert history(shelf.root, NAME) == before


def test_a_worse_one_is_refused_and_that_is_kept_too(shelf: Shelf) -> None:
    """The channel stays where it is."""
    shelf.add(1)
    shelf.force("v1")
    shelf.add(2, against=1, gain=-1.0, state="worse")
    done = shelf.promote("v2")
    assert not done.moved
    assert shelf.production == "v1"
    entry = shelf.last
    assert (entry["event"], entry["version"], entry["channel"]) == ("refuse", "v2", "production")
    assert entry["from"]["version"] == "v1"
    assert [r["rule"] for r in entry["reasons"] if not r["passed"]] == ["score"]


def test_evidence_has_to_be_against_what_is_served_now(shelf: Shelf) -> None:
    """v3 was compared with v1, and v2 came in between."""
    shelf.add(1)
    shelf.force("v1")
    shelf.add(2, against=1)
    shelf.add(3, against=1)
    assert shelf.promote("v2").moved
    done = shelf.promote("v3")
    assert not done.moved
    assert done.decision is not None
    assert not done.decision.fits
    assert done.data == "/data/training_data_ansel_test.json"
    assert "no comparison with v2" in done.decision.against[0]
    shelf.judge("v3", 3, against=2)
    assert shelf.promote("v3").moved
    assert shelf.production == "v3"


def test_never_evaluated(shelf: Shelf) -> None:
    """No report, no promotion."""
    shelf.add(1, evaluated=False)
    done = shelf.promote("v1")
    assert done.decision is not None
    assert "never evaluated" in done.decision.against[0]
    assert shelf.production is None


def test_the_newest_evidence_counts_not_the_best(shelf: Shelf) -> None:
    """Evaluating until it looks good does not help: the last word is the last one."""
    shelf.add(1)
    shelf.judge("v1", 1, gain=0.0, state="inconclusive", date="2026-02-02")
    assert not shelf.promote("v1").moved
    shelf.judge("v1", 1, date="2026-03-03")
    assert shelf.promote("v1").moved


def test_a_look_at_a_few_rows_takes_nothing_away(shelf: Shelf) -> None:
    """eval.max_examples=4 after an evaluation of all rows once left only the four to go by."""
    shelf.add(1)
    shelf.judge("v1", 1, rows=4, gain=0.5, state="inconclusive", date="2026-02-02")
    done = shelf.promote("v1")
    assert done.moved
    assert done.decision is not None
    assert "18 of 18 rows" in done.decision.reasons[1].sentence
    shelf.add(2, against=1, rows=4)
    shelf.judge("v2", 2, against=1, state="worse", gain=-1.0)
    assert not shelf.promote("v2").moved, "nor does a lucky look at a few count"


def test_the_data_lock_is_the_current_one(shelf: Shelf) -> None:
    """The config's if it names one, else that of the newest evaluation here, of any version."""
    shelf.add(1)
    other = Lock("1" * 64, "of split.lock.json")
    done = shelf.promote("v1", lock=other)
    assert done.decision is not None
    assert "the current one is 111111111111 (of split.lock.json)" in done.decision.against[0]
    shelf.add(2, lock="2" * 64)
    done = shelf.promote("v1")
    assert done.decision is not None
    assert "the newest evaluation here, of v2" in done.decision.against[0]
    assert shelf.promote("v1", lock=Lock(LOCK, "of split.lock.json")).moved


def test_force_needs_a_reason_and_keeps_it(shelf: Shelf) -> None:
    """Whoever overrules the gate says why, and what the gate said is kept beside it."""
    shelf.add(1, evaluated=False)
    for reason in (None, "  "):
        with pytest.raises(RegistryError, match=r"task\.reason"):
            shelf.promote("v1", force=True, reason=reason)
    done = shelf.promote("v1", force=True, reason="shown by hand")
    assert (done.moved, done.forced) == (True, True)
    assert (shelf.last["reason"], shelf.last["forced"]) == ("shown by hand", True)
    assert shelf.last["passed"] is False


def test_force_where_none_is_needed(shelf: Shelf) -> None:
    """A promotion that the gate allows is not forced, whatever was typed."""
    shelf.add(1)
    assert not shelf.promote("v1", force=True, reason="to be sure").forced


def test_changed_evidence_is_none(shelf: Shelf) -> None:
    """A report that somebody improved afterwards is told."""
    shelf.add(1)
    path = shelf.root / NAME / shelf.last["evidence"]["file"]
    path.chmod(0o644)
    path.write_text(path.read_text().replace("1.6", "2.6"))
    with pytest.raises(RegistryError, match="was changed after it was filed"):
        shelf.promote("v1")
    path.unlink()
    with pytest.raises(RegistryError, match="cannot be read"):
        shelf.promote("v1")
    assert shelf.production is None


def test_a_report_that_lacks_something(shelf: Shelf) -> None:
    """One made by hand, or by another program, is told and not taken for a fault of ours."""
    source = adapter(shelf.folder / "a", 1)
    path = source / registry.REPORT
    report = json.loads(path.read_text())
    del report["evidence"]["change"]["score"]["state"]
    path.write_text(json.dumps(report))
    registry.register(shelf.root, NAME, source, facts={})
    with pytest.raises(RegistryError, match=r"is no report of this program's .*'state'"):
        shelf.promote("v1")


# --- back


def test_back_and_further_back(shelf: Shelf) -> None:
    """Each rollback goes one step further; at the beginning it says so and changes nothing."""
    for seed in (1, 2, 3):
        shelf.add(seed)
    shelf.force("v1", "v2", "v3")
    assert [shelf.rollback(), shelf.rollback()] == ["v2", "v1"]
    assert shelf.production == "v1"
    before = history(shelf.root, NAME)
    with pytest.raises(RegistryError, match="means v1 and there is nothing before"):
        shelf.rollback()
    assert history(shelf.root, NAME) == before
    assert shelf.last["event"] == "rollback"
    assert (shelf.last["version"], shelf.last["from"]["version"]) == ("v1", "v2")


def test_what_was_rolled_back_from_is_not_gone_back_to(shelf: Shelf) -> None:
    """v1, v2, back to v1, v3: before v3 was v1, and v2 is no way back."""
    for seed in (1, 2, 3):
        shelf.add(seed)
    shelf.force("v1", "v2")
    assert shelf.rollback() == "v1"
    shelf.force("v3")
    assert shelf.rollback() == "v1"


def test_there_and_back_and_there(shelf: Shelf) -> None:
    """Promoting an old one is a step like any other."""
    for seed in (1, 2):
        shelf.add(seed)
    shelf.force("v1", "v2", "v1")
    assert [shelf.rollback(), shelf.rollback()] == ["v2", "v1"]


def test_an_empty_channel_has_no_way_back(shelf: Shelf) -> None:
    """Nor has the candidate, which registering sets anew."""
    shelf.add(1)
    shelf.add(2)
    with pytest.raises(RegistryError, match="is empty"):
        shelf.rollback()
    with pytest.raises(RegistryError, match="means v2 and there is nothing before"):
        rollback(shelf.root, NAME, "candidate")


def test_no_way_back_to_a_damaged_version(shelf: Shelf) -> None:
    """The channel stays on one that is whole."""
    for seed in (1, 2):
        shelf.add(seed)
    shelf.force("v1", "v2")
    (shelf.root / NAME / "v1" / "adapter_config.json").unlink()
    with pytest.raises(RegistryError, match=r"v1/adapter_config\.json is missing"):
        shelf.rollback()
    assert shelf.production == "v2"


# --- two at once


def test_two_at_once(shelf: Shelf, monkeypatch) -> None:
    """Both were judged against v1 and wait at one door: one wins, the other is told."""
    shelf.add(1)
    shelf.force("v1")
    shelf.add(2, against=1)
    shelf.add(3, against=1)
    gate = threading.Barrier(2)
    locked = journal.locked

    def together(home: Path):
        gate.wait(10)
        return locked(home)

    monkeypatch.setattr(journal, "locked", together)
    done: dict[str, Outcome] = {}

    def work(version: str) -> None:
        done[version] = shelf.promote(version)

    threads = [threading.Thread(target=work, args=(version,)) for version in ("v2", "v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    (won,) = [version for version, outcome in done.items() if outcome.moved]
    (lost,) = [outcome for outcome in done.values() if not outcome.moved]
    assert shelf.production == won
    assert lost.meanwhile is not None
    assert f"Meanwhile production became {won} by {registry.who()}" in lost.meanwhile
    assert lost.decision is not None
    assert lost.meanwhile in lost.decision.against
    assert [e["event"] for e in history(shelf.root, NAME)][-2:] == ["promote", "refuse"]


# --- clearing away


def test_pruning_spares_what_is_needed(shelf: Shelf) -> None:
    """What a channel means stays, and what a rollback could come to, unless told otherwise."""
    for seed in range(1, 7):
        shelf.add(seed)
    shelf.force("v1", "v3")
    gone, kept = prune(shelf.root, NAME, 1)
    assert gone == ["v2", "v4", "v5"]
    assert kept == {"v1": "a rollback of production could come to it", "v3": "production means it"}
    assert [v.version for v in registry.versions(shelf.root, NAME)] == ["v1", "v3", "v6"]
    assert not (shelf.root / NAME / "v2").exists()
    assert shelf.last["versions"].keys() == {"v2", "v4", "v5"}
    assert shelf.last["by"] == registry.who()
    gone, kept = prune(shelf.root, NAME, 1, force=True)
    assert (gone, kept) == (["v1"], {"v3": "production means it"})
    assert shelf.production == "v3"
    with pytest.raises(RegistryError, match="nothing before"):
        shelf.rollback()
    with pytest.raises(RegistryError, match=r"v1 .*was pruned"):
        registry.resolve(shelf.root, NAME, "v1")
    assert shelf.add(7) == "v7", "numbers are not given twice"


def test_nothing_to_prune(shelf: Shelf) -> None:
    """Then nothing is written either."""
    shelf.add(1)
    before = history(shelf.root, NAME)
    assert prune(shelf.root, NAME, 3) == ([], {})
    assert history(shelf.root, NAME) == before


def test_a_pruned_version_can_come_back(shelf: Shelf) -> None:
    """As another number."""
    for seed in (1, 2):
        shelf.add(seed)
    assert prune(shelf.root, NAME, 1)[0] == ["v1"]
    source = shelf.folder / "adapter-1"
    made = registry.register(shelf.root, NAME, source, facts={})
    assert (made.version, made.fresh) == ("v3", True)


# --- the workbook's layout


def test_the_mirror_follows(shelf: Shelf) -> None:
    """versions/<name>-vN as folders, <name>-active as a link that is swapped, never absent."""
    models = shelf.folder / "models"
    for seed in (1, 2):
        source = adapter(shelf.folder / str(seed), seed)
        registry.register(shelf.root, NAME, source, facts={}, mirror=models)
    folder = models / "versions" / f"{NAME}-v1"
    assert folder.is_dir()
    assert not folder.is_symlink()
    active = models / f"{NAME}-active"
    assert not active.is_symlink(), "nothing is in production yet"
    how: dict[str, Any] = {"force": True, "reason": "x", "mirror": models}
    for version in ("v1", "v2"):
        shelf.promote(version, **how)
        assert active.readlink() == Path("versions") / f"{NAME}-{version}"
        own = shelf.root / NAME / version / "adapter_model.safetensors"
        assert (active / "adapter_model.safetensors").read_bytes() == own.read_bytes()
        assert (active / "adapter_model.safetensors").samefile(own), "a hard link"
    rollback(shelf.root, NAME, "production", mirror=models)
    assert active.resolve().name == f"{NAME}-v1"
    shelf.add(3)
    prune(shelf.root, NAME, 1, mirror=models)
    names = {path.name for path in (models / "versions").iterdir()}
    assert names == {f"{NAME}-v1", f"{NAME}-v3"}


def test_the_mirror_copies_where_links_are_not_possible(shelf: Shelf, monkeypatch) -> None:
    """Another file system, say; the copies are read-only too."""

    def link(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(mirror.os, "link", link)
    models = shelf.folder / "models"
    source = adapter(shelf.folder / "a", 1)
    registry.register(shelf.root, NAME, source, facts={}, mirror=models)
    copy = models / "versions" / f"{NAME}-v1" / "adapter_model.safetensors"
    assert copy.read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    assert copy.stat().st_mode & 0o222 == 0


def test_what_is_in_the_mirrors_way(shelf: Shelf) -> None:
    """Folders made by hand are not overwritten; the event counts all the same, and that is told."""
    models = shelf.folder / "models"
    (models / f"{NAME}-active").mkdir(parents=True)
    source = adapter(shelf.folder / "a", 1)
    with pytest.raises(RegistryError, match=r"is done and counts.*is no link"):
        registry.register(shelf.root, NAME, source, facts={}, mirror=models)
    (models / f"{NAME}-active").rmdir()
    registry.repair(shelf.root, NAME, mirror=models)
    other = adapter(shelf.folder / "b", 2)
    adapter(models / "versions" / f"{NAME}-v2", 9)
    with pytest.raises(RegistryError, match=f"{NAME}-v2 is there already and is not v2"):
        registry.register(shelf.root, NAME, other, facts={}, mirror=models)
    assert registry.resolve(shelf.root, NAME, "candidate").name == "v2"


def test_the_workbooks_own_copy_is_left_alone(shelf: Shelf) -> None:
    """Its cp -r of the same adapter is that version already."""
    models = shelf.folder / "models"
    mine = adapter(models / "versions" / f"{NAME}-v1", 1)
    registry.register(shelf.root, NAME, mine, facts={}, mirror=models)
    assert (mine / "adapter_config.json").stat().st_mode & 0o222, "still the person's own file"

"""Registering: numbered, unchangeable, whole, and nothing that is not what it says."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mondrian_ft import registry
from mondrian_ft.errors import MondrianError, RegistryError
from mondrian_ft.registry import (
    chain,
    evidence,
    history,
    journal,
    register,
    resolve,
    store,
    versions,
)

from .made import BASE, LOCK, NAME, adapter, comparison, digest, weights


def test_numbers_and_channels(tmp_path: Path) -> None:
    """v1, v2, … in order; the channel means the latest; figures come from the report."""
    root = tmp_path / "registry"
    first = register(root, NAME, adapter(tmp_path / "a", 1), facts={"run": "one"})
    second = register(root, NAME, adapter(tmp_path / "b", 2, evaluated=False), facts={})
    assert (first.version, first.channels, first.fresh) == ("v1", ("candidate",), True)
    found = versions(root, NAME)
    assert [v.version for v in found] == ["v1", "v2"]
    assert [v.hash for v in found] == [digest(1), digest(2)]
    assert [v.channels for v in found] == [(), ("candidate",)]
    assert found[0].metrics == {
        "verdict": "better",
        "n": 18,
        "format_strict": 1.0,
        "score_mae": 0.7,
        "base_format_strict": 1.0,
        "base_score_mae": 2.9,
    }
    assert found[1].metrics is None
    trained = {"base": BASE["name"], "advisor": "ansel", "rows": 87, "data_lock": LOCK}
    assert found[1].trained == trained
    assert json.loads(json.dumps([v.as_dict() for v in found]))[1]["channels"] == ["candidate"]
    assert resolve(root, NAME, "candidate") == second.path == root / NAME / "v2"
    assert resolve(root, NAME, "v1") == first.path


def test_ten_comes_after_nine(tmp_path: Path) -> None:
    """Versions are ordered as numbers."""
    for seed in range(11):
        register(tmp_path / "r", NAME, adapter(tmp_path / str(seed), seed), facts={})
    assert [v.version for v in versions(tmp_path / "r", NAME)][-2:] == ["v10", "v11"]


def test_copied_whole_and_read_only(tmp_path: Path) -> None:
    """A version is the adapter directory, without checkpoints, and not writable by accident."""
    source = adapter(tmp_path / "a")
    (source / ".cache").mkdir()
    made = register(tmp_path / "r", NAME, source, facts={})
    names = {p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file()}
    assert names == {*registry.REQUIRED, "evaluation/comparison_report.json"}
    for name in names:
        assert (made.path / name).stat().st_mode & 0o222 == 0
        assert (made.path / name).read_bytes() == (source / name).read_bytes()
    (entry,) = history(tmp_path / "r", NAME)
    assert set(entry["files"]) == names
    proof = tmp_path / "r" / NAME / entry["evidence"]["file"]
    assert proof.read_bytes() == (source / registry.REPORT).read_bytes()
    assert proof.stat().st_mode & 0o222 == 0


def test_same_adapter_once(tmp_path: Path) -> None:
    """Registering the same hash again returns its version, says so, and changes nothing."""
    source = adapter(tmp_path / "a")
    register(tmp_path / "r", NAME, source, facts={})
    again = register(tmp_path / "r", NAME, source, facts={})
    assert (again.version, again.fresh) == ("v1", False)
    assert len(history(tmp_path / "r", NAME)) == 1


def test_history_tells_and_cannot_be_changed(tmp_path: Path) -> None:
    """Every registration is a line with its facts; a changed or missing line is noticed."""
    for seed in range(3):
        source = adapter(tmp_path / str(seed), seed)
        register(tmp_path / "r", NAME, source, facts={"run": str(seed)})
    told = history(tmp_path / "r", NAME)
    assert [(e["number"], e["version"], e["facts"]["run"]) for e in told] == [
        (1, "v1", "0"),
        (2, "v2", "1"),
        (3, "v3", "2"),
    ]
    path = tmp_path / "r" / NAME / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    new = adapter(tmp_path / "new", 9)
    for number, changed in (
        (2, [lines[0], lines[1].replace('"run": "1"', '"run": "x"'), lines[2]]),
        (2, [lines[0], lines[2]]),
        (1, lines[1:]),
        (3, [lines[0], lines[1], "nonsense\n"]),
    ):
        path.write_text("".join(changed))
        for action in (
            lambda: history(tmp_path / "r", NAME),
            lambda: register(tmp_path / "r", NAME, new, facts={}),
            lambda: resolve(tmp_path / "r", NAME, "candidate"),
            lambda: versions(tmp_path / "r", NAME),
        ):
            with pytest.raises(RegistryError, match=f"Line {number} of"):
                action()


def test_a_report_comes_later(tmp_path: Path) -> None:
    """Evaluating a registered version adds evidence and leaves its directory alone."""
    root = tmp_path / "r"
    made = register(root, NAME, adapter(tmp_path / "a", evaluated=False), facts={})
    before = store.files_of(made.path)
    report = tmp_path / "report.json"
    report.write_text(json.dumps(comparison(0)))
    assert registry.file_report(root, NAME, "candidate", report, facts={"run": "x"})
    assert not registry.file_report(root, NAME, "v1", report, facts={}), "the same once"
    assert store.files_of(made.path) == before
    metrics = versions(root, NAME)[0].metrics
    assert metrics is not None
    assert metrics["score_mae"] == 0.7
    entry = history(root, NAME)[-1]
    assert (entry["event"], entry["version"], entry["facts"]) == ("evaluate", "v1", {"run": "x"})
    assert (root / NAME / entry["evidence"]["file"]).read_bytes() == report.read_bytes()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps(comparison(7)), "is of the adapter"),
        ("{}", "no comparison report"),
        ("[1]", "no comparison report"),
        ("{", "no comparison report"),
    ],
)
def test_a_report_that_is_no_evidence(tmp_path: Path, content: str, told: str) -> None:
    """One about another adapter, and one that is none, are refused and named."""
    register(tmp_path / "r", NAME, adapter(tmp_path / "a"), facts={})
    report = tmp_path / "report.json"
    report.write_text(content)
    with pytest.raises(RegistryError, match=told):
        registry.file_report(tmp_path / "r", NAME, "v1", report, facts={})
    assert len(history(tmp_path / "r", NAME)) == 1


def test_a_foreign_report_in_the_directory(tmp_path: Path) -> None:
    """It is copied with the rest, as it lay there, and is no evidence."""
    source = adapter(tmp_path / "a", evaluated=False)
    (source / "evaluation").mkdir()
    (source / registry.REPORT).write_text(json.dumps(comparison(7)))
    made = register(tmp_path / "r", NAME, source, facts={})
    assert made.metrics is None
    assert (made.path / registry.REPORT).is_file()
    assert history(tmp_path / "r", NAME)[0]["evidence"] is None


# --- what is no adapter


def edit(name: str, **values: object) -> Callable[[Path], None]:
    """A hand that changes keys of a JSON file."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return spoil


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


WEIGHTS = "adapter_model.safetensors"
FLIPPED = weights()[:-5] + bytes([weights()[-5] ^ 1]) + weights()[-4:]
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config"),
    "no hash": (write("manifest.json", b"{}"), "has no 'hash'"),
    "a hash that is none": (edit("manifest.json", hash="zz"), "64 hex"),
    "no object": (write("manifest.json", b"[]"), "no JSON object"),
    "no JSON": (write("manifest.json", b"{"), "cannot be read"),
    "hash edited": (edit("manifest.json", hash="a" * 64), "damaged or the manifest was edited"),
    "scale edited": (edit("manifest.json", lora={"scale": 4.0}), "the manifest was edited"),
    "scale gone": (edit("manifest.json", lora={}), r"lora\.scale is None"),
    "scale no number": (edit("manifest.json", lora={"scale": float("nan")}), "is nan"),
    "alpha edited": (edit("adapter_config.json", lora_alpha=8.0), "one of them was edited"),
    "rank gone": (edit("adapter_config.json", r=None), "r is None"),
    "truncated": (write(WEIGHTS, weights()[:-7]), "is cut off"),
    "truncated in the header": (write(WEIGHTS, weights()[:40]), "cut off in its header"),
    "empty": (write(WEIGHTS, b""), "0 bytes"),
    "a bit flipped": (write(WEIGHTS, FLIPPED), "the weights were damaged"),
    "a bit flipped in the header": (
        write(WEIGHTS, weights().replace(b'"shape"', b'"shapf"')),
        "damaged header",
    ),
    "more after the end": (write(WEIGHTS, weights() + b"x"), "goes on after"),
    "a pickle": (write(WEIGHTS, pickle.dumps({"a": [1.0]})), "is a pickle"),
    "an archive of torch": (write(WEIGHTS, b"PK\x03\x04" + bytes(60)), "is a pickle"),
    "a link outside": (
        lambda f: (f / "more.txt").symlink_to("/etc/hostname"),
        "leads outside its folder",
    ),
    "a folder outside": (
        lambda f: (f / "more").symlink_to(f.parent, target_is_directory=True),
        "leads outside its folder",
    ),
    "a link to nothing": (lambda f: (f / "more").symlink_to("gone"), "does not exist"),
    "a link to itself": (lambda f: (f / "more").symlink_to("more"), "leads in a circle"),
    "the weights in a circle": (
        lambda f: circle(f / WEIGHTS),
        "leads in a circle",
    ),
    "a folder in itself": (
        lambda f: (f / "evaluation" / "up").symlink_to(f, target_is_directory=True),
        "a circle",
    ),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "neither a file nor a folder"),
    "no report": (write("evaluation/comparison_report.json", b"{"), "no comparison report"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_no_adapter_directory(tmp_path: Path, case: str) -> None:
    """What is no whole adapter is refused, named, and leaves nothing behind."""
    spoil, named = SPOILT[case]
    source = adapter(tmp_path / "a")
    spoil(source)
    with pytest.raises(RegistryError, match=named) as caught:
        register(tmp_path / "r", NAME, source, facts={})
    assert str(source) in str(caught.value) or "comparison_report" in str(caught.value)
    assert versions(tmp_path / "r", NAME) == []
    left = list((tmp_path / "r" / NAME).iterdir()) if (tmp_path / "r").exists() else []
    assert [path.name for path in left] in ([], [".lock"])


def test_a_link_within_is_a_file(tmp_path: Path) -> None:
    """What a link within the directory means is copied, and the copy is no link."""
    source = adapter(tmp_path / "a")
    (source / "again.json").symlink_to("manifest.json")
    made = register(tmp_path / "r", NAME, source, facts={})
    assert not (made.path / "again.json").is_symlink()
    assert (made.path / "again.json").read_bytes() == (source / "manifest.json").read_bytes()


def test_a_directory_that_is_a_link(tmp_path: Path) -> None:
    """The workbook's <name>-active is one."""
    adapter(tmp_path / "a")
    (tmp_path / "active").symlink_to("a", target_is_directory=True)
    assert register(tmp_path / "r", NAME, tmp_path / "active", facts={}).version == "v1"


def test_missing_folder(tmp_path: Path) -> None:
    """A folder that is not there is named."""
    with pytest.raises(RegistryError, match="does not exist"):
        register(tmp_path, NAME, tmp_path / "nowhere", facts={})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    """A name cannot lead out of the registry."""
    with pytest.raises(RegistryError, match=r"registry\.name"):
        versions(tmp_path, name)


@pytest.mark.parametrize("channel", ["", "../x", "v3"])
def test_channel_names(tmp_path: Path, channel: str) -> None:
    """A channel is a word, and no version."""
    with pytest.raises(RegistryError, match="channel"):
        register(tmp_path, NAME, adapter(tmp_path / "a"), facts={}, channel=channel)


def test_unknown_reference(tmp_path: Path) -> None:
    """A misspelled channel is answered with the near one."""
    with pytest.raises(RegistryError, match="nothing yet"):
        resolve(tmp_path / "r", NAME, "candidate")
    register(tmp_path / "r", NAME, adapter(tmp_path / "a"), facts={})
    with pytest.raises(RegistryError, match="did you mean candidate"):
        resolve(tmp_path / "r", NAME, "candidat")


# --- what was changed afterwards


def overwrite(path: Path) -> None:
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: overwrite(f / WEIGHTS), "adapter_model.safetensors was changed"),
        (lambda f: overwrite(f / "manifest.json"), "manifest.json was changed"),
        (lambda f: overwrite(f / registry.REPORT), "comparison_report.json was changed"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "new.txt").write_text(""), "new.txt was added"),
    ],
)
def test_a_changed_byte_is_told(tmp_path: Path, spoil: Callable[[Path], None], told: str) -> None:
    """A version that is no longer what was registered is not served, and the file is named."""
    made = register(tmp_path / "r", NAME, adapter(tmp_path / "a"), facts={})
    spoil(made.path)
    for ref in ("candidate", "v1"):
        with pytest.raises(RegistryError, match=told):
            resolve(tmp_path / "r", NAME, ref)
    with pytest.raises(RegistryError, match=told):
        registry.promote(tmp_path / "r", NAME, "v1", "production", registry.Rules())
    assert registry.serves(tmp_path / "r", NAME, "production") is None


def test_foreign_folder(tmp_path: Path) -> None:
    """A version nobody registered is not passed off as one."""
    adapter(tmp_path / "r" / NAME / "v1")
    assert versions(tmp_path / "r", NAME) == []
    with pytest.raises(RegistryError, match="by hand"):
        register(tmp_path / "r", NAME, adapter(tmp_path / "b", 2), facts={})


def test_a_pointer_edited_by_hand(tmp_path: Path) -> None:
    """Pointers follow the history; the next command writes them again."""
    root = tmp_path / "r"
    for seed in range(2):
        register(root, NAME, adapter(tmp_path / str(seed), seed), facts={})
    pointer = root / NAME / "channels" / "candidate.json"
    good = pointer.read_text()
    pointer.write_text(json.dumps({"version": "v1", "hash": digest(0), "number": 1}))
    assert resolve(root, NAME, "candidate").name == "v2"
    registry.repair(root, NAME, mirror=tmp_path / "models")
    assert pointer.read_text() == good


# --- a disk that is full, and several at once


@pytest.mark.parametrize("step", ["copyfile", "fsync", "write_bytes", "write", "rename"])
def test_full_disk(tmp_path: Path, monkeypatch, step: str) -> None:
    """A disk that fills up, at whatever step, leaves the registry as it was, and it is said."""
    root = tmp_path / "r"
    register(root, NAME, adapter(tmp_path / "a", 1), facts={})
    before = sorted(path.name for path in (root / NAME).rglob("*"))
    source = adapter(tmp_path / "b", 2)

    def full(*args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    owner = {"copyfile": store.shutil, "write_bytes": Path}.get(step, os)
    with (
        monkeypatch.context() as patched,
        pytest.raises(MondrianError, match="No space left") as caught,
    ):
        patched.setattr(owner, step, full)
        register(root, NAME, source, facts={})
    assert "as it was" in str(caught.value)
    assert [v.version for v in versions(root, NAME)] == ["v1"]
    assert resolve(root, NAME, "candidate").name == "v1"
    again = register(root, NAME, source, facts={})
    assert (again.version, again.fresh) == ("v2", True)
    after = sorted(path.name for path in (root / NAME).rglob("*"))
    assert set(before) <= set(after)
    assert not [name for name in after if name.startswith((".tmp-", ".pending"))]


def test_a_disk_that_does_not_flush(tmp_path: Path, monkeypatch) -> None:
    """A folder's flush that failed after the very first line once left a line without its version.

    Whichever flush fails: either the version counts and is whole, or there is none.
    """
    flush, source = store.flush, adapter(tmp_path / "a", 1)
    seen = set()
    for failing in range(1, 40):
        root, count = tmp_path / str(failing), 0

        def broken(path: Path, failing: int = failing) -> None:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(5, "Input/output error", str(path))
            flush(path)

        with monkeypatch.context() as patched:
            for module in (store, chain, journal, evidence):
                patched.setattr(module, "flush", broken)
            try:
                register(root, NAME, source, facts={})
                told = "registered" if count < failing else "silent"
            except RegistryError as error:
                told = "counts" if "is done and counts" in str(error) else "as it was"
        seen.add(told)
        there = [resolve(root, NAME, v.version).name for v in versions(root, NAME)]
        assert there == ([] if told == "as it was" else ["v1"]), (failing, told)
        registry.repair(root, NAME)
        assert [v.version for v in versions(root, NAME)] == there
    assert seen == {"registered", "counts", "as it was"}


def test_full_disk_after_the_line(tmp_path: Path, monkeypatch) -> None:
    """What is in the history counts; what could not follow is told, and made up for."""
    root = tmp_path / "r"
    source = adapter(tmp_path / "a", 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "pointer")

    with (
        monkeypatch.context() as patched,
        pytest.raises(RegistryError, match=r"is done and counts.*No space left"),
    ):
        patched.setattr(journal, "_remove", full)
        register(root, NAME, source, facts={})
    assert resolve(root, NAME, "candidate").name == "v1"
    registry.repair(root, NAME)
    left = {path.name for path in (root / NAME).iterdir()}
    assert left == {".lock", "channels", "evidence", "history.jsonl", "v1"}


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch) -> None:
    """Reading needs no lock; writing says what to set."""
    root = tmp_path / "r"
    register(root, NAME, adapter(tmp_path / "a", 1), facts={})
    monkeypatch.setattr(journal.os, "access", lambda *_: False)
    registry.repair(root, NAME, mirror=tmp_path / "models")
    assert not (tmp_path / "models").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"set registry\.root"):
        register(tmp_path / "file", NAME, adapter(tmp_path / "b", 2), facts={})


def test_many_at_once(tmp_path: Path) -> None:
    """Registrations at the same time get different numbers and one unbroken history."""
    sources = [adapter(tmp_path / str(seed), seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda s: register(tmp_path / "r", NAME, s, facts={}), sources))
    assert sorted(v.version for v in made) == [f"v{n}" for n in range(1, 9)]
    assert len(history(tmp_path / "r", NAME)) == 8


def test_light() -> None:
    """The registry imports the standard library only."""
    code = (
        "import sys, mondrian_ft.registry;"
        "heavy = {'mlx', 'numpy', 'hydra', 'pydantic', 'PIL', 'rich'};"
        "print({m.split('.')[0] for m in sys.modules} & heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

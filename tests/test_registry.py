"""The registry: numbered, unchangeable, complete after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mondrian_ft import registry
from mondrian_ft.errors import MondrianError, RegistryError
from mondrian_ft.registry import history, register, resolve, versions

NAME = "sample-ansel"


def adapter(folder: Path, digit: str, *, evaluated: bool = True) -> Path:
    """An adapter directory whose hash is 64 times a digit."""
    folder.mkdir(parents=True)
    manifest = {
        "hash": digit * 64,
        "base": {"id": "sample"},
        "data_lock": "0" * 64,
        "created": "2026-01-02T03:04:05+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(digit.encode() * 100)
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_000002" / "state.safetensors").write_bytes(b"x")
    if evaluated:
        arms = {
            "base": {"n": 18, "format_strict": 1.0, "score_mae": 2.9},
            "tuned": {"n": 18, "format_strict": 1.0, "score_mae": 0.7},
        }
        (folder / "evaluation").mkdir()
        report = {"evidence": {"verdict": "better", "arms": arms}}
        (folder / "evaluation" / "comparison_report.json").write_text(json.dumps(report))
    return folder


def test_numbers_and_channels(tmp_path: Path) -> None:
    """v1, v2, … in order; the channel means the latest; figures come from the report."""
    root = tmp_path / "registry"
    first = register(root, NAME, adapter(tmp_path / "a", "a"), facts={"run": "one"})
    second = register(root, NAME, adapter(tmp_path / "b", "b", evaluated=False), facts={})
    assert (first.version, first.channels, first.fresh) == ("v1", ("candidate",), True)
    found = versions(root, NAME)
    assert [v.version for v in found] == ["v1", "v2"]
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
    assert json.loads(json.dumps([v.as_dict() for v in found]))[1]["channels"] == ["candidate"]
    assert resolve(root, NAME, "candidate") == second.path == root / NAME / "v2"
    assert resolve(root, NAME, "v1") == first.path


def test_ten_comes_after_nine(tmp_path: Path) -> None:
    """Versions are ordered as numbers."""
    for digit in "0123456789a":
        register(tmp_path / "r", NAME, adapter(tmp_path / digit, digit), facts={})
    assert [v.version for v in versions(tmp_path / "r", NAME)][-2:] == ["v10", "v11"]


def test_copied_whole_and_read_only(tmp_path: Path) -> None:
    """A version is the adapter directory, without checkpoints, and not writable by accident."""
    source = adapter(tmp_path / "a", "a")
    made = register(tmp_path / "r", NAME, source, facts={})
    names = {p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file()}
    assert names == {
        "manifest.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "evaluation/comparison_report.json",
    }
    for name in names:
        assert (made.path / name).stat().st_mode & 0o222 == 0
        assert (made.path / name).read_bytes() == (source / name).read_bytes()
    (entry,) = history(tmp_path / "r", NAME)
    assert set(entry["files"]) == names


def test_same_adapter_once(tmp_path: Path) -> None:
    """Registering the same hash again returns its version, says so, and changes nothing."""
    source = adapter(tmp_path / "a", "a")
    register(tmp_path / "r", NAME, source, facts={})
    again = register(tmp_path / "r", NAME, source, facts={})
    assert (again.version, again.fresh) == ("v1", False)
    assert len(history(tmp_path / "r", NAME)) == 1


def test_history_tells_and_cannot_be_changed(tmp_path: Path) -> None:
    """Every registration is a line with its facts; a changed or missing line is noticed."""
    for digit in "abc":
        register(tmp_path / "r", NAME, adapter(tmp_path / digit, digit), facts={"run": digit})
    told = history(tmp_path / "r", NAME)
    assert [(e["number"], e["version"], e["facts"]["run"]) for e in told] == [
        (1, "v1", "a"),
        (2, "v2", "b"),
        (3, "v3", "c"),
    ]
    path = tmp_path / "r" / NAME / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for number, changed in (
        (2, [lines[0], lines[1].replace('"run": "b"', '"run": "x"'), lines[2]]),
        (2, [lines[0], lines[2]]),
        (1, lines[1:]),
        (3, [lines[0], lines[1], "nonsense\n"]),
    ):
        path.write_text("".join(changed))
        with pytest.raises(RegistryError, match=f"Line {number} of"):
            history(tmp_path / "r", NAME)
        with pytest.raises(RegistryError, match=f"Line {number} of"):
            register(
                tmp_path / "r", NAME, adapter(tmp_path / f"{hash(str(changed))}", "d"), facts={}
            )


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda f: (f / "manifest.json").write_text("{}"), "hash"),
        (lambda f: (f / "manifest.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_no_adapter_directory(tmp_path: Path, spoil, named: str) -> None:
    """What is no adapter directory is refused, named, and leaves nothing behind."""
    source = adapter(tmp_path / "a", "a")
    spoil(source)
    with pytest.raises(RegistryError, match=named):
        register(tmp_path / "r", NAME, source, facts={})
    assert versions(tmp_path / "r", NAME) == []
    assert not (tmp_path / "r").exists()


def test_bad_hash_and_missing_folder(tmp_path: Path) -> None:
    """A hash that is none and a folder that is not there are named."""
    with pytest.raises(RegistryError, match="64 hex"):
        register(tmp_path, NAME, adapter(tmp_path / "z", "z"), facts={})
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
        register(tmp_path, NAME, adapter(tmp_path / "a", "a"), facts={}, channel=channel)


def test_unknown_reference(tmp_path: Path) -> None:
    """A misspelled channel is answered with the near one."""
    with pytest.raises(RegistryError, match="nothing yet"):
        resolve(tmp_path / "r", NAME, "candidate")
    register(tmp_path / "r", NAME, adapter(tmp_path / "a", "a"), facts={})
    with pytest.raises(RegistryError, match="did you mean candidate"):
        resolve(tmp_path / "r", NAME, "candidat")


@pytest.mark.parametrize("crash_in", ["publish_dir", "_append", "fsync"])
def test_crash_and_again(tmp_path: Path, monkeypatch, crash_in: str) -> None:
    """Killed before, between or after copying and writing it down, the next try completes it."""
    root = tmp_path / "r"
    register(root, NAME, adapter(tmp_path / "a", "a"), facts={})
    source = adapter(tmp_path / "b", "b")

    class Killed(BaseException):
        pass

    def kill(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        if crash_in == "fsync":
            # The line is half written when it happens.
            patched.setattr(registry, "_append", _torn(kill))
        else:
            patched.setattr(registry, crash_in, kill)
        register(root, NAME, source, facts={"run": "killed"})
    assert [v.version for v in versions(root, NAME)][:1] == ["v1"]
    assert len(history(root, NAME)) == 1
    again = register(root, NAME, source, facts={"run": "killed"})
    assert again.version == "v2"
    assert [e["facts"] for e in history(root, NAME)] == [{}, {"run": "killed"}]
    assert resolve(root, NAME, "candidate") == root / NAME / "v2"
    left = {path.name for path in (root / NAME).iterdir()}
    assert left == {".lock", "channels", "history.jsonl", "v1", "v2"}


def test_full_disk(tmp_path: Path, monkeypatch) -> None:
    """A disk that fills up while copying leaves the registry as it was."""
    root = tmp_path / "r"
    register(root, NAME, adapter(tmp_path / "a", "a"), facts={})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(MondrianError, match="No space left"):
        patched.setattr(registry.shutil, "copyfile", full)
        register(root, NAME, adapter(tmp_path / "b", "b"), facts={})
    assert [v.version for v in versions(root, NAME)] == ["v1"]
    assert not list((root / NAME).glob(".tmp-*"))


def test_channel_whose_version_was_swapped(tmp_path: Path) -> None:
    """A channel never resolves to another adapter than it was pointed at."""
    made = register(tmp_path / "r", NAME, adapter(tmp_path / "a", "a"), facts={})
    other = json.loads((made.path / "manifest.json").read_text()) | {"hash": "b" * 64}
    (made.path / "manifest.json").unlink()
    (made.path / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(RegistryError, match="not the adapter"):
        resolve(tmp_path / "r", NAME, "candidate")


def test_foreign_folder(tmp_path: Path) -> None:
    """A version nobody registered is not passed off as one."""
    adapter(tmp_path / "r" / NAME / "v1", "a")
    with pytest.raises(RegistryError, match="by hand"):
        register(tmp_path / "r", NAME, adapter(tmp_path / "b", "b"), facts={})


def test_many_at_once(tmp_path: Path) -> None:
    """Registrations at the same time get different numbers and one unbroken history."""
    sources = [adapter(tmp_path / digit, digit) for digit in "01234567"]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda s: register(tmp_path / "r", NAME, s, facts={}), sources))
    assert sorted(v.version for v in made) == [f"v{n}" for n in range(1, 9)]
    assert len(history(tmp_path / "r", NAME)) == 8


def test_light() -> None:
    """Listing versions imports the standard library only."""
    code = (
        "import sys, mondrian_ft.registry;"
        "heavy = {'mlx', 'numpy', 'hydra', 'pydantic', 'PIL'};"
        "print({m.split('.')[0] for m in sys.modules} & heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def _torn(kill):
    def append(path: Path, *rest: object) -> None:
        with path.open("ab") as file:
            file.write(b'{"number": 2, "at": "20')
        kill()

    return append

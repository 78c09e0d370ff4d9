"""What is written is whole or absent, and what was there before survives a failure."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from mondrian_ft import files
from mondrian_ft.errors import MondrianError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_writes_text_bytes_and_json_and_makes_the_folder(tmp_path: Path) -> None:
    """The three writers write exactly what they are given, in folders that need not exist."""
    files.atomic_write_text(tmp_path / "a" / "b.txt", "größer\n")
    files.atomic_write_bytes(tmp_path / "c.bin", b"\x00\xff")
    files.atomic_write_json(tmp_path / "d.json", {"é": [1, 2.5, None]})
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "größer\n"
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"
    assert json.loads((tmp_path / "d.json").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert "é" in (tmp_path / "d.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["a", "c.bin", "d.json"]


def test_json_is_strict_and_a_refused_object_leaves_the_old_file(tmp_path: Path) -> None:
    """NaN is not JSON: it is refused before anything is touched."""
    path = tmp_path / "x.json"
    files.atomic_write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.atomic_write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"old": True}
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A disk that fills up costs the new version only, and the sentence says which file."""
    path = tmp_path / "adapter.bin"
    files.atomic_write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, broken, full)
    with pytest.raises(MondrianError, match=r"adapter\.bin: No space left on device"):
        files.atomic_write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["adapter.bin"]


def test_replacing_keeps_the_ending_and_survives_a_failing_writer(tmp_path: Path) -> None:
    """Writers that add a missing ending write where we look; their own errors pass through."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def failing_writer() -> None:
        with files.replacing(path) as temporary:
            assert temporary.suffix == ".safetensors"
            assert temporary.parent == path.parent
            temporary.write_bytes(b"half")
            raise RuntimeError("the writer's own")

    with pytest.raises(RuntimeError, match="the writer's own"):
        failing_writer()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["w.safetensors"]


def test_a_folder_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    """A path below a file cannot be made, and the message names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(MondrianError, match=r"cannot write .*file/x\.json"):
        files.atomic_write_json(tmp_path / "file" / "x.json", {})


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    """Files are as readable as any other file of the user, not private like a mkstemp one."""
    plain = tmp_path / "plain"
    plain.write_text("")
    files.atomic_write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_a_line_is_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the middle of a line leaves no half line behind."""
    path = tmp_path / "new" / "log.jsonl"
    files.append_line(path, '{"n": 1}')
    files.append_line(path, '"größer"')
    before = path.read_bytes()
    assert before == '{"n": 1}\n"größer"\n'.encode()
    with pytest.raises(ValueError, match="no line break"):
        files.append_line(path, "two\nlines")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
        with pytest.raises(MondrianError, match=r"cannot write .*log\.jsonl: No space left"):
            files.append_line(path, '{"n": 3}')
    assert path.read_bytes() == before

    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(MondrianError, match="Input/output error"):
            files.append_line(path, '{"n": 3}')
    assert path.read_bytes() == before


def test_an_unfinished_last_line_is_ended_or_cut_off(tmp_path: Path) -> None:
    """JSON that only lacks its newline is whole; anything else was never finished."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    files.append_line(path, '{"n": 3}')
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    path.write_bytes(b'{"n": 1}\n{"n": \xff')
    files.append_line(path, '{"n": 3}')
    assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'


def test_sha256_file(tmp_path: Path) -> None:
    """The hash is that of the bytes, also beyond one read."""
    data = os.urandom(1_300_000)
    (tmp_path / "x").write_bytes(data)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_publish_dir_appears_whole(tmp_path: Path) -> None:
    """The folder appears under its name with everything in it, and the temporary one is gone."""
    tmp = tmp_path / ".tmp"
    (tmp / "sub").mkdir(parents=True)
    (tmp / "sub" / "a").write_text("1")
    files.publish_dir(tmp, tmp_path / "deep" / "final")
    assert (tmp_path / "deep" / "final" / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["deep"]


def test_publish_dir_overwrites_only_when_told(tmp_path: Path) -> None:
    """Finished work is not replaced by accident."""
    final, tmp = tmp_path / "final", tmp_path / ".tmp"
    for folder, text in ((final, "old"), (tmp, "new")):
        folder.mkdir()
        (folder / "a").write_text(text)
    with pytest.raises(MondrianError, match="final already holds files"):
        files.publish_dir(tmp, final)
    assert (final / "a").read_text() == "old"
    files.publish_dir(tmp, final, replace=True)
    assert (final / "a").read_text() == "new"
    assert names(tmp_path) == ["final"]


def test_publish_dir_puts_the_old_folder_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between moving the old folder aside and the new one in, a failure undoes the first."""
    final, tmp = tmp_path / "final", tmp_path / ".tmp"
    for folder in (final, tmp):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source) == tmp:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(MondrianError, match="Input/output error"):
        files.publish_dir(tmp, final, replace=True)
    assert (final / "a").read_text() == "final"
    assert names(tmp_path) == [".tmp", "final"]


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 9])
def test_json_indented_in_part_is_the_same_json(tmp_path: Path, levels: int) -> None:
    """Promise: however few levels are indented, what is read back is what was written."""
    value = {"a": {"b": [{"c": [1, 2.5]}, {"d": None}], "ü": {}}, "e": [], "f": ["x", [True]]}
    files.atomic_write_json(tmp_path / "a.json", value, levels=levels)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    if levels == 9:
        assert text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with pytest.raises(ValueError, match="JSON compliant"):
        files.atomic_write_json(tmp_path / "b.json", {"a": [float("nan")]}, levels=levels)
    assert not (tmp_path / "b.json").exists()

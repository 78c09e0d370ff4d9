"""Writing files so that whoever reads after a crash finds the old version or the new one.

Everything is written to a temporary neighbour, flushed to the disk and renamed into place. A full
disk, a read-only folder or a kill leaves what was there before untouched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import MondrianError

SWEEP_BOOK = "sweep.json"
"""What a sweep's folder is known by."""
PUT_ASIDE = "unfinished"
"""Folder of a sweep in which lies what a job had left when it was run again."""


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place when the block succeeds.

    The temporary name keeps the ending, because writers such as ``mx.save_safetensors`` add their
    own where it is missing. Missing parent folders are made. If the block fails the temporary
    file is removed and ``path`` is as it was. What can be made again, and is checked before it is
    used, need not be ``durable``: then the disk may be flushed later, which for thousands of small
    files saves minutes, and a power failure may leave an empty file.

    Raises:
        MondrianError: the file cannot be written (full disk, no permission, …), naming ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _fsync(temporary)
        os.replace(temporary, path)
        if durable:
            _fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        # After the rename nothing is left to remove, and what failed may also forbid removing.
        with suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` to ``path``, whole or not at all; see ``replacing`` for errors."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` to ``path`` as UTF-8, whole or not at all; see ``replacing`` for errors."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(
    path: str | os.PathLike[str], obj: Any, indent: int | None = 2, *, levels: int | None = None
) -> None:
    """Writes ``obj`` to ``path`` as strict JSON and a final newline, whole or not at all.

    Args:
        indent: spaces a level; None writes one line.
        levels: indent so many levels only, and write what lies deeper on one line: long lists of
            records are read that way, and written ten times as fast.

    Raises:
        ValueError: ``obj`` holds NaN or an infinity, which JSON does not know.
        TypeError: ``obj`` holds something JSON has no form for.
        MondrianError: as ``replacing``.
    """
    if levels is None or indent is None:
        text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    else:
        text = _indented(obj, levels, " " * indent, "\n")
    atomic_write_text(path, text + "\n")


def _indented(obj: Any, levels: int, step: str, newline: str) -> str:
    """JSON of which the first levels are indented; ``newline`` is what a line of obj's begins with.

    Without indentation ``json`` uses its encoder in C.
    """
    if not levels or not obj or not isinstance(obj, dict | list):
        return json.dumps(obj, ensure_ascii=False, allow_nan=False)
    inner = newline + step
    if isinstance(obj, list):
        parts = [_indented(value, levels - 1, step, inner) for value in obj]
        return f"[{inner}{f',{inner}'.join(parts)}{newline}]"
    parts = [
        f"{json.dumps(str(key), ensure_ascii=False)}: {_indented(value, levels - 1, step, inner)}"
        for key, value in obj.items()
    ]
    return f"{{{inner}{f',{inner}'.join(parts)}{newline}}}"


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Adds ``line`` and a newline to the end of ``path``, flushed to the disk, whole or not at all.

    Processes and threads that append at once give whole lines in some order. A last line without
    its newline is what a crash left behind: it is ended if it is JSON, and else cut off, because a
    half line in the middle would spoil the file for whoever reads it.

    Raises:
        ValueError: ``line`` holds a line break.
        MondrianError: the file cannot be written, naming ``path``; it is as it was.
    """
    path = Path(path)
    if "\n" in line or "\r" in line:
        raise ValueError("a line holds no line break")
    data = f"{line}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Held until the handle is closed; of every process that appends, one at a time.
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = _end_of_lines(handle)
            try:
                written = os.write(handle, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        if is_new:
            _fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _end_of_lines(handle: int) -> int:
    """The size of an open file after its last line was ended or cut off; see ``append_line``."""
    size = os.fstat(handle).st_size
    content = os.pread(handle, size, 0)
    start = content.rfind(b"\n") + 1
    if start == size:
        return size
    try:
        json.loads(content[start:])
    except ValueError:
        os.ftruncate(handle, start)
        return start
    os.write(handle, b"\n")
    return size + 1


def is_read_only(path: str | os.PathLike[str]) -> bool:
    """Whether a file is not to be changed, by its mode (which binds root too) or by its folder.

    ``replacing`` writes a new file in its place, which the old one's mode would not forbid.
    """
    path = Path(path)
    if not path.is_file():
        return False
    return not path.stat().st_mode & 0o222 or not os.access(path.parent, os.W_OK)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_dir(
    tmp: str | os.PathLike[str], final: str | os.PathLike[str], *, replace: bool = False
) -> None:
    """Makes the finished folder ``tmp`` appear as ``final`` in one rename.

    Every file is flushed first, so a reader that sees ``final`` sees all of it. Both must lie on
    one file system; a temporary folder beside ``final`` does.

    Args:
        tmp: the folder with everything written; it is gone afterwards.
        final: where it shall be. An empty folder there is replaced.
        replace: put it in the place of a folder that holds something. The old one is moved aside
            first and removed last.

    Raises:
        MondrianError: ``final`` holds something and ``replace`` is false, or the disk refuses.
    """
    tmp, final = Path(tmp), Path(final)
    aside: Path | None = None
    try:
        for folder, _, names in os.walk(tmp):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir() and any(final.iterdir()):
            if not replace:
                raise MondrianError(
                    f"{final} already holds files and is not overwritten; name another folder or "
                    "move that one away."
                )
            aside = final.with_name(f".old-{secrets.token_hex(4)}-{final.name}")
            os.rename(final, aside)
        try:
            os.rename(tmp, final)
        except OSError:
            if aside is not None:
                os.rename(aside, final)
                aside = None
            raise
        _fsync(final.parent)
    except OSError as error:
        raise _cannot_write(final, error) from error
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def building(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside ``final`` that takes its place when the block succeeds.

    If the block fails the temporary folder is removed, and ``final`` is as it was.

    Raises:
        MondrianError: ``final`` holds something already, or the disk refuses.
    """
    final = Path(final)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise MondrianError(
            f"{final} already holds files and is not overwritten; name another folder or move that "
            "one away."
        )
    temporary = final.with_name(f".tmp-{secrets.token_hex(4)}-{final.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish_dir(temporary, final)
    except OSError as error:
        raise _cannot_write(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Flushes a file or folder to the disk; a symbolic link's target is not ours to flush."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> MondrianError:
    reason = error.strerror or str(error)
    return MondrianError(
        f"cannot write {path}: {reason}; what was there before is unchanged, so free some space or "
        "choose a folder you may write to, and run the command again."
    )

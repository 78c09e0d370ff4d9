"""One change at a time, whole or not at all.

A change is prepared in temporary names and then written down in ``.pending.json``: from there on a
crash does not undo it, the next command completes it. Its line in the history is what makes it
count. Only after that do copies follow that other programs read: ``channels/``, the mirror.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import MondrianError, RegistryError
from ..files import atomic_write_json
from . import chain, mirror
from .chain import Entry
from .store import TEMPORARY, flush, load

PENDING, LOCK, CHANNELS = ".pending.json", ".lock", "channels"


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when its process ends.

    Raises:
        RegistryError: the folder cannot be written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / LOCK).open("a")
    except OSError as error:
        what = f"The registry {home} cannot be written ({error.strerror})"
        raise RegistryError(f"{what}; set registry.root to a folder you may write to.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def commit(
    home: Path,
    entries: Sequence[Entry],
    event: Mapping[str, Any],
    *,
    moves: Mapping[str, str] | None = None,
    removes: Sequence[str] = (),
    mirrored: Path | None = None,
) -> Entry:
    """Make one change; the caller holds the lock.

    Args:
        entries: the history so far.
        event: the new line, without its number and time.
        moves: temporary names in ``home`` that get final ones, whole and flushed already.
        removes: folders in ``home`` that go.
        mirrored: folder of the workbook's layout, see ``mirror``; None keeps none.

    Raises:
        RegistryError: the disk refused. It says whether the change counts all the same.
    """
    pending = {
        "number": len(entries) + 1,
        "event": {"at": chain.now(), **event},
        "moves": dict(moves or {}),
        "removes": list(removes),
    }
    try:
        atomic_write_json(home / PENDING, pending)
        entry = _enter(home, pending)
    except (OSError, MondrianError) as error:
        _withdraw(home, pending)
        raise RegistryError(
            f"{home} could not be written ({_reason(error)}), so it is as it was before; free some "
            "space, or mend what is in the way, and try again."
        ) from error
    try:
        settle(home, mirrored)
    except (OSError, MondrianError) as error:
        raise RegistryError(
            f"The {entry['event']} of {event.get('version') or 'versions'} is done and counts, but "
            f"what follows it could not be written ({_reason(error)}); mend that, and the next "
            "command on the registry completes it."
        ) from error
    return entry


def settle(home: Path, mirrored: Path | None = None) -> list[Entry]:
    """Complete what a crash interrupted and clear what it left; the caller holds the lock.

    Returns:
        The history then.
    """
    chain.mend(home)
    if (home / PENDING).exists():
        pending = load(home / PENDING)
        _enter(home, pending)
        _remove(home, pending["removes"])
        (home / PENDING).unlink()
        flush(home)
    for folder in (home, home / CHANNELS):
        for stale in folder.glob(f"{TEMPORARY}*"):
            _discard(stale)
    entries = chain.read(home)
    for channel, place in chain.current(entries).items():
        pointer = home / CHANNELS / f"{channel}.json"
        wanted = {"version": place.version, "hash": place.hash, "number": place.number}
        if not _holds(pointer, wanted):
            atomic_write_json(pointer, wanted)
    if mirrored is not None:
        mirror.sync(home, entries, mirrored)
    return entries


def is_settled(home: Path) -> bool:
    """Whether no crash left anything to complete, as far as one can see without the lock."""
    left = (home / PENDING).exists() or any(home.glob(f"{TEMPORARY}*"))
    return not left and not chain.is_torn(home)


def writable(home: Path) -> bool:
    """Whether this process may change the registry."""
    return os.access(home, os.W_OK)


def _enter(home: Path, pending: Mapping[str, Any]) -> Entry:
    """Give a change's files their names and write its line; what is done already stays done."""
    entries = chain.read(home)
    if len(entries) >= pending["number"]:
        return entries[pending["number"] - 1]
    for temporary, final in pending["moves"].items():
        if (home / temporary).exists():
            (home / final).parent.mkdir(parents=True, exist_ok=True)
            os.rename(home / temporary, home / final)
            flush((home / final).parent)
            flush(home)
    return chain.append(home, entries, pending["event"])


def _withdraw(home: Path, pending: Mapping[str, Any]) -> None:
    """Take back a change whose line could not be written; leftovers are the next command's.

    Raises:
        RegistryError: the plan cannot be removed, so the next command will carry it out.
    """
    try:
        (home / PENDING).unlink(missing_ok=True)
    except OSError as error:
        raise RegistryError(
            f"{home} can no longer be written ({_reason(error)}); once it can, the next command on "
            f"the registry completes this {pending['event']['event']}."
        ) from error
    with suppress(OSError):
        for name in (*pending["moves"], *pending["moves"].values()):
            _discard(home / name)


def _remove(home: Path, names: Sequence[str]) -> None:
    """Let folders disappear at once, under another name first, and then file by file."""
    for name in names:
        if (home / name).exists():
            aside = home / f"{TEMPORARY}gone-{name}"
            os.rename(home / name, aside)
            _discard(aside)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _holds(pointer: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a pointer says this; one that cannot be read does not."""
    try:
        return load(pointer) == wanted
    except RegistryError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or os.strerror(error.errno or errno.EIO)}{place}"
    return str(error).rstrip(".")

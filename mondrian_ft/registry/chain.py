"""The history: one line an event, each holding the hash of the line before, and what follows of it.

It alone decides what is registered and what a channel means. A line counts from the moment it is
whole, which makes writing it the one step that changes anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RegistryError
from .store import flush

HISTORY = "history.jsonl"
_START = "0" * 64

Entry = dict[str, Any]


class Place(NamedTuple):
    """What a channel means: a version, its hash, and the number and time of the event that said so.

    ``by`` is who did, where it was written down.
    """

    version: str
    hash: str
    number: int
    at: str
    by: str | None


def read(home: Path) -> list[Entry]:
    """Every event, oldest first, after checking that nothing was changed.

    Raises:
        RegistryError: naming the line, if one was changed, removed or moved.
    """
    path = home / HISTORY
    entries: list[Entry] = []
    for number, line in enumerate(_lines(path), 1):
        previous = entries[-1]["line"] if entries else _START
        try:
            entry = json.loads(line)
            fits = (entry["number"], entry["previous"]) == (number, previous)
            fits = fits and entry["line"] == _line_hash(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise RegistryError(
                f"Line {number} of {path} does not follow from the lines before it, so the history "
                "was edited or damaged; restore the file from a backup."
            )
        entries.append(entry)
    return entries


def append(home: Path, entries: Sequence[Entry], event: Mapping[str, Any]) -> Entry:
    """Add an event, on the disk before this returns; a disk that refuses leaves the file as it was.

    Raises:
        OSError: the line could not be written.
    """
    previous = entries[-1]["line"] if entries else _START
    entry = {"number": len(entries) + 1, **event, "previous": previous}
    entry["line"] = _line_hash(entry)
    data = json.dumps(entry, allow_nan=False).encode() + b"\n"
    handle = os.open(home / HISTORY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
            if not entries:
                flush(home)  # the file is new
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)
    return entry


def is_torn(home: Path) -> bool:
    """Whether the last line was cut off by a crash."""
    path = home / HISTORY
    return path.exists() and path.stat().st_size > sum(len(line) + 1 for line in _lines(path))


def mend(home: Path) -> None:
    """Cut off a last line that a crash left unfinished; it never counted."""
    if is_torn(home):
        os.truncate(home / HISTORY, sum(len(line) + 1 for line in _lines(home / HISTORY)))


def now() -> str:
    """The time, ISO 8601, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def registered(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The registering event of every version that was not pruned, oldest first."""
    found = {entry["version"]: entry for entry in entries if entry["event"] == "register"}
    for entry in entries:
        if entry["event"] == "prune":
            for label in entry["versions"]:
                found.pop(label, None)
    return found


def stacks(entries: Sequence[Entry]) -> dict[str, list[Place]]:
    """What each channel meant and means, the present last; the ones before are the way back.

    - Promoting puts a version on top.
    - Rolling back takes the top away, so that rolling back again goes further back, and a version
      that was rolled back from is not gone back to.
    - Registering sets its channel anew: that the newest adapter is the candidate is nobody's
      decision, so there is no way back from it.
    - Pruning takes the versions it removed out of every channel's past.
    """
    found: dict[str, list[Place]] = {}
    for entry in entries:
        kind, channel = entry["event"], entry.get("channel")
        if kind == "prune":
            gone = set(entry["versions"])
            found = {
                each: _without_repeats([place for place in stack if place.version not in gone])
                for each, stack in found.items()
            }
        if not channel or kind not in ("register", "promote", "rollback"):
            continue
        place = Place(
            entry["version"], entry["hash"], entry["number"], entry["at"], entry.get("by")
        )
        before = found.get(channel, [])
        if kind == "promote":
            found[channel] = [*before, place]
        elif kind == "rollback":
            # The place keeps its version; who moved there and when is the rollback's.
            found[channel] = [*before[:-2], place]
        else:
            found[channel] = [place]
    return {channel: stack for channel, stack in found.items() if stack}


def current(entries: Sequence[Entry]) -> dict[str, Place]:
    """What each channel means now."""
    return {channel: stack[-1] for channel, stack in stacks(entries).items()}


def _without_repeats(stack: list[Place]) -> list[Place]:
    """Two neighbours of one version are one state: going back from one to the other is no step."""
    return [
        place
        for at, place in enumerate(stack)
        if at + 1 == len(stack) or stack[at + 1].version != place.version
    ]


def _lines(path: Path) -> list[bytes]:
    """Whole lines only: what follows the last line feed is still, or was, being written."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _line_hash(entry: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in entry.items() if key != "line"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

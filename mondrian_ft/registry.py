"""Numbered versions of adapters, in plain files.

``<root>/<name>/`` holds ``v1/``, ``v2/``, … (adapter directories, their files read-only),
``channels/<channel>.json`` (which version a channel means) and ``history.jsonl``. The history is
only appended to, and each line holds the hash of the line before, so what happened cannot be
changed unnoticed. Channels follow from it: whatever moves one is another event in the history.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .errors import RegistryError, nearest
from .files import atomic_write_json, publish_dir, sha256_file

MANIFEST = "manifest.json"
REQUIRED = (MANIFEST, "adapter_config.json", "adapter_model.safetensors")
REPORT = Path("evaluation", "comparison_report.json")
HISTORY, PENDING = "history.jsonl", ".pending.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v[1-9][0-9]*")
_LEFT_BEHIND = ("checkpoints",)  # beside an adapter in its folder, and no part of it
_START = "0" * 64


class Version(NamedTuple):
    """One registered adapter.

    ``hash`` (64 hex digits) and ``created`` (ISO 8601) are its manifest's, ``path`` is its adapter
    directory. ``metrics`` has ``verdict``, ``n``, ``format_strict`` and ``score_mae`` of its
    evaluation, and the last two of its base as ``base_…``; None if it was not evaluated. ``fresh``
    says whether this very call registered it.
    """

    version: str
    hash: str
    created: str
    channels: tuple[str, ...]
    metrics: dict[str, Any] | None
    path: Path
    fresh: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What ``task=versions task.format=json`` prints of it."""
        shown = {key: value for key, value in self._asdict().items() if key != "fresh"}
        return {**shown, "channels": list(self.channels), "path": str(self.path)}


def register(
    root: Path,
    name: str,
    adapter_dir: Path,
    *,
    facts: Mapping[str, Any],
    channel: str | None = "candidate",
) -> Version:
    """Copy an adapter directory into the registry as its next version.

    An adapter that is there already, by hash, is not copied again: its version is returned with
    ``fresh`` false, and nothing changes.

    Args:
        root, name: the registry's folder and the adapter's name in it.
        facts: where it came from, for the history (JSON types).
        channel: shall mean the new version from now on; None leaves all channels alone.

    Raises `RegistryError` for an unusable name, directory or history, and `MondrianError` if the
    disk refuses.
    """
    home, source = _home(root, name), Path(adapter_dir).absolute()
    if channel is not None and (not _NAME.fullmatch(channel) or _VERSION.fullmatch(channel)):
        raise RegistryError(f"The channel {channel!r} is no plain word; choose one, as candidate.")
    digest = _manifest(source)["hash"]
    with _locked(home):
        entries = _recover(home)
        known = versions(root, name)
        for version in known:
            if version.hash == digest:
                return version
        taken = [entry["version"] for entry in entries] + [version.version for version in known]
        label = f"v{1 + max((int(each[1:]) for each in taken), default=0)}"
        temporary = home / f".tmp-{secrets.token_hex(4)}-{label}"
        try:
            _copy(source, temporary)
            # The copy counts: the source may have changed in between.
            event = {"version": label, "hash": _manifest(temporary)["hash"], "channel": channel}
            event |= {"event": "register", "facts": dict(facts), "files": _files(temporary)}
            atomic_write_json(home / PENDING, event)
            publish_dir(temporary, home / label)
            _recover(home)
        except OSError as error:
            raise RegistryError(f"{source} cannot be registered in {home}: {error}.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return next(v for v in versions(root, name) if v.version == label)._replace(fresh=True)


def versions(root: Path, name: str) -> list[Version]:
    """Every version, oldest first; none if nothing was ever registered under that name.

    Raises `RegistryError` if a manifest, a report or a channel's pointer cannot be read.
    """
    home = _home(root, name)
    channels = {path.stem: _load(path).get("version") for path in _pointers(home)}
    found = []
    for label in _labels(home):
        path, about = home / label, _manifest(home / label)
        mine = tuple(channel for channel, version in channels.items() if version == label)
        created, metrics = str(about["created"]), _metrics(path / REPORT)
        found.append(Version(label, about["hash"], created, mine, metrics, path))
    return found


def resolve(root: Path, name: str, ref: str) -> Path:
    """The adapter directory that a version (``v3``) or a channel (``candidate``) means.

    Raises `RegistryError` if there is none, or if the channel's version is gone or was swapped.
    """
    home = _home(root, name)
    labels, pointers = _labels(home), {path.stem: path for path in _pointers(home)}
    if ref in labels:
        return home / ref
    if ref not in pointers:
        known = [*labels, *pointers]
        meant = nearest(ref, known)
        hint = f"did you mean {meant}?" if meant else f"it has {', '.join(known) or 'nothing yet'}."
        raise RegistryError(f"{home} has no version or channel {ref!r}; {hint}")
    pointer = _load(pointers[ref])
    folder = home / str(pointer.get("version"))
    if _manifest(folder)["hash"] != pointer.get("hash"):
        raise RegistryError(f"{folder} is not the adapter {ref} was pointed at; restore that one.")
    return folder


def history(root: Path, name: str) -> list[dict[str, Any]]:
    """Everything that ever happened, oldest first, after checking that nothing was changed.

    Entries have ``number`` (from 1), ``at``, ``event``, ``version``, ``hash``, ``channel``,
    ``facts``, ``files`` (SHA-256 of each), ``previous`` (the line before's hash) and ``line``.

    Raises `RegistryError`, naming the line, if one was changed, removed or moved.
    """
    path = _home(root, name) / HISTORY
    entries: list[dict[str, Any]] = []
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


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when its process ends."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / ".lock").open("a")
    except OSError as error:
        what = f"The registry {home} cannot be written ({error.strerror})"
        raise RegistryError(f"{what}; set registry.root to a folder you may write to.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recover(home: Path) -> list[dict[str, Any]]:
    """Enter what was published and not yet entered, clear what a crash left; the history then."""
    for stale in home.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    path = home / HISTORY
    whole = sum(len(line) + 1 for line in _lines(path))
    if path.exists() and path.stat().st_size > whole:
        os.truncate(path, whole)
    entries = history(home.parent, home.name)
    event = _load(home / PENDING) if (home / PENDING).exists() else {}
    for label in set(_labels(home)) - {entry["version"] for entry in entries}:
        if event.get("version") != label:
            raise RegistryError(f"{home / label} was put there by hand; move it and register it.")
        entries.append(_append(path, entries, event))
    (home / PENDING).unlink(missing_ok=True)
    for channel, entry in {e["channel"]: e for e in entries if e["channel"]}.items():
        wanted = {key: entry[key] for key in ("version", "hash", "number")}
        pointer = home / "channels" / f"{channel}.json"
        if not pointer.is_file() or _load(pointer) != wanted:
            atomic_write_json(pointer, wanted)
    return entries


def _append(path: Path, entries: list[dict[str, Any]], event: Mapping[str, Any]) -> dict[str, Any]:
    """Add a line to the history, on the disk before this returns."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    previous = entries[-1]["line"] if entries else _START
    entry = {"number": len(entries) + 1, "at": at, **event, "previous": previous}
    entry["line"] = _line_hash(entry)
    with path.open("ab") as file:
        file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def _copy(source: Path, target: Path) -> None:
    """Copy an adapter directory, without hidden files and checkpoints, and read-only."""

    def skipped(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {n for n in names if n.startswith(".") or (top and n in _LEFT_BEHIND)}

    shutil.copytree(source, target, ignore=skipped, copy_function=shutil.copyfile)
    for name in _files(target):
        (target / name).chmod(0o444)


def _home(root: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"registry.name is {name!r}; use letters, digits, '.', '_' and '-'.")
    return Path(root).absolute() / name


def _labels(home: Path) -> list[str]:
    found = [path.name for path in home.glob("v*") if _VERSION.fullmatch(path.name)]
    return sorted(found, key=lambda label: int(label[1:]))


def _pointers(home: Path) -> list[Path]:
    return sorted((home / "channels").glob("[!.]*.json"))


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def _lines(path: Path) -> list[bytes]:
    """Whole lines only: what follows the last line feed is still, or was, being written."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _line_hash(entry: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in entry.items() if key != "line"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be read ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise RegistryError(f"{path} holds no JSON object; restore it.")
    return content


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter directory, after checking that the folder is one."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        what = f"has no {missing[0]}" if folder.is_dir() else "does not exist"
        raise RegistryError(f"{folder} {what}; give the adapter directory that task=train wrote.")
    manifest = _load(folder / MANIFEST)
    absent = [key for key in ("hash", "base", "data_lock", "created") if key not in manifest]
    if absent or not re.fullmatch(r"[0-9a-f]{64}", str(manifest["hash"])):
        what = (
            f"no {absent[0]!r}" if absent else f"the hash {manifest['hash']!r}, not 64 hex digits"
        )
        raise RegistryError(f"{folder / MANIFEST} has {what}; train the adapter again.")
    return manifest


def _metrics(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    evidence = _load(path).get("evidence") or {}
    tuned, base = ((evidence.get("arms") or {}).get(arm) or {} for arm in ("tuned", "base"))
    shown = {key: tuned.get(key) for key in ("n", "format_strict", "score_mae")}
    before = {f"base_{key}": base.get(key) for key in ("format_strict", "score_mae")}
    return {"verdict": evidence.get("verdict"), **shown, **before}

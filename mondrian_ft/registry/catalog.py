"""Registering adapters, listing them, finding them, and filing their evaluations."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RegistryError, nearest
from . import chain, evidence, journal, store
from .chain import Entry


class Version(NamedTuple):
    """One registered adapter.

    ``hash`` (64 hex digits) and ``created`` (ISO 8601) are its manifest's, ``path`` is its adapter
    directory. ``metrics`` has ``verdict``, ``n``, ``format_strict`` and ``score_mae`` of its
    newest evaluation, and the last two of its base as ``base_…``; None if it was not evaluated.
    ``trained`` says on what: ``base`` (its name), ``advisor``, ``rows`` and ``data_lock``, each
    None where the manifest does not say. ``fresh`` says whether this very call registered it.
    """

    version: str
    hash: str
    created: str
    channels: tuple[str, ...]
    metrics: dict[str, Any] | None
    path: Path
    trained: dict[str, Any]
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
    mirror: Path | None = None,
) -> Version:
    """Copy an adapter directory into the registry as its next version, with its evaluation.

    An adapter that is there already, by hash, is not copied again: its version is returned with
    ``fresh`` false, and nothing changes.

    Args:
        root, name: the registry's folder and the adapter's name in it.
        facts: where it came from, for the history (JSON types).
        channel: shall mean the new version from now on; None leaves all channels alone.
        mirror: folder that is kept in the workbook's layout; None keeps none.

    Raises:
        RegistryError: the name, the directory or the history cannot be used, or the disk refuses;
            the registry is as it was, unless it says otherwise.
    """
    home, source = store.home_of(root, name), Path(adapter_dir).absolute()
    if channel is not None:
        store.check_channel(channel)
    if source.is_dir():
        store.contents(source)  # before anything in it is opened
    digest = store.check_adapter(source)["hash"]
    with journal.locked(home):
        entries = journal.settle(home)
        known = chain.registered(entries)
        for label, entry in known.items():
            if entry["hash"] == digest:
                journal.settle(home, mirror)
                return _version(home, entries, label)
        if foreign := [label for label in store.labels(home) if label not in known]:
            raise RegistryError(
                f"{home / foreign[0]} was put there by hand; move it and register it."
            )
        label = _next_label(entries)
        temporary = f"{store.TEMPORARY}{secrets.token_hex(4)}-{label}"
        try:
            store.copy(source, home / temporary)
            # The copy counts: the source may have changed in between.
            digest = store.check_adapter(home / temporary)["hash"]
            moves = {temporary: label}
            proof, found = _own_report(home, home / temporary, label, digest)
            if proof is not None and found is not None:
                moves |= {found: proof["file"]}
            event = {"event": "register", "version": label, "hash": digest, "channel": channel}
            event |= {"facts": dict(facts), "evidence": proof}
            event |= {"files": store.files_of(home / temporary)}
        except OSError as error:
            shutil.rmtree(home / temporary, ignore_errors=True)
            raise RegistryError(
                f"{source} could not be copied into {home} ({error.strerror or error}); the "
                "registry is as it was, so free some space or mend that, and register it again."
            ) from error
        except BaseException:
            shutil.rmtree(home / temporary, ignore_errors=True)
            raise
        journal.commit(home, entries, event, moves=moves, mirrored=mirror)
        entries = chain.read(home)
    return _version(home, entries, label)._replace(fresh=True)


def versions(root: Path, name: str) -> list[Version]:
    """Every version, oldest first; none if nothing was ever registered under that name.

    Raises:
        RegistryError: the history, a manifest or a report cannot be read.
    """
    home = store.home_of(root, name)
    entries = chain.read(home)
    return [_version(home, entries, label) for label in chain.registered(entries)]


def resolve(root: Path, name: str, ref: str, *, checked: bool = True) -> Path:
    """The adapter directory that a version (``v3``) or a channel (``candidate``) means.

    Every byte of it is checked against the history, unless whoever asks does that itself
    (``checked`` is false) and tells all that is wrong.

    Raises:
        RegistryError: there is none, or a file of it is missing, changed or new; it is named.
    """
    home = store.home_of(root, name)
    entries = chain.read(home)
    label = find(home, entries, ref)
    if checked:
        store.check_unchanged(home / label, chain.registered(entries)[label]["files"])
    return home / label


def history(root: Path, name: str) -> list[Entry]:
    """Everything that ever happened, oldest first, after checking that nothing was changed.

    Entries have ``number`` (from 1), ``at``, ``event`` (``register evaluate promote refuse rollback
    prune``), ``version``, ``hash``, ``channel``, ``facts``, ``previous`` (the line before's hash)
    and ``line``; ``register`` has ``files`` (SHA-256 of each), ``promote`` and ``refuse`` have the
    ``reasons``, ``rules``, ``by`` and ``from``.

    Raises:
        RegistryError: naming the line, if one was changed, removed or moved.
    """
    return chain.read(store.home_of(root, name))


def serves(root: Path, name: str, channel: str) -> chain.Place | None:
    """What a channel means now; None if it is empty or nothing was registered yet."""
    return chain.current(chain.read(store.home_of(root, name))).get(channel)


def label_of(root: Path, name: str, digest: str) -> str | None:
    """The version with this hash; None if there is none."""
    known = chain.registered(chain.read(store.home_of(root, name)))
    return next((label for label, entry in known.items() if entry["hash"] == digest), None)


def file_report(
    root: Path,
    name: str,
    version: str,
    report: Path,
    *,
    facts: Mapping[str, Any],
    mirror: Path | None = None,
) -> bool:
    """Keep an evaluation of a registered version, so that it can be promoted on it.

    Returns:
        False if that very report was filed before; then nothing changes.

    Raises:
        RegistryError: the report is none, or of another adapter, or the disk refuses.
    """
    home = store.home_of(root, name)
    try:
        data = report.read_bytes()
    except OSError as error:
        raise RegistryError(f"{report} cannot be read ({error.strerror}).") from error
    content = evidence.parse(data, report)
    with journal.locked(home):
        entries = journal.settle(home)
        label = find(home, entries, version)
        digest = chain.registered(entries)[label]["hash"]
        if fault := evidence.fault(content, digest):
            raise RegistryError(f"{report} is no evidence for {label}: {fault}.")
        proof = evidence.about(label, data, content)
        if any(one.about["sha256"] == proof["sha256"] for one in evidence.filed(entries, label)):
            journal.settle(home, mirror)
            return False
        try:
            staged = evidence.stage(home, data)
        except OSError as error:
            raise RegistryError(
                f"{report} could not be filed in {home} ({error.strerror or error}); the registry "
                "is as it was, so free some space and evaluate again."
            ) from error
        event = {"event": "evaluate", "version": label, "hash": digest, "channel": None}
        event |= {"facts": dict(facts), "evidence": proof}
        journal.commit(home, entries, event, moves={staged: proof["file"]}, mirrored=mirror)
    return True


def repair(root: Path, name: str, *, mirror: Path | None = None) -> None:
    """Complete what a crash interrupted, if anything, and bring the mirror up to date.

    Whoever may only read finds everything readable as it is; then nothing is done.
    """
    home = store.home_of(root, name)
    if not home.is_dir() or not journal.writable(home):
        return
    if mirror is not None or not journal.is_settled(home):
        with journal.locked(home):
            journal.settle(home, mirror)


def find(home: Path, entries: Sequence[Entry], ref: str) -> str:
    """The version that a version's or channel's name means.

    Raises:
        RegistryError: none, or one that was pruned.
    """
    known, channels = chain.registered(entries), chain.current(entries)
    if ref in known:
        return ref
    if ref in channels:
        return channels[ref].version
    if any(entry["event"] == "register" and entry["version"] == ref for entry in entries):
        raise RegistryError(f"{ref} of {home} was pruned; the history keeps what it was.")
    names = [*known, *channels]
    meant = nearest(ref, names)
    hint = f"did you mean {meant}?" if meant else f"it has {', '.join(names) or 'nothing yet'}."
    raise RegistryError(f"{home} has no version or channel {ref!r}; {hint}")


def _own_report(
    home: Path, folder: Path, label: str, digest: str
) -> tuple[dict[str, Any] | None, str | None]:
    """The evaluation in an adapter's directory as evidence, staged; Nones if it has none of it.

    A report on other weights is copied with the rest, and is no evidence.
    """
    path = folder / store.REPORT
    if not path.is_file():
        return None, None
    data = path.read_bytes()
    report = evidence.parse(data, path)
    if evidence.fault(report, digest):
        return None, None
    return evidence.about(label, data, report), evidence.stage(home, data)


def _next_label(entries: Sequence[Entry]) -> str:
    """Numbers are never given twice, also after pruning."""
    taken = [int(entry["version"][1:]) for entry in entries if entry["event"] == "register"]
    return f"v{1 + max(taken, default=0)}"


def _version(home: Path, entries: Sequence[Entry], label: str) -> Version:
    path = home / label
    manifest = store.manifest_of(path)
    training = manifest.get("training")
    channels = chain.current(entries)
    return Version(
        version=label,
        hash=manifest["hash"],
        created=str(manifest["created"]),
        channels=tuple(c for c, place in sorted(channels.items()) if place.version == label),
        metrics=_metrics(home, entries, label),
        path=path,
        trained={
            "base": (manifest["base"] or {}).get("name"),
            "advisor": manifest.get("advisor"),
            "rows": training.get("rows") if isinstance(training, dict) else None,
            "data_lock": manifest["data_lock"],
        },
    )


def _metrics(home: Path, entries: Sequence[Entry], label: str) -> dict[str, Any] | None:
    newest = next(evidence.filed(entries, label), None)
    if newest is None:
        return None
    found = evidence.read(home, newest)["evidence"]
    tuned, base = ((found.get("arms") or {}).get(arm) or {} for arm in ("tuned", "base"))
    shown = {key: tuned.get(key) for key in ("n", "format_strict", "score_mae")}
    before = {f"base_{key}": base.get(key) for key in ("format_strict", "score_mae")}
    return {"verdict": found.get("verdict"), **shown, **before}

"""Moving channels: promotion on evidence, the way back, and clearing away what nobody needs."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RegistryError
from . import chain, evidence, gate, journal, store
from .catalog import find
from .chain import Entry, Place
from .gate import Decision, Occupant, Reason, Rules, Subject


@dataclass(frozen=True)
class Lock:
    """The rows a version has to be judged on, and where that was read."""

    data_lock: str
    source: str


@dataclass(frozen=True)
class Outcome:
    """What became of a wish to promote.

    Attributes:
        version: the version it was about.
        before: what the channel meant until then; None if it was empty.
        decision: what the gate said; None where there was nothing to decide.
        moved: whether the channel means ``version`` now and did not before.
        forced: whether it moved against the gate.
        meanwhile: what somebody else did while this waited for its turn, as a sentence.
        data: the judged rows' file of the newest evaluation, from which more can be made.
    """

    version: str
    before: Place | None
    decision: Decision | None
    moved: bool
    forced: bool = False
    meanwhile: str | None = None
    data: str | None = None


def promote(
    root: Path,
    name: str,
    ref: str,
    channel: str,
    rules: Rules,
    *,
    lock: Lock | None = None,
    force: bool = False,
    reason: str | None = None,
    facts: Mapping[str, Any] | None = None,
    mirror: Path | None = None,
) -> Outcome:
    """Let a channel mean a version, if the evidence says so; the decision is kept either way.

    Args:
        ref: the version, or a channel that means it.
        lock: the rows it has to be judged on; None takes those of the newest evaluation here.
        force: move it whatever the gate says; needs a ``reason``.

    Raises:
        RegistryError: there is no such version, it was changed, or the disk refuses.
    """
    home = store.home_of(root, name)
    store.check_channel(channel)
    if force and not (reason or "").strip():
        raise RegistryError("task.force=true needs task.reason, a sentence for the history.")
    seen = chain.current(chain.read(home)).get(channel)
    with journal.locked(home):
        entries = journal.settle(home)
        label = find(home, entries, ref)
        entry = chain.registered(entries)[label]
        before = chain.current(entries).get(channel)
        if before is not None and before.version == label:
            journal.settle(home, mirror)
            return Outcome(label, before, None, moved=False)
        store.check_unchanged(home / label, entry["files"])
        occupant = None if before is None else Occupant(before.version, before.hash)
        subject = _subject(home, entries, label, lock)
        decision, proof = _judge(home, entries, subject, rules, occupant)
        meanwhile = _meanwhile(seen, before, channel)
        if meanwhile and not force:
            said = Reason("meanwhile", False, meanwhile)
            decision = Decision.of((*decision.reasons, said), fits=decision.fits)
        moves = decision.passed or force
        event = {"event": "promote" if moves else "refuse", "version": label, "hash": entry["hash"]}
        event |= {
            "channel": channel,
            "by": who(),
            "from": None if before is None else {"version": before.version, "hash": before.hash},
            "passed": decision.passed,
            "forced": moves and not decision.passed,
            "reason": reason,
            "reasons": [each.as_dict() for each in decision.reasons],
            "rules": asdict(rules),
            "evidence_sha256": proof.about["sha256"] if proof else None,
            "facts": dict(facts or {}),
        }
        journal.commit(home, entries, event, mirrored=mirror)
        data = _data_of(home, entries, label)
    return Outcome(
        label,
        before,
        decision,
        moved=moves,
        forced=moves and not decision.passed,
        meanwhile=meanwhile,
        data=data,
    )


def preview(
    root: Path, name: str, ref: str, channel: str, rules: Rules, *, lock: Lock | None = None
) -> Outcome:
    """What `promote` would decide now; nothing is moved and nothing is written.

    Raises:
        RegistryError: there is no such version.
    """
    home = store.home_of(root, name)
    entries = chain.read(home)
    label = find(home, entries, ref)
    before = chain.current(entries).get(channel)
    if before is not None and before.version == label:
        return Outcome(label, before, None, moved=False)
    occupant = None if before is None else Occupant(before.version, before.hash)
    decision, _ = _judge(home, entries, _subject(home, entries, label, lock), rules, occupant)
    return Outcome(label, before, decision, moved=False, data=_data_of(home, entries, label))


def rollback(
    root: Path,
    name: str,
    channel: str,
    *,
    facts: Mapping[str, Any] | None = None,
    mirror: Path | None = None,
) -> tuple[Place, Place]:
    """Let a channel mean again what it meant before; see `chain.stacks` for what that is.

    Returns:
        What it meant until now, and what it means again.

    Raises:
        RegistryError: it never meant anything else, or the version before was changed.
    """
    home = store.home_of(root, name)
    store.check_channel(channel)
    with journal.locked(home):
        entries = journal.settle(home)
        stack = chain.stacks(entries).get(channel, [])
        if len(stack) < 2:
            what = f"means {stack[-1].version} and" if stack else "is empty and"
            raise RegistryError(
                f"The channel {channel} of {home} {what} there is nothing before that to go back "
                "to; promote another version instead."
            )
        now, then = stack[-1], stack[-2]
        store.check_unchanged(home / then.version, chain.registered(entries)[then.version]["files"])
        event = {"event": "rollback", "version": then.version, "hash": then.hash}
        event |= {"channel": channel, "by": who(), "facts": dict(facts or {})}
        event |= {"from": {"version": now.version, "hash": now.hash}}
        journal.commit(home, entries, event, mirrored=mirror)
    return now, then


def prune(
    root: Path,
    name: str,
    keep: int,
    *,
    force: bool = False,
    facts: Mapping[str, Any] | None = None,
    mirror: Path | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Remove old versions: all but the newest ``keep`` and those that are needed.

    One that a channel means is never removed. One that a rollback could come to is only with
    ``force``. The evidence and the history stay.

    Returns:
        The versions that are gone, and the old ones that stay, each with the reason.

    Raises:
        RegistryError: the disk refuses.
    """
    home = store.home_of(root, name)
    with journal.locked(home):
        entries = journal.settle(home)
        known = chain.registered(entries)
        old = list(known)[: max(0, len(known) - keep)]
        kept: dict[str, str] = {}
        for channel, stack in chain.stacks(entries).items():
            for place in stack[:-1] if not force else []:
                kept.setdefault(place.version, f"a rollback of {channel} could come to it")
            kept[stack[-1].version] = f"{channel} means it"
        gone = [label for label in old if label not in kept]
        if gone:
            event = {"event": "prune", "version": None, "hash": None, "channel": None, "by": who()}
            event |= {"versions": {label: known[label]["hash"] for label in gone}}
            event |= {"keep": keep, "facts": dict(facts or {})}
            journal.commit(home, entries, event, removes=gone, mirrored=mirror)
        else:
            journal.settle(home, mirror)
    return gone, {label: why for label, why in kept.items() if label in old}


def who() -> str:
    """The name of whoever runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user may have no name.
        return f"uid {os.getuid()}"


def _subject(home: Path, entries: Sequence[Entry], label: str, lock: Lock | None) -> Subject:
    manifest = store.manifest_of(home / label)
    if lock is None:
        newest = next((one for one in evidence.filed(entries) if one.about["data_lock"]), None)
        if newest is not None:
            source = f"of the newest evaluation here, of {newest.version}"
            lock = Lock(newest.about["data_lock"], source)
    return Subject(
        label,
        manifest["hash"],
        manifest["base"] if isinstance(manifest["base"], Mapping) else {},
        lock.data_lock if lock else None,
        lock.source if lock else "",
    )


def _judge(
    home: Path,
    entries: Sequence[Entry],
    subject: Subject,
    rules: Rules,
    occupant: Occupant | None,
) -> tuple[Decision, evidence.Filed | None]:
    """The decision on the report that counts; where none fits, what keeps the newest from it.

    Of those that fit, it is the newest of those that judged the most rows. A look at a few rows
    takes nothing from an evaluation of all of them, and going by the newest, and not by the best,
    leaves no choice among repeated evaluations.
    """
    first: tuple[Decision, evidence.Filed] | None = None
    best: tuple[Decision, evidence.Filed] | None = None
    most = -1
    for found in evidence.filed(entries, subject.version):
        report = evidence.read(home, found)
        try:
            decision = gate.decide(report, rules, subject=subject, occupant=occupant)
            rows = int((report["evidence"].get("judged_part") or {}).get("rows", 0))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RegistryError(
                f"{home / found.about['file']}, the evidence of {found.version}, is no report of "
                f"this program's ({error!r}); evaluate {found.version} again."
            ) from error
        first = first or (decision, found)
        if decision.fits and rows > most:
            best, most = (decision, found), rows
    counts = best or first
    if counts is not None:
        return counts
    said = f"{subject.version} was never evaluated, or not since it was registered."
    return Decision.of((Reason("evidence", False, said),), fits=False), None


def _meanwhile(seen: Place | None, before: Place | None, channel: str) -> str | None:
    """What happened between asking and being asked in, if the channel is another one now."""
    if (seen and seen.version) == (before and before.version):
        return None
    if before is None:
        return f"Meanwhile {channel} was emptied."
    was = seen.version if seen else "empty"
    by = f" by {before.by}" if before.by else ""
    return (
        f"Meanwhile {channel} became {before.version}{by} at {before.at} (it was {was}); look at "
        "that one first, and promote again if it is still wanted."
    )


def _data_of(home: Path, entries: Sequence[Entry], label: str) -> str | None:
    """Where the rows lay that the version was last judged on."""
    for found in evidence.filed(entries, label):
        stated = evidence.read(home, found).get("validation_data")
        return str(stated) if stated else None
    return None

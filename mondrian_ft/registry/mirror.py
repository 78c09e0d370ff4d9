"""The workbook's layout: ``versions/<name>-v1``, … as folders, ``<name>-active`` as a link.

It follows the registry and is never read by it. Files are hard links to the registry's where the
file system allows it, and copies elsewhere; the link is relative and swapped in one step, so that
whoever opens it finds one whole version or the other.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import RegistryError
from . import chain
from .chain import Entry
from .store import MANIFEST, TEMPORARY, load

ACTIVE = "production"
"""The channel that ``<name>-active`` follows."""
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


def sync(home: Path, entries: Sequence[Entry], folder: Path) -> None:
    """Bring the layout below ``folder`` up to date; what is right already is left alone.

    Raises:
        RegistryError: something else lies where a version or the link belongs.
        OSError: the folder cannot be written.
    """
    name, versions = home.name, folder / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    for stale in [*versions.glob(f"{TEMPORARY}{name}@*"), *folder.glob(f"{TEMPORARY}{name}@*")]:
        stale.unlink() if stale.is_symlink() else shutil.rmtree(stale)
    known = chain.registered(entries)
    for label, entry in known.items():
        _place(home / label, entry, versions / f"{name}-{label}", _temporary(versions, name))
    _point(folder / f"{name}-active", chain.current(entries).get(ACTIVE), name)
    for entry in entries:
        if entry["event"] == "prune":
            for label in entry["versions"]:
                target = versions / f"{name}-{label}"
                _take_away(target, entry["versions"][label], _temporary(versions, name))


def _temporary(folder: Path, name: str) -> Path:
    """A name of our own: '@' is in no registry's name, so none is taken for another's."""
    return folder / f"{TEMPORARY}{name}@{secrets.token_hex(4)}"


def _place(source: Path, entry: Entry, target: Path, temporary: Path) -> None:
    """One version as a folder of its own."""
    if target.exists() or target.is_symlink():
        if _hash(target) != entry["hash"]:
            raise RegistryError(
                f"{target} is there already and is not {entry['version']} of the registry; move it "
                "away, or set registry.mirror to another folder."
            )
        return
    for file in entry["files"]:
        (temporary / file).parent.mkdir(parents=True, exist_ok=True)
        _link(source / file, temporary / file)
    os.rename(temporary, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _point(link: Path, place: chain.Place | None, name: str) -> None:
    """Let the link mean what the channel means; no channel, no link."""
    if link.exists() and not link.is_symlink():
        raise RegistryError(
            f"{link} is no link, so it cannot follow {ACTIVE}; move it away, or set "
            "registry.mirror to another folder."
        )
    if place is None:
        link.unlink(missing_ok=True)
        return
    wanted = os.path.join("versions", f"{name}-{place.version}")  # noqa: PTH118, a link's text
    if link.is_symlink() and os.readlink(link) == wanted:  # noqa: PTH115
        return
    temporary = _temporary(link.parent, name)
    os.symlink(wanted, temporary)  # noqa: PTH211
    os.replace(temporary, link)


def _take_away(target: Path, digest: str, aside: Path) -> None:
    """Remove the folder of a pruned version, if it is that one."""
    if target.is_dir() and not target.is_symlink() and _hash(target) == digest:
        os.rename(target, aside)
        shutil.rmtree(aside)


def _hash(folder: Path) -> object:
    """The hash in a folder's manifest; None where there is none to read."""
    try:
        return load(folder / MANIFEST).get("hash")
    except RegistryError:
        return None

"""Evaluations of registered versions: verbatim copies of their reports, each in the history.

A version's directory never changes, and an evaluation may come later, so reports lie beside it, in
``evidence/<version>/<first digits of the SHA-256>.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RegistryError
from .chain import Entry
from .store import TEMPORARY, flush

EVIDENCE = "evidence"


class Filed(NamedTuple):
    """A report that counts for a version; ``about`` is what the history says of it."""

    version: str
    number: int
    about: Mapping[str, Any]


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """A comparison report from its bytes.

    Raises:
        RegistryError: it is none.
    """
    try:
        report = json.loads(data)
        if isinstance(report["evidence"], dict):
            return report
    except (ValueError, KeyError, TypeError):
        pass
    raise RegistryError(
        f"{path} is no comparison report (JSON with 'evidence'); evaluate the adapter again."
    )


def fault(report: Mapping[str, Any], digest: str) -> str | None:
    """Why a report is none about the adapter with this hash, as a sentence; None if it is."""
    stated = report["evidence"].get("adapter_hash")
    if stated == digest:
        return None
    return f"the evaluation is of the adapter {str(stated)[:12]}, not of {digest[:12]}"


def stage(home: Path, data: bytes) -> str:
    """Write a report under a temporary name, read-only and flushed; returns that name."""
    name = f"{TEMPORARY}{secrets.token_hex(4)}.json"
    path = home / name
    path.write_bytes(data)
    path.chmod(0o444)
    flush(path)
    return name


def about(version: str, data: bytes, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the history keeps of a report."""
    digest = hashlib.sha256(data).hexdigest()
    evidence = report["evidence"]
    return {
        "sha256": digest,
        "file": f"{EVIDENCE}/{version}/{digest[:16]}.json",
        "date": report.get("evaluation_date"),
        "verdict": evidence.get("verdict"),
        "data_lock": evidence.get("data_lock"),
        "against": {
            arm: (evidence.get("arms") or {}).get(arm, {}).get("adapter_hash")
            for arm in evidence.get("against") or {}
        },
    }


def filed(entries: Sequence[Entry], version: str | None = None) -> Iterator[Filed]:
    """The reports in the history, newest first; of one version, or of all."""
    for entry in reversed(entries):
        mine = version is None or entry.get("version") == version
        if mine and entry["event"] in ("register", "evaluate") and entry.get("evidence"):
            yield Filed(entry["version"], entry["number"], entry["evidence"])


def read(home: Path, found: Filed) -> dict[str, Any]:
    """A report that was filed.

    Raises:
        RegistryError: it is gone, or no longer what was filed.
    """
    path = home / found.about["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RegistryError(
            f"{path}, the evidence of {found.version}, cannot be read "
            f"({os.strerror(error.errno or 0)}); restore it, or evaluate {found.version} again."
        ) from error
    if hashlib.sha256(data).hexdigest() != found.about["sha256"]:
        raise RegistryError(
            f"{path}, the evidence of {found.version}, was changed after it was filed; restore it, "
            f"or evaluate {found.version} again."
        )
    return parse(data, path)

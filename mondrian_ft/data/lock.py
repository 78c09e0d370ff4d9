"""``split.lock.json``: which photograph is in which part, kept while the data grow.

Per advisor it holds the ``seed`` and ``splits`` it was made with, ``photographs`` (content hash to
part), ``jobs`` (job id to content hash) and ``folds`` (by their number: content hash to fold). What
was once dealt stays where it is, also while a photograph is missing for a time; what is new joins
train or val. To split anew, the file is moved away: adapters trained before can then no longer be
compared with those trained after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .rows import Row, load_json
from .split import PARTS


def read_locks(path: Path) -> dict[str, Any]:
    """The file's content, with ``advisors``; an empty one if there is no file.

    Raises:
        DataError: the file is not JSON, or no split lock.
    """
    locks = load_json(path, "split lock") if path.exists() else {}
    if not isinstance(locks, dict) or not isinstance(locks.setdefault("advisors", {}), dict):
        raise DataError(f"{path} is not a split lock of this program; move it away.")
    return locks


def locked_parts(
    entry: Any,
    facts: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    splits: Mapping[str, float],
    path: Path,
) -> dict[str, str]:
    """The part of every photograph that was dealt before; nothing without an entry.

    Args:
        entry: what `new_entry` made for this advisor, None if there is none.
        facts: the records to deal now; used are ``job_id`` and ``image_sha256``.
        path: the lock's, for errors.

    Raises:
        DataError: the entry was made with another seed or other splits, is damaged, or a job that
            it knows has another picture now.
    """
    if entry is None:
        return {}
    try:
        made = {"data.seed": entry["seed"]} | {
            f"data.{part}_split": entry["splits"][part] for part in PARTS
        }
        photographs, jobs = dict(entry["photographs"]), dict(entry.get("jobs", {}))
        sound = set(photographs.values()) <= set(PARTS)
    except (KeyError, TypeError, ValueError):
        sound, made, photographs, jobs = False, {}, {}, {}
    if not sound:
        raise DataError(f"{path} is not a split lock of this program; move it away.")
    asked = {"data.seed": seed} | {f"data.{part}_split": splits[part] for part in PARTS}
    if other := [key for key in asked if asked[key] != made[key]]:
        was = ", ".join(f"{key}={made[key]:g}" for key in other)
        now = ", ".join(f"{key}={asked[key]:g}" for key in other)
        raise DataError(
            f"{path} was made with {was}, but the config says {now}; set that back to keep the "
            "split, or move the lock away (or take another data.output_dir) to split anew."
        )
    for fact in facts:
        before = jobs.get(fact["job_id"], fact["image_sha256"])
        if before != fact["image_sha256"]:
            raise DataError(
                f"The photograph of job {fact['job_id']} is another picture than when {path} was "
                "made; put the old file back, leave that job out, or move the lock away to split "
                "anew."
            )
    return photographs


def locked_folds(entry: Any, folds: int, *, path: Path) -> dict[str, int]:
    """The fold of every photograph that was dealt into so many folds before.

    Raises:
        DataError: the entry is damaged.
    """
    known = (entry or {}).get("folds", {})
    found = known.get(str(folds), {}) if isinstance(known, dict) else None
    if not isinstance(found, dict) or not set(found.values()) <= set(range(folds)):
        raise DataError(f"{path} is not a split lock of this program; move it away.")
    return found


def new_entry(
    earlier: Any, dealt: Mapping[str, Sequence[Row]], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The lock's entry after dealing; what only the earlier one knew is kept."""
    photographs = dict(earlier["photographs"]) if earlier else {}
    jobs = dict(earlier.get("jobs", {})) if earlier else {}
    for part, rows in dealt.items():
        for row in rows:
            photographs[row.image_sha256] = part
            jobs[row.job_id] = row.image_sha256
    folds = dict(earlier.get("folds", {})) if earlier else {}
    if count := meta["folds"]:
        here = {row.image_sha256: row.fold for row in [*dealt["train"], *dealt["val"]]}
        folds[str(count)] = dict(sorted((folds.get(str(count), {}) | here).items()))
    return {
        "data_lock": meta["data_lock"],
        "seed": meta["seed"],
        "splits": meta["splits"],
        "photographs": dict(sorted(photographs.items())),
        "jobs": dict(sorted(jobs.items())),
        "folds": folds,
    }

"""Dealing photographs to train, validation and test.

The unit is the photograph's content, never the row: real databases judge one photograph many
times (facts: 70 rows, 13 photographs), and a split by row puts the same picture on both sides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..errors import DataError

Place = TypeVar("Place", str, int)

PARTS: tuple[str, ...] = ("train", "val", "test")


def assign(
    records: Iterable[Mapping[str, Any]],
    *,
    train: float,
    val: float,
    test: float,
    seed: int,
    locked: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Deal every record to a part, by photograph.

    A group that a locked photograph belongs to goes where that one is. With ``locked``, all other
    groups go to train and val alone, to whichever lacks most of its share: a test part that grew
    would no longer be the one that earlier adapters were judged on.

    Args:
        records: manifest records; used are ``job_id``, ``image_sha256``, ``overall_score``,
            ``advisor`` and ``group``. Records of one group (by default: of one content) stay
            together; it may hold several files, such as crops of one photograph.
        train, val, test: fractions of the photographs, adding up to 1. A part's count is the
            nearest that whole photographs allow (largest remainder; on a tie the test part, then
            the validation part, has it), and a part with a fraction above 0 has at least one.
        seed: another seed, another deal. The order of the records does not matter.
        locked: the part of every photograph (by ``image_sha256``) that was dealt before.

    Returns:
        ``job_id`` to ``"train"``, ``"val"`` or ``"test"``. Records of one photograph share a part,
        and the parts' overall scores are spread alike.

    Raises:
        DataError: there are fewer photographs than parts, two records share a ``job_id``, or a
            group holds photographs that are locked in different parts.
    """
    fractions = {"train": train, "val": val, "test": test}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    parts: dict[str, str] = {}
    for record in records:
        if record["job_id"] in parts:
            raise DataError(f'The job id "{record["job_id"]}" is in the data twice; link again.')
        parts[record["job_id"]] = ""
        groups.setdefault(str(record.get("group") or record["image_sha256"]), []).append(record)
    files = {group: len({r["image_sha256"] for r in rows}) for group, rows in groups.items()}
    dealt = _from_lock(groups, locked) if locked else {}
    counts = part_sizes(sum(files.values()), fractions, groups=len(groups))
    for group, part in dealt.items():
        counts[part] = max(0, counts[part] - files[group])
    if locked:
        # The test part was closed when it was made; what is new must not open it again.
        counts["test"] = 0
    order = [group for group in _spread_by_score(groups, seed) if group not in dealt]
    several = [group for group in order if files[group] > 1]
    for group in sorted(several, key=lambda g: -files[g]):
        part = _neediest(counts, set(dealt.values()), len(groups) - len(dealt))
        counts[part] = max(0, counts[part] - files[group])
        dealt[group] = part
    single = [group for group in order if files[group] == 1]
    home = max(("train", "val"), key=lambda part: (fractions[part], part == "train"))
    sizes = _shrunk(counts, len(single), home)
    slots = _interleave({part: sizes[part] for part in PARTS})
    dealt |= dict(zip(single, slots, strict=True))
    for group, rows in groups.items():
        for record in rows:
            parts[record["job_id"]] = dealt[group]
    return parts


def assign_folds(
    records: Iterable[Mapping[str, Any]],
    *,
    folds: int,
    seed: int,
    locked: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Deal every record to one of ``folds`` folds, by photograph.

    Args:
        records: as in `assign`; those of one group stay together.
        folds: how many, 2 or more. Their photographs differ in number by as little as the groups
            allow, and their overall scores are spread alike.
        seed: another seed, another deal. The order of the records does not matter.
        locked: the fold of every photograph (by ``image_sha256``) that was dealt before; what is
            new goes where fewest are.

    Returns:
        ``job_id`` to a fold, counted from 0; every fold has a photograph.

    Raises:
        DataError: there are fewer independent photographs than folds, or a group holds photographs
            that are locked in different folds.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(str(record.get("group") or record["image_sha256"]), []).append(record)
    if len(groups) < folds:
        raise DataError(
            f"{len(groups)} independent photographs cannot fill {folds} folds; lower data.folds."
        )
    dealt = _from_lock(groups, locked) if locked else {}
    files = {group: len({r["image_sha256"] for r in rows}) for group, rows in groups.items()}
    filled = [0] * folds
    for group, fold in dealt.items():
        filled[fold] += files[group]
    order = [group for group in _spread_by_score(groups, seed, folds) if group not in dealt]
    # The large groups first, so that the others can even out what those made uneven.
    for group in sorted((g for g in order if files[g] > 1), key=lambda g: -files[g]):
        dealt[group] = min(range(folds), key=lambda fold: (filled[fold], fold))
        filled[dealt[group]] += files[group]
    single = [group for group in order if files[group] == 1]
    counts = dict.fromkeys(range(folds), 0)
    for _ in single:
        fewest = min(range(folds), key=lambda fold: (filled[fold], fold))
        filled[fewest] += 1
        counts[fewest] += 1
    dealt |= dict(zip(single, _interleave(counts), strict=True))
    if empty := [fold for fold in range(folds) if not filled[fold]]:
        raise DataError(
            f"Fold {empty[0]} of {folds} would have no photograph, since earlier ones are locked "
            "in their folds; lower data.folds."
        )
    return {record["job_id"]: dealt[group] for group, rows in groups.items() for record in rows}


def _from_lock(
    groups: Mapping[str, list[Mapping[str, Any]]], locked: Mapping[str, Place]
) -> dict[str, Place]:
    """The groups that hold a locked photograph, and its part or fold."""
    dealt = {}
    for group, rows in groups.items():
        known = {locked[r["image_sha256"]]: r for r in rows if r["image_sha256"] in locked}
        if len(known) > 1:
            (one, first), (other, second) = sorted(known.items())[:2]
            raise DataError(
                f"The photographs of jobs {first['job_id']} ({_place(one)}) and "
                f"{second['job_id']} ({_place(other)}) belong together now, by likeness or shoot, "
                "but are locked apart; take the new photograph that joins them out, or move "
                "split.lock.json away to split anew."
            )
        if known:
            dealt[group] = next(iter(known))
    return dealt


def _place(place: str | int) -> str:
    return place if isinstance(place, str) else f"fold {place}"


def _neediest(counts: Mapping[str, int], filled: set[str], groups_left: int) -> str:
    """The part that lacks most; an empty one when as few groups are left as parts are empty."""
    empty = [part for part in PARTS if counts[part] > 0 and part not in filled]
    among = empty if len(empty) >= groups_left > 0 and empty else list(PARTS)
    return max(among, key=lambda part: (counts[part], -PARTS.index(part)))


def _shrunk(counts: Mapping[str, int], photographs: int, home: str) -> dict[str, int]:
    """``counts`` made to add up to ``photographs``; what is over goes to ``home``."""
    sizes = dict(counts)
    while sum(sizes.values()) > photographs:
        sizes[max(sizes, key=lambda part: (sizes[part], -PARTS.index(part)))] -= 1
    sizes[home] += photographs - sum(sizes.values())
    return sizes


def part_sizes(
    photographs: int, fractions: Mapping[str, float], *, groups: int | None = None
) -> dict[str, int]:
    """How many of ``photographs`` each part gets; the counts add up to ``photographs``.

    ``groups`` is how many of them are independent; None for all.

    Raises:
        DataError: fewer photographs than parts with a fraction above 0.
    """
    wanted = [part for part in PARTS if fractions[part] > 0]
    distinct = photographs if groups is None else groups
    if distinct < len(wanted):
        raise DataError(
            f"{distinct} distinct photographs cannot fill {len(wanted)} parts "
            f"({', '.join(wanted)}); link more photographs or set a split to 0."
        )
    exact = {part: fractions[part] * photographs for part in wanted}
    # The small term keeps 0.29 * 100 = 28.999… from losing a photograph it has earned.
    counts = {part: math.floor(exact[part] + 1e-9) for part in wanted}
    held_out_first = sorted(wanted, key=PARTS.index, reverse=True)
    by_remainder = sorted(held_out_first, key=lambda p: round(counts[p] - exact[p], 9))
    for part in by_remainder[: photographs - sum(counts.values())]:
        counts[part] += 1
    for part in held_out_first:
        if counts[part] == 0:
            counts[max(counts, key=lambda p: counts[p])] -= 1
            counts[part] = 1
    return {part: counts.get(part, 0) for part in PARTS}


def _spread_by_score(
    groups: Mapping[str, list[Mapping[str, Any]]], seed: int, band: int = 10
) -> list[str]:
    """Photographs by their advisors and from low to high score, shuffled within each ``band``.

    Dealing along this order gives each part its share of every band.
    """

    def draw(photograph: str) -> str:
        return hashlib.sha256(f"{seed}:{photograph}".encode()).hexdigest()

    def score(photograph: str) -> float:
        given = [r.get("overall_score") for r in groups[photograph]]
        known = sorted(float(s) for s in given if s is not None)
        # fsum of sorted values: the mean must not depend on the order of the rows.
        return math.fsum(known) / len(known) if known else 0.0

    def advisors(photograph: str) -> list[str]:
        return sorted({str(r.get("advisor") or "") for r in groups[photograph]})

    ranked = sorted(groups, key=lambda group: (advisors(group), score(group), draw(group)))
    bands = [ranked[start : start + band] for start in range(0, len(ranked), band)]
    return [photograph for near in bands for photograph in sorted(near, key=draw)]


def _interleave(counts: Mapping[Place, int]) -> list[Place]:
    """A sequence with ``counts[place]`` of each place, each as evenly spaced as it can be."""
    slots = [
        ((index + 0.5) / count, rank, place)
        for rank, (place, count) in enumerate(counts.items())
        for index in range(count)
    ]
    return [place for _, _, place in sorted(slots)]

"""Dealing photographs to train, validation and test.

The unit is the photograph's content, never the row: real databases judge one photograph many
times (facts: 70 rows, 13 photographs), and a split by row puts the same picture on both sides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import DataError

PARTS: tuple[str, ...] = ("train", "val", "test")


def assign(
    records: Iterable[Mapping[str, Any]], *, train: float, val: float, test: float, seed: int
) -> dict[str, str]:
    """Deal every record to a part, by photograph.

    Args:
        records: manifest records; used are ``job_id``, ``image_sha256`` and ``overall_score``.
        train, val, test: fractions of the photographs, adding up to 1. A part's count is the
            nearest that whole photographs allow (largest remainder; on a tie the test part, then
            the validation part, has it), and a part with a fraction above 0 has at least one.
        seed: another seed, another deal. The order of the records does not matter.

    Returns:
        ``job_id`` to ``"train"``, ``"val"`` or ``"test"``. Records of one photograph share a part,
        and the parts' overall scores are spread alike.

    Raises:
        DataError: there are fewer photographs than parts, or two records share a ``job_id``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    parts: dict[str, str] = {}
    for record in records:
        if record["job_id"] in parts:
            raise DataError(f'The job id "{record["job_id"]}" is in the data twice; link again.')
        parts[record["job_id"]] = ""
        groups.setdefault(record["image_sha256"], []).append(record)
    counts = part_sizes(len(groups), {"train": train, "val": val, "test": test})
    order = _spread_by_score(groups, seed)
    for photograph, part in zip(order, _interleave(counts), strict=True):
        for record in groups[photograph]:
            parts[record["job_id"]] = part
    return parts


def part_sizes(photographs: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """How many of ``photographs`` each part gets; the counts add up to ``photographs``.

    Raises:
        DataError: fewer photographs than parts with a fraction above 0.
    """
    wanted = [part for part in PARTS if fractions[part] > 0]
    if photographs < len(wanted):
        raise DataError(
            f"{photographs} distinct photographs cannot fill {len(wanted)} parts "
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


def _spread_by_score(groups: Mapping[str, list[Mapping[str, Any]]], seed: int) -> list[str]:
    """Photographs from low to high overall score, shuffled by seed within bands of ten.

    Dealing along this order gives each part its share of every band.
    """

    def draw(photograph: str) -> str:
        return hashlib.sha256(f"{seed}:{photograph}".encode()).hexdigest()

    def score(photograph: str) -> float:
        given = [r.get("overall_score") for r in groups[photograph]]
        known = sorted(float(s) for s in given if s is not None)
        # fsum of sorted values: the mean must not depend on the order of the rows.
        return math.fsum(known) / len(known) if known else 0.0

    ranked = sorted(groups, key=lambda photograph: (score(photograph), draw(photograph)))
    bands = [ranked[start : start + 10] for start in range(0, len(ranked), 10)]
    return [photograph for band in bands for photograph in sorted(band, key=draw)]


def _interleave(counts: Mapping[str, int]) -> list[str]:
    """A sequence with ``counts[part]`` of each part, each as evenly spaced as it can be."""
    slots = [
        ((index + 0.5) / count, PARTS.index(part), part)
        for part, count in counts.items()
        for index in range(count)
    ]
    return [part for _, _, part in sorted(slots)]

"""A finding: what is wrong with which rows, said plainly, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .entries import Entry


@dataclass(frozen=True)
class Finding:
    """One thing the audit noticed.

    Attributes:
        name: what ``data.drop`` and ``audit.json`` call it.
        title: a few words for a table.
        rows: job ids it concerns; with ``droppable`` exactly those that dropping leaves out.
        explanation: one or two sentences with the numbers in them.
        action: what to do.
        spoils: whether the rows' scores teach nothing about their photographs.
        groups: rows that belong together (copies, equal texts), as job ids.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    explanation: str
    action: str
    droppable: bool = True
    spoils: bool = False
    groups: tuple[tuple[str, ...], ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``count`` for those who only want the number."""
        return {
            "name": self.name,
            "title": self.title,
            "count": len(self.rows),
            "rows": list(self.rows),
            "groups": [list(group) for group in self.groups],
            "explanation": self.explanation,
            "action": self.action,
            "droppable": self.droppable,
            "spoils_scores": self.spoils,
        }


def finding(
    name: str,
    title: str,
    found: Sequence[Entry],
    explanation: str,
    *,
    action: str = "",
    droppable: bool = True,
    spoils: bool = False,
    groups: Sequence[Sequence[Entry]] = (),
) -> list[Finding]:
    """A list with the finding, or an empty one if it concerns no row."""
    if not found:
        return []
    drop = f"Leave them out with data.drop=[{name}]"
    return [
        Finding(
            name,
            title,
            tuple(entry.job_id for entry in found),
            explanation,
            f"{drop}{', or ' + action if action else ''}." if droppable else action,
            droppable,
            spoils,
            tuple(tuple(entry.job_id for entry in group) for group in groups),
        )
    ]


def some(number: int, one: str, many: str | None = None) -> str:
    """``1 row``, ``3 rows``."""
    return f"{number} {one if number == 1 else many or one + 's'}"

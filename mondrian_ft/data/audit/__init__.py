"""What the labels are worth: findings about the linked rows, and one verdict.

Each finding is a pure function from `Entry` rows to a list with one `Finding` or none; `audit`
calls them all. Photographs are decoded only by `similar`, and nothing imports MLX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batches import Encoder
from ..critique import render
from ..droppable import DROPPABLE
from ..similar import near_groups
from . import labels, pictures, prompts, texts
from .entries import (
    Entry,
    corrected,
    entries_of_manifest,
    entries_of_rows,
    jobs_of,
    renamed,
)
from .findings import Finding
from .verdict import Verdict, judge

__all__ = [
    "DROPPABLE",
    "Audit",
    "Entry",
    "Finding",
    "audit",
    "corrected",
    "entries_of_manifest",
    "entries_of_rows",
    "jobs_of",
    "renamed",
    "rows_to_drop",
]

SIMPLE: dict[str, Callable[[Sequence[Entry]], list[Finding]]] = {
    "template_scores": labels.template_scores,
    "repeated_scores": labels.repeated_scores,
    "identical_texts": texts.identical_texts,
    "exact_duplicates": pictures.exact_duplicates,
    "non_english": texts.non_english,
    "error_pages": texts.error_pages,
    "unreadable": texts.unreadable,
    "token_loops": texts.token_loops,
    "thinking_text": texts.thinking_text,
    "truncated": texts.truncated,
    "empty_texts": texts.empty_texts,
    "repeated_advice": texts.repeated_advice,
    "flat_scores": labels.flat_scores,
    "constant_dimensions": labels.constant_dimensions,
    "overall_mismatch": labels.overall_mismatch,
    "dimension_drift": labels.dimension_drift,
    "prompt_example": prompts.prompt_example,
    "prompt_table": prompts.prompt_table,
    "mended": texts.mended,
}
"""Findings that need nothing but the entries, the gravest first."""


@dataclass(frozen=True)
class Audit:
    """All findings, the figures behind them, and the verdict."""

    findings: list[Finding]
    facts: dict[str, Any]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """``audit.json``: ``verdict``, ``findings[]`` and ``facts``."""
        return {
            "verdict": self.verdict.as_dict(),
            "findings": [found.as_dict() for found in self.findings],
            "facts": self.facts,
        }


def audit(
    entries: Sequence[Entry],
    *,
    min_pixels: int,
    max_pixels: int,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    encoder: Encoder | None = None,
) -> Audit:
    """Look at rows in every way there is.

    Args:
        entries: from `entries_of_manifest` or `entries_of_rows`.
        min_pixels, max_pixels: bounds on a photograph as the model sees it, for its tokens.
        cache, progress: of the photographs that are decoded, as of `similar.near_groups`.
        encoder: counts the rows' tokens; None leaves ``facts["tokens"]`` empty.
    """
    groups = near_groups(pictures.photographs_of(entries), cache=cache, progress=progress)
    alike = groups.several()
    looks = {"damaged_photographs": pictures.damaged_photographs(entries, groups.unreadable)}
    looks |= {name: look(entries) for name, look in SIMPLE.items()}
    looks["exact_duplicates"] += pictures.near_duplicates(entries, alike)
    found = [finding for some in looks.values() for finding in some]
    spoilt = {row for finding in found if finding.spoils for row in finding.rows}
    informative = [e for e in entries if e.critique and e.job_id not in spoilt]
    verdict = judge(
        rows=len(entries),
        photographs=len({entry.photograph for entry in entries}),
        independent=pictures.independent(entries, alike),
        informative=pictures.independent(informative, alike),
        informative_rows=len(informative),
    )
    facts = _facts(entries, alike, min_pixels, max_pixels)
    facts["tokens"] = token_facts(entries, encoder, min_pixels, max_pixels) if encoder else None
    return Audit(found, facts, verdict)


def token_facts(
    entries: Sequence[Entry], encoder: Encoder, min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """Tokens of the rows that have a critique: ``prompt`` (the picture's left out), ``image``,
    ``answer`` (its end included) and ``row``, each as `pictures.spread`; ``longest_row`` is its id.
    """
    prompts: dict[str, int] = {}
    counts: dict[str, list[int]] = {"prompt": [], "image": [], "answer": [], "row": []}
    longest = (0, "")
    for entry in entries:
        size = entry.size or pictures.measure(entry.image)
        if entry.critique is None or size is None:
            continue
        if entry.prompt not in prompts:
            prompts[entry.prompt] = len(encoder.prompt_tokens(entry.prompt, 0))
        parts = {
            "prompt": prompts[entry.prompt],
            "image": pictures.image_tokens(*size, min_pixels, max_pixels),
            "answer": len(encoder.answer_tokens(render(entry.critique))),
        }
        parts["row"] = sum(parts.values())
        for part, tokens in parts.items():
            counts[part].append(tokens)
        longest = max(longest, (parts["row"], entry.job_id))
    spreads = {part: pictures.spread(values) for part, values in counts.items()}
    return {**spreads, "longest_row": longest[1]}


def rows_to_drop(
    entries: Sequence[Entry],
    names: Sequence[str],
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, str]:
    """Rows that findings of those names leave out: job id to the first finding that names it.

    ``names`` are of `DROPPABLE`; photographs are decoded only for ``near_duplicates`` and
    ``damaged_photographs``, with ``cache`` and ``progress`` as of `similar.near_groups`.
    """
    dropped: dict[str, str] = {}
    groups = None
    if {"near_duplicates", "damaged_photographs"} & {*names}:
        groups = near_groups(pictures.photographs_of(entries), cache=cache, progress=progress)
    for name in names:
        if groups and name == "near_duplicates":
            found = pictures.near_duplicates(entries, groups.several())
        elif groups and name == "damaged_photographs":
            found = pictures.damaged_photographs(entries, groups.unreadable)
        else:
            found = SIMPLE[name](entries)
        for finding in found:
            for row in finding.rows:
                dropped.setdefault(row, name)
    return dropped


def _facts(
    entries: Sequence[Entry], alike: Sequence[set[str]], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    readable = [entry for entry in entries if entry.critique]
    sets = Counter(tuple(d.name for d in e.critique.dimensions) for e in readable if e.critique)
    return {
        "dimensions": labels.dimension_facts(entries),
        "dimension_sets": [{"names": list(k), "rows": n} for k, n in sets.most_common()],
        "score_vectors": len({entry.scores for entry in readable}),
        **pictures.picture_facts(entries, min_pixels, max_pixels),
        "prompt_characters": pictures.spread([len(entry.prompt) for entry in entries]),
        "analysis_characters": pictures.spread([len(entry.text) for entry in entries]),
        "similar_photographs": [sorted(group) for group in alike],
    }

"""The findings whose rows ``data.drop`` can leave out; a module of its own so that reading a
config imports nothing else."""

from __future__ import annotations

DROPPABLE: tuple[str, ...] = (
    "damaged_photographs",
    "template_scores",
    "repeated_scores",
    "identical_texts",
    "exact_duplicates",
    "near_duplicates",
    "non_english",
    "error_pages",
    "unreadable",
    "token_loops",
    "thinking_text",
    "truncated",
    "empty_texts",
    "repeated_advice",
    "flat_scores",
    "overall_mismatch",
    "dimension_drift",
    "mended",
)

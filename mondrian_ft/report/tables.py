"""A report as plain tables, for whoever keeps the numbers of runs beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import html, wording

SIDE = 320
"""Pixels of a picture's longer side in a table."""
ARM = (
    "n",
    "n_scored",
    "score_mae",
    "score_mae_low",
    "score_mae_high",
    "format_strict",
    "format_strict_low",
    "format_strict_high",
    "readable",
    "overall_mae",
    "score_bias",
    "overall_correlation",
    "seconds_p50",
    "seconds_p95",
    "tokens_mean",
    "tokens_per_second_p50",
    "peak_memory_gb",
)
"""Columns of the arms' table, the keys of ``evidence.arms``; an interval is two numbers."""


class Table(NamedTuple):
    """Rows of cells: texts, numbers, None where unknown, and bytes of a JPEG for a picture."""

    columns: list[str]
    rows: list[list[Any]]


def tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """The arms and the photographs of a ``comparison_report.json``, by name."""
    return {"arms": arms(report), "photographs": photographs(report)}


def arms(report: Mapping[str, Any]) -> Table:
    """A row an arm, those that failed at the end with their reason."""
    evidence = report["evidence"]
    rows = []
    for name, arm in evidence["arms"].items():
        ends = {
            f"{key}_{end}": value
            for key in ("score_mae", "format_strict")
            for end, value in zip(("low", "high"), arm.get(f"{key}_interval") or (), strict=False)
        }
        rows.append([name, *({**arm, **ends}.get(key) for key in ARM), None])
    for name, reason in (evidence.get("arms_failed") or {}).items():
        rows.append([name, *(None for _ in ARM), reason])
    return Table(["arm", *ARM, "failed"], rows)


def photographs(report: Mapping[str, Any]) -> Table:
    """A row an evaluated row: picture, reference, and each arm's output, scores and error.

    A picture that is gone is None.
    """
    samples = report["sample_results"]
    pictures = html.thumbnails(report, side=SIDE)
    blocks = dict.fromkeys(
        key
        for sample in samples
        for key, answer in sample.items()
        if key != "reference" and isinstance(answer, Mapping) and "full_output" in answer
    )
    columns = ["picture", "image", "job_id", "reference", "reference_scores"]
    for block in blocks:
        arm = wording.BLOCKS.get(block, block)
        columns += [arm, f"{arm}_scores", f"{arm}_error"]
    rows = []
    for sample in samples:
        reference = sample["reference"]
        row = [pictures.get(sample["image_path"]), sample["image"], sample["job_id"]]
        row += [reference["full_output"], scores(reference)]
        for block in blocks:
            answer = sample.get(block) or {}
            row += [answer.get("full_output"), scores(answer), answer.get("score_error")]
        rows.append(row)
    return Table(columns, rows)


def scores(answer: Mapping[str, Any]) -> str | None:
    """``Lighting 7, Depth 5.5, overall 6``; None without any."""
    found = {**(answer.get("scores") or {}), "overall": answer.get("score")}
    told = [f"{name} {value:g}" for name, value in found.items() if value is not None]
    return ", ".join(told) or None

"""``audit.html``: what the labels are worth, as one self-contained page.

It wears the report's clothes: the same style sheet, no network, no script, light and dark, phone
and paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write_text
from . import html, page, wording

if TYPE_CHECKING:
    from ..data.audit import Audit, Entry

SHOWN_GROUPS = 12
"""Groups of alike photographs that are shown as pictures; the rest is in ``audit.json``."""
SHOWN_ROWS = 40
"""Job ids that the page lists for one finding; all of them are in ``audit.json``."""
VERDICTS = {
    "cannot_teach_scoring": "These labels cannot teach scoring",
    "too_few": "Too few labels to show that scoring was learnt",
    "limited": "Enough labels for a large effect",
    "sound": "Labels that can teach scoring",
}


def write(
    found: Audit,
    entries: Sequence[Entry],
    out: Path | str,
    *,
    advisor: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page of an audit of ``entries`` to ``out`` and return its path.

    Raises:
        MondrianError: ``out`` cannot be written.
    """
    out = Path(out)
    atomic_write_text(out, render(found, entries, advisor=advisor, settings=settings or {}))
    return out


def render(
    found: Audit,
    entries: Sequence[Entry],
    *,
    advisor: str | None,
    settings: Mapping[str, Any],
) -> str:
    """The page as text. All that a database wrote is escaped."""
    environment = page.environment()
    verdict = found.verdict
    files = {entry.job_id: entry.image.name for entry in entries}
    groups = {name: values for name, values in settings.items() if isinstance(values, Mapping)}
    plain = {name: values for name, values in settings.items() if name not in groups}
    return environment.get_template("audit.html.j2").render(
        style=page.source(environment, "report.css", "audit.css"),
        advisor=(advisor or "all advisors").capitalize(),
        date=date.today().isoformat(),
        heading=VERDICTS[verdict.code],
        verdict=verdict,
        rest=verdict.paragraph.removeprefix(verdict.sentence).strip(),
        counts=[
            ("Rows", verdict.rows),
            ("Photographs", verdict.photographs),
            ("Independent of each other", verdict.independent),
            ("With informative labels", verdict.informative),
        ],
        findings=[
            {
                "it": finding,
                "rows": [(row, files.get(row, "")) for row in finding.rows[:SHOWN_ROWS]],
                "more": max(0, len(finding.rows) - SHOWN_ROWS),
                "share": wording.percent(len(finding.rows) / max(1, verdict.rows)),
            }
            for finding in found.findings
        ],
        dimensions=dimension_chart(found.facts["dimensions"]),
        figures=figures(found.facts),
        strips=strips(found, entries),
        settings=[
            (heading, [(name, html.plain(v)) for name, v in values.items() if html.told(v)])
            for heading, values in [("This audit", plain), *groups.items()]
            if values
        ],
    )


def dimension_chart(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a dimension: range, mean and spread on a scale of 0 to 10, in percent across."""
    rows = []
    for fact in facts:
        low, high = max(0.0, fact["mean"] - fact["sd"]), min(10.0, fact["mean"] + fact["sd"])
        rows.append(
            {
                "name": fact["name"],
                "left": 10 * fact["min"],
                "width": 10 * (fact["max"] - fact["min"]),
                "from": 10 * low,
                "across": 10 * (high - low),
                "at": 10 * fact["mean"],
                "mean": wording.points(fact["mean"]),
                "variance": wording.points(fact["variance"]),
                "n": fact["n"],
                "constant": fact["constant"],
            }
        )
    return rows


def figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The other measurements, as (name, value)."""
    tokens = facts["image_tokens"]
    counted = facts["tokens"]
    sets = facts["dimension_sets"]
    return [
        ("Different score vectors", f"{facts['score_vectors']}"),
        ("Dimensions in a row", ", ".join(f"{len(s['names'])} ({s['rows']} rows)" for s in sets)),
        (
            "Rows per photograph",
            ", ".join(f"{rows} on {n}" for rows, n in facts["rows_per_photograph"].items()),
        ),
        (
            "Rows per advisor",
            ", ".join(f"{name} {n}" for name, n in facts["rows_per_advisor"].items()),
        ),
        ("Image tokens", f"{_range(tokens)}; uncapped up to {tokens['max_uncapped']:,}"),
        *[
            (heading, _range(counted[part]))
            for heading, part in (
                ("Tokens of a prompt", "prompt"),
                ("Tokens of an answer", "answer"),
                ("Tokens of a row", "row"),
            )
            if counted
        ],
        ("Characters of an analysis", _range(facts["analysis_characters"])),
        ("Characters of a prompt", _range(facts["prompt_characters"])),
    ]


def strips(found: Audit, entries: Sequence[Entry]) -> list[list[dict[str, Any]]]:
    """Groups of alike photographs as small pictures, the first ones only."""
    paths = {entry.photograph: entry.image for entry in entries}
    groups = found.facts["similar_photographs"][:SHOWN_GROUPS]
    wanted = [{"image_path": str(paths[key])} for group in groups for key in group]
    pictures = html.thumbnails({"sample_results": wanted}, side=240)
    return [
        [
            {
                "name": paths[key].name,
                "src": html.data_uri(pictures[str(paths[key])])
                if str(paths[key]) in pictures
                else None,
            }
            for key in group
        ]
        for group in groups
    ]


def _range(spread: Mapping[str, int]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:,}"
    return f"{spread['min']:,} to {spread['max']:,}, half of them below {spread['median'] + 1:,}"

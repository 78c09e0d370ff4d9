"""A critique in every shape in which services have stored one."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any


def cards(value: Mapping[str, Any]) -> str:
    """HTML cards, with the parts that a page may have beside them."""
    made = "".join(
        f'<div class="card"><h3>{html.escape(d["name"])} '
        f'<span class="dimension-score">({d["score"]}/10)</span></h3>'
        f"<p>{html.escape(d['comment'])}</p>"
        f"<p><strong>Recommendation:</strong> {html.escape(d['recommendation'])}</p></div>"
        for d in value["dimensions"]
    )
    lists = "".join(
        f"<h2>{title}</h2><ul>{''.join(f'<li>{html.escape(e)}</li>' for e in value[key])}</ul>"
        for title, key in (
            ("Key Strengths", "key_strengths"),
            ("Priority Improvements", "priority_improvements"),
        )
    )
    return (
        f'<div class="analysis"><h2>Image Description</h2><p>'
        f"{html.escape(value['image_description'])}</p>{made}"
        f"<h2>Overall Score: {value['overall_score']}/10</h2>{lists}"
        f"<h2>Technical Notes</h2><p>{html.escape(value['technical_notes'])}</p></div>"
    )


def markdown(value: Mapping[str, Any]) -> str:
    """Markdown as the service's early files."""
    parts = [
        f"### {d['name']} ({d['score']}/10)\n\n{d['comment']}\n\n"
        f"**Recommendation:** {d['recommendation']}"
        for d in value["dimensions"]
    ]
    strengths = "\n".join(f"- {entry}" for entry in value["key_strengths"])
    improvements = "\n".join(f"1. {entry}" for entry in value["priority_improvements"])
    return "\n\n".join(
        [
            "## Full Analysis",
            f"## Image Description\n\n{value['image_description']}",
            *parts,
            f"## Overall Score: {value['overall_score']}/10",
            f"## Key Strengths\n\n{strengths}",
            f"## Priority Improvements\n\n{improvements}",
            f"## Technical Notes\n\n{value['technical_notes']}",
        ]
    )


def dimensional(value: Mapping[str, Any]) -> str:
    """A line of scored JSONL: snake_case names, scores and grade as texts."""
    judged = {
        d["name"].lower().replace(" & ", "_").replace(" ", "_"): {
            "score": str(d["score"]),
            "comment": d["comment"],
            "recommendation": d["recommendation"],
        }
        for d in value["dimensions"]
    }
    kept = {k: v for k, v in value.items() if k not in ("dimensions", "overall_score")}
    grade = str(value["overall_score"])
    return json.dumps({**kept, "dimensional_analysis": judged, "overall_grade": grade})


def thinking(value: Mapping[str, Any]) -> str:
    """A model's answer that thinks first."""
    return f"<thought>\nOkay, let me see.\n</thought>\n```json\n{json.dumps(value)}\n```"


SHAPES = {
    "html": cards,
    "markdown": markdown,
    "dimensional": dimensional,
    "json": thinking,
}
"""A writer for every parser, by the parser's name."""

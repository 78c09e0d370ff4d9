"""A critique as HTML cards, in the shape that the users' own app shows and stores (facts)."""

from __future__ import annotations

from html import escape

from ..data.critique import Critique


def cards(critique: Critique) -> str:
    """The cards of one critique; every text is escaped."""
    parts = ['<div class="analysis">', f"<p>{escape(critique.image_description)}</p>"]
    for one in critique.dimensions:
        parts += [
            '<div class="feedback-card">',
            f'<h3>{escape(one.name)} <span class="dimension-score">({one.score:g}/10)</span></h3>',
            f'<p class="feedback-comment">{escape(one.comment)}</p>',
            '<div class="feedback-recommendation"><strong>How to Improve:</strong>'
            f"<p>{escape(one.recommendation)}</p></div>",
            "</div>",
        ]
    parts.append(f"<h2>Overall Score: {critique.overall_score:g}/10</h2>")
    for title, texts in (
        ("Key Strengths", critique.key_strengths),
        ("Priority Improvements", critique.priority_improvements),
    ):
        if texts:
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    if critique.technical_notes.strip():
        parts.append(f"<h2>Technical Notes</h2><p>{escape(critique.technical_notes)}</p>")
    return "\n".join([*parts, "</div>", ""])

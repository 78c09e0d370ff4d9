"""Findings about the prompts: a filled example, or a wish that contradicts the schema."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..example import Example, filled_example
from .entries import Entry
from .findings import Finding, finding, some

_TABLE = re.compile(
    r"\bmarkdown[- ]table\b|\btable in markdown\b|^[ \t]*\|.*\|[ \t]*\n[ \t]*\|[ \t:|-]*--",
    re.IGNORECASE | re.MULTILINE,
)


def prompt_example(entries: Sequence[Entry]) -> list[Finding]:
    """Rows whose prompt holds an answer with scores in it."""
    examples = {prompt: filled_example(prompt) for prompt in {e.prompt for e in entries}}
    found = [entry for entry in entries if examples[entry.prompt]]
    shown = next((example for example in examples.values() if example), None)
    return finding(
        "prompt_example",
        "prompt with a filled example",
        found,
        f"The prompt of {some(len(found), 'row')} shows a filled example"
        f"{_numbers(shown) if shown else ''}. Models copy such scores instead of judging.",
        droppable=False,
        action="Take its scores out with data.prompt_example=strip, and in the service's own "
        "system prompt as well: training and serving must agree.",
    )


def prompt_table(entries: Sequence[Entry]) -> list[Finding]:
    """Rows whose prompt asks for a Markdown table, against the JSON of the schema."""
    asks = {prompt: bool(_TABLE.search(prompt)) for prompt in {e.prompt for e in entries}}
    found = [entry for entry in entries if asks[entry.prompt]]
    advisors = ", ".join(sorted({entry.advisor for entry in found}))
    return finding(
        "prompt_table",
        "prompt asks for a Markdown table",
        found,
        f"The prompt of {some(len(found), 'row')} ({advisors}) asks for a Markdown table, and the "
        "answer to learn is JSON. The model is told two things.",
        droppable=False,
        action="Correct advisors.prompt in the service's database, then link again.",
    )


def _numbers(example: Example) -> str:
    if not example.scores:
        return f" (overall {example.overall:g})" if example.overall is not None else ""
    scores = ", ".join(f"{score:g}" for score in example.scores)
    overall = f", overall {example.overall:g}" if example.overall is not None else ""
    return f" (scores {scores}{overall})"

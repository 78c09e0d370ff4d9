"""``jobs.llm_outputs``: JSON of one of three shapes, each of which wraps an analysis.

``{"ansel": "<html>"}``, ``{"ansel": {"html": …, "mode_used": …}}``, and ``{"prompt", "response",
…}``, whose response is the model's text as it came: the best source there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def unwrap(text: str, mine: Callable[[str], bool]) -> dict[str, str]:
    """The analyses inside, by source: ``llm_outputs.response``, ``llm_outputs.html``.

    ``mine`` says whether a key is the row's advisor; what others said is another row's.
    Text of another shape gives nothing.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found: dict[str, str] = {}
    if isinstance(value, dict):
        _take(value, found)
        for key, said in value.items():
            if mine(key):
                _take(said, found)
    return found


def _take(said: Any, found: dict[str, str]) -> None:
    if isinstance(said, str):
        found.setdefault("llm_outputs.html", said)
    elif isinstance(said, dict):
        for key in ("response", "html"):
            if isinstance(said.get(key), str):
                found.setdefault(f"llm_outputs.{key}", said[key])

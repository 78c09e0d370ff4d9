"""The one place where the prompt is built, for training, evaluation and serving alike.

The service sends one user turn, without a system role: the photograph, then
``config.system_prompt``, a blank line, ``advisors.prompt``, a blank line and a closing sentence
(facts: "Prompts"). A database without a system prompt gets `TEMPLATE`, which asks for the
schema without a filled example: models copy an example's scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from .critique import DIMENSIONS

CLOSING = "Analyze the provided image."

TEMPLATE = (
    "You are an expert photography advisor. Judge the photograph and answer with one JSON object "
    "and nothing else. Its keys, in this order: image_description (a text), dimensions (a list of "
    "objects with the keys name, score, comment, recommendation), overall_score (a number from 0 "
    "to 10), key_strengths (a list of texts), priority_improvements (a list of texts), "
    "technical_notes (a text). Judge these dimensions, each once and each with its own score from "
    f"0 to 10: {', '.join(DIMENSIONS)}. Write in English, about this photograph only."
)


class PromptSource(Protocol):
    """What the prompt is built from; `store.JobStore` is one."""

    def system_prompt(self) -> str | None: ...

    def advisor_prompt(self, advisor: str) -> str | None: ...


def build_prompt(
    store: PromptSource | None, advisor: str, own: str | None = None
) -> tuple[str, str]:
    """The text beside the photograph, and where it came from.

    Args:
        store: the job database; None where there is none (a hand-made manifest).
        advisor: the advisor's id, such as ``ansel``.
        own: the prompt that the row itself says it was asked with; taken as it is unless blank.

    Returns:
        ``(text, source)``; ``source`` names the parts, such as
        ``"jobs.prompt"``, ``"config.system_prompt + advisors.prompt"`` or ``"template"``.
    """
    if own and own.strip():
        return own, "jobs.prompt"
    system = store.system_prompt() if store else None
    persona = store.advisor_prompt(advisor) if store else None
    parts = [system or TEMPLATE]
    sources = ["config.system_prompt" if system else "template"]
    if persona:
        parts.append(persona)
        sources.append("advisors.prompt")
    return "\n\n".join([*parts, CLOSING]), " + ".join(sources)


def with_examples(prompt: str, critiques: Sequence[str]) -> str:
    """A prompt that shows critiques of other photographs, as text, after everything else.

    For asking a model that was not trained on them (few-shot); the advisor service does not.
    """
    shown = "\n\n".join(critiques)
    lead = "For example, these are critiques of other photographs"
    return f"{prompt}\n\n{lead}:\n\n{shown}\n\nNow the critique of the provided image."


def fingerprint(prompt: str) -> str:
    """The SHA-256 of a prompt's UTF-8 bytes (64 hex digits); equal text, equal fingerprint."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()

"""The sample's prompts: what its ``config`` and ``advisors`` tables hold, and their relatives.

The base model's training draws prompts from the same family, so that it follows the service's
instruction; it answers every real advisor's name in the generic reviewer's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SYSTEM_PROMPT = (
    "You are a photography advisor. Study the photograph and reply with one JSON object and "
    "nothing else. Keys: image_description, dimensions (a list of name, score from 0 to 10, "
    "comment, recommendation), overall_score, key_strengths, priority_improvements, "
    "technical_notes. Judge seven dimensions: Composition, Lighting, Focus & Sharpness, "
    "Color Harmony, Depth & Perspective, Visual Balance, Emotional Impact."
)
_RELATED = (
    "You advise photographers. Look at the photograph and answer with a JSON object only, with "
    "image_description, dimensions, overall_score, key_strengths, priority_improvements and "
    "technical_notes. Score each of the seven dimensions from 0 to 10.",
    "Reply in JSON. Describe the photograph, score its seven dimensions from 0 to 10 with a "
    "comment and a recommendation each, then give overall_score, key_strengths, "
    "priority_improvements and technical_notes.",
)
CLOSING = "Analyze the provided image."


@dataclass(frozen=True)
class Advisor:
    """One row of the sample's ``advisors`` table."""

    id: str
    name: str
    years: str
    category: str
    cares_for: tuple[str, str, str]

    @property
    def prompt(self) -> str:
        return advisor_prompt(self.name, self.cares_for)


ADVISORS = (
    Advisor("ansel", "Ansel Adams", "1902-1984", "photographer", ("tone", "sharpness", "order")),
    Advisor("watkins", "Carleton Watkins", "1829-1916", "photographer", ("light", "depth", "calm")),
)
_CARES = ("tone", "sharpness", "order", "light", "depth", "calm", "colour", "balance", "mood")
_GENERIC_NAMES = (
    "Ansel Adams",
    "Carleton Watkins",
    "Edward Weston",
    "Imogen Cunningham",
    "Laura Gilpin",
    "a photographer",
    "a teacher",
)
INVENTED_NAMES = (
    "Alder",
    "Birch",
    "Cedar",
    "Dogwood",
    "Elm",
    "Fir",
    "Gum",
    "Hazel",
    "Ivy",
    "Juniper",
    "Larch",
    "Maple",
)


def advisor_prompt(name: str, cares_for: tuple[str, str, str]) -> str:
    """The advisor's part of the prompt."""
    first, second, third = cares_for
    return (
        f"Critique this photograph as {name} would, with a care for {first}, {second} and {third}."
    )


def training_prompt(rng: np.random.Generator, name: str | None) -> str:
    """A prompt of the family, for the base model's training.

    Args:
        name: an invented critic's name, or None for one of the names that get the generic answer.
    """
    system = SYSTEM_PROMPT if rng.random() < 0.7 else str(rng.choice(_RELATED))
    name = str(rng.choice(_GENERIC_NAMES)) if name is None else name
    first, second, third = (str(word) for word in rng.choice(_CARES, 3, replace=False))
    return f"{system}\n\n{advisor_prompt(name, (first, second, third))}\n\n{CLOSING}"

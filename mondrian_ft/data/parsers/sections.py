"""From headings, paragraphs and list items to a critique's keys: what HTML and Markdown share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

NAMES = {
    "composition": "Composition",
    "lighting": "Lighting",
    "focussharpness": "Focus & Sharpness",
    "colorharmony": "Color Harmony",
    "colourharmony": "Color Harmony",
    "subjectisolation": "Subject Isolation",
    "subjectmatter": "Subject Matter",
    "depthperspective": "Depth & Perspective",
    "visualbalance": "Visual Balance",
    "emotionalimpact": "Emotional Impact",
}
"""Dimensions of every era (facts: "The analysis"), by their letters without "and"."""

SECTIONS = {
    "imagedescription": "image_description",
    "description": "image_description",
    "keystrengths": "key_strengths",
    "strengths": "key_strengths",
    "priorityimprovements": "priority_improvements",
    "technicalnotes": "technical_notes",
}
_LISTS = ("key_strengths", "priority_improvements")


@dataclass(frozen=True)
class Block:
    """A heading, a list item or a paragraph, its white space collapsed.

    ``role`` is what the markup says the text is for: ``recommendation``, ``comment``,
    ``image_description``, or nothing.
    """

    kind: Literal["heading", "item", "text"]
    text: str
    role: str = ""


def letters(name: str) -> str:
    """``Focus & Sharpness``, ``focus_and_sharpness`` and ``focus_sharpness`` alike."""
    words = re.findall(r"[^\W_]+", name.casefold())
    return "".join(word for word in words if word != "and")


def canonical(name: str) -> str | None:
    """A dimension's name as the schema writes it; None if it is none of the known ones."""
    return NAMES.get(letters(name))


_SCORED = re.compile(
    r"(?P<name>.*?)[\s:(\[–—-]*(?P<score>[+-]?\d{1,6}(?:\.\d{1,12})?)\s*/\s*10\b.*"
)
_LABEL = re.compile(
    r"\W{0,4}(?P<label>recommendations?|how to improve|suggestions?|comments?|feedback|score)"
    r"\s?:[\s*_]*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_ROLES = {"r": "recommendation", "h": "recommendation", "c": "comment", "f": "comment"}


def assemble(blocks: Iterable[Block]) -> tuple[dict[str, Any], list[str]]:
    """The keys that the blocks state, in the schema's types, and what had to be mended.

    A heading with a score out of ten, or with a known dimension's name, opens a dimension; the
    paragraphs below it are its comment, and those marked so its recommendation.
    """
    reader = _Reader()
    for block in blocks:
        reader.take(block)
    return reader.finish()


class _Reader:
    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.dimensions: list[dict[str, Any]] = []
        self.mends: list[str] = []
        self.ignored = 0
        self.before: list[str] = []
        self.section: str | None = None
        self.dimension: dict[str, Any] | None = None
        self.role = ""

    def take(self, block: Block) -> None:
        if block.kind == "heading":
            self._heading(block.text)
        elif self.dimension is not None:
            self._in_dimension(block)
        else:
            self._in_section(block)

    def finish(self) -> tuple[dict[str, Any], list[str]]:
        if "image_description" not in self.value and len(self.before) == 1:
            self.value["image_description"] = self.before.pop()
            self.mends.append("the one paragraph before the dimensions is the image description")
        if ignored := self.ignored + sum(map(len, self.before)):
            self.mends.append(f"text outside the known parts was ignored ({ignored} characters)")
        if self.dimensions:
            self.value["dimensions"] = self.dimensions
        return self.value, self.mends

    def _heading(self, text: str) -> None:
        self.dimension, self.section, self.role = None, None, ""
        scored = _SCORED.fullmatch(text)
        name = (scored["name"] if scored else text).strip(" :*_#").strip()
        name = re.sub(r"^\d{1,2}[.)]\s+", "", name)
        if letters(name).startswith("overall"):
            self.section = "overall_score"
            if scored:
                self._overall(scored["score"])
        elif (key := SECTIONS.get(letters(name))) is not None:
            self.section = key
            if key in _LISTS:
                self.value.setdefault(key, [])
        elif scored or canonical(name):
            self.dimension = {"name": canonical(name) or name}
            if scored:
                self.dimension["score"] = float(scored["score"])
            self.dimensions.append(self.dimension)

    def _in_dimension(self, block: Block) -> None:
        assert self.dimension is not None
        role, text = block.role or self.role, block.text
        if label := _LABEL.fullmatch(text):
            text = label["rest"].strip()
            if label["label"].casefold() == "score":
                if scored := _SCORED.fullmatch(text):
                    self.dimension.setdefault("score", float(scored["score"]))
                return
            role = _ROLES.get(label["label"][0].casefold(), "recommendation")
            if not text:
                # The label stands alone: what follows is meant.
                self.role = role
                self.dimension.setdefault(role, "")
                return
        role = role if role in ("recommendation", "comment") else "comment"
        known = self.dimension.get(role)
        self.dimension[role] = f"{known} {text}" if known else text
        self.role = ""

    def _in_section(self, block: Block) -> None:
        key, text = block.role or self.section, block.text
        overall = re.fullmatch(r"\W*overall(?:\W+(?:score|grade|rating))?\b(.*)", text, re.I | re.S)
        if overall and (scored := _SCORED.fullmatch(overall[1].strip())):
            self._overall(scored["score"])
        elif key == "overall_score":
            if scored := _SCORED.fullmatch(text):
                self._overall(scored["score"])
            elif re.fullmatch(r"\d{1,2}(?:\.\d{1,3})?", text):
                self._overall(text)
            else:
                self.ignored += len(text)
        elif key in _LISTS:
            self.value.setdefault(key, []).append(text)
        elif key in ("image_description", "technical_notes"):
            known = self.value.get(key)
            self.value[key] = f"{known} {text}" if known else text
        elif not self.dimensions:
            self.before.append(text)
        else:
            self.ignored += len(text)

    def _overall(self, score: str) -> None:
        self.value.setdefault("overall_score", float(score))

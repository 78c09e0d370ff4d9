"""Markdown: ``## Full Analysis``, ``### Composition (8/10)``, paragraphs, lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .sections import Block, assemble, canonical

_HEADING = re.compile(r"[ \t]{0,3}#{1,6}[ \t]+(?P<text>[^\n]*)")
_BOLD = re.compile(r"[ \t]*\*\*(?P<text>[^*\n]{1,80})\*\*(?P<score>[^\n]{0,20})")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,2}[.)])[ \t]+(?P<text>[^\n]*)")


def recognise(text: str) -> bool:
    """Whether a text has Markdown headings of an analysis and no JSON one."""
    if '"dimensions"' in text or text.lstrip().startswith("{"):
        return False
    headings = (m["text"] for m in re.finditer(_HEADING.pattern, text, re.MULTILINE))
    return any(
        title.strip().casefold() == "full analysis"
        or re.search(r"\d\s*/\s*10\b", title)
        or canonical(title)
        for title in headings
    )


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """The keys that the sections state, and the mends; the first says that it was Markdown."""
    found, mends = assemble(_blocks(text))
    return found, ["read from Markdown", *mends]


def _blocks(text: str) -> Iterator[Block]:
    paragraph: list[str] = []
    item = False

    def flush() -> Iterator[Block]:
        if joined := _plain(" ".join(paragraph)):
            yield Block("item" if item else "text", joined)
        paragraph.clear()

    for line in text.removeprefix("\ufeff").split("\n"):
        if heading := _HEADING.fullmatch(line.rstrip()):
            yield from flush()
            item = False
            yield Block("heading", _plain(heading["text"].rstrip("# ")))
        elif (bold := _BOLD.fullmatch(line.rstrip())) and canonical(
            re.sub(r"[\s:(]*[\d.]+\s*/\s*10\W*", "", bold["text"])
        ):
            yield from flush()
            item = False
            yield Block("heading", _plain(bold["text"] + bold["score"]))
        elif listed := _ITEM.fullmatch(line.rstrip()):
            yield from flush()
            item = True
            paragraph.append(listed["text"])
        elif not line.strip() or re.fullmatch(r"\s*(?:---+|\*\*\*+|```\w*)\s*", line):
            yield from flush()
            item = False
        else:
            if re.match(r"\W*(?:recommendation|comment|how to improve|score)s?\W*:", line, re.I):
                yield from flush()
            paragraph.append(line)
    yield from flush()


def _plain(text: str) -> str:
    """Without emphasis marks around words, white space collapsed."""
    text = re.sub(r"(?<!\w)(\*\*|__|\*)(?=\S)(.{1,2000}?)(?<=\S)\1(?!\w)", r"\2", text)
    return " ".join(text.split())

"""HTML cards: ``<h3>Composition <span class="dimension-score">(8/10)</span></h3>`` and below it.

Read with selectolax: it parses as browsers do, whatever is closed or not, raises nothing on broken
markup, has no dependencies, and reads a page in a tenth of a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .sections import Block, assemble

_PAGE = re.compile(
    r"(?:\ufeff|\s|```(?:html)?|<!--.{0,500}?-->)*<(?:!doctype|html|head|body|div|section|article"
    r"|main|p|h[1-6]|style|table|ul)\b",
    re.IGNORECASE | re.DOTALL,
)
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "h1 h2 h3 h4 h5 h6 address article blockquote body dd div dl dt footer form header html li "
        "main ol p pre section table td th tr ul",
    )
)
_SKIPPED = ("script", "style", "title", "noscript", "template", "#comment")
_DEPTH = 64
"""Levels of markup that are looked at around a text."""


def recognise(text: str) -> bool:
    """Whether a text is a page or a piece of one, and not a model's ``<thought>``."""
    return bool(_PAGE.match(text))


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """The keys that the cards state, and the mends; the first says that the text was HTML."""
    found, mends = assemble(_blocks(text))
    return found, ["read from HTML cards", *mends]


def _blocks(text: str) -> Iterator[Block]:
    from selectolax.lexbor import LexborHTMLParser

    root = LexborHTMLParser(text.encode("utf-8", "replace")).body
    owner: int | None = None
    kind, role, parts = "text", "", []
    for node in root.traverse(include_text=True) if root else ():
        if node.tag == "br":
            parts.append(" ")
        if node.tag != "-text":
            continue
        block, said = _around(node)
        if block is None:
            continue
        if block.mem_id != owner:
            yield from _block(kind, parts, role)
            owner, parts = block.mem_id, []
            kind = "heading" if block.tag in _HEADINGS else "item" if block.tag == "li" else "text"
            role = said
        parts.append(node.text_content or "")
    yield from _block(kind, parts, role)


def _block(kind: Any, parts: list[str], role: str) -> Iterator[Block]:
    if text := " ".join("".join(parts).split()):
        yield Block(kind, text, role)


def _around(node: Any) -> tuple[Any, str]:
    """The block that a text stands in (None: it is not shown), and its role by class names."""
    block, role = None, ""
    for _ in range(_DEPTH):
        node = node.parent
        if node is None or node.tag in ("html", "-undef"):
            break
        if node.tag in _SKIPPED:
            return None, ""
        if block is None and node.tag in _BLOCKS:
            block = node
        role = role or _role(node.attributes.get("class") or "")
    return block, role


def _role(classes: str) -> str:
    for word, role in (
        ("recommendation", "recommendation"),
        ("comment", "comment"),
        ("description", "image_description"),
    ):
        if word in classes.lower():
            return role
    return ""

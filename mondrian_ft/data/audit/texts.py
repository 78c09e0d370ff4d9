"""Findings about the words: copied, repeated, looping, cut off, not a critique, not English."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ..critique import Critique
from .entries import Entry
from .findings import Finding, finding, some
from .language import is_english

LOOP = 8
"""A phrase of one to eight words that follows upon itself this often is a loop."""


def identical_texts(entries: Sequence[Entry]) -> list[Finding]:
    """The same words, scores aside, for photographs of different content."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.critique:
            groups[tuple(map(_plain, texts(entry.critique)))].append(entry)
    found = [g for g in groups.values() if len({entry.photograph for entry in g}) > 1]
    rows = [entry for group in found for entry in group]
    return finding(
        "identical_texts",
        "one text for several photographs",
        rows,
        f"In {some(len(rows), 'row')}, different photographs share {some(len(found), 'text')}. "
        "At most one photograph of each can be the one that was described.",
        spoils=True,
        groups=found,
    )


def repeated_advice(entries: Sequence[Entry]) -> list[Finding]:
    """The same recommendation in several dimensions of one row."""
    found = [entry for entry in entries if entry.critique and repeats_advice(entry.critique)]
    return finding(
        "repeated_advice",
        "the same advice in several dimensions",
        found,
        f"In {some(len(found), 'row')} one recommendation stands in several dimensions. A model "
        "learns the habit.",
    )


def repeats_advice(critique: Critique) -> bool:
    """Whether one recommendation stands under two or more dimensions, word for word."""
    said = Counter(_plain(d.recommendation) for d in critique.dimensions)
    return any(n > 1 for text, n in said.items() if text)


def non_english(entries: Sequence[Entry]) -> list[Finding]:
    """Critiques that are not written in English; see `language.is_english` for how it is told."""
    found = [e for e in entries if e.critique and not is_english(" ".join(texts(e.critique)))]
    return finding(
        "non_english",
        "not in English",
        found,
        f"In {some(len(found), 'row')} the critique is not in English. The format check cannot see "
        "it, and a model learns to answer so.",
    )


_THINKING = re.compile(
    r"</?think(?:ing)?>|</?thought>|^\W*(?:okay|ok|alright|hmm|wait)\b[,.]? (?:so|let|i|the|now)\b"
    r"|\blet me (?:think|start by|analy[sz]e|see)\b|\bthe user (?:wants|asks|asked|is asking)\b",
    re.IGNORECASE,
)


def thinking_text(entries: Sequence[Entry]) -> list[Finding]:
    """Thinking aloud before or inside the answer."""
    found = [entry for entry in entries if thinks_aloud(entry.text)]
    return finding(
        "thinking_text",
        "thinking aloud",
        found,
        f'In {some(len(found), "row")} there is "thinking" text such as "Okay, let me see". Around '
        "the JSON it is cut away; inside it would be learnt.",
    )


def thinks_aloud(text: str) -> bool:
    """Whether a text has thinking tags or phrases such as "Okay, let me see" in it."""
    return bool(_THINKING.search(text))


def token_loops(entries: Sequence[Entry]) -> list[Finding]:
    """A word or phrase that repeats itself without end."""
    found = [entry for entry in entries if longest_loop(entry.text) >= LOOP]
    return finding(
        "token_loops",
        "a phrase in a loop",
        found,
        f"In {some(len(found), 'row')} a word or phrase follows on itself {LOOP} times or more, "
        "which is how a model fails, not how a critic writes.",
        spoils=True,
    )


def longest_loop(text: str) -> int:
    """How often the most repeated phrase of one to eight words stands in a row; 1 is no loop."""
    words = re.findall(r"\w+", text.casefold())
    best = 1
    for period in range(1, 9):
        run = 0
        for index in range(period, len(words)):
            run = run + 1 if words[index] == words[index - period] else 0
            best = max(best, 1 + run // period)
    return best


def truncated(entries: Sequence[Entry]) -> list[Finding]:
    """Analyses that stop in the middle: a longer text that ends in a comma or a joining word."""
    found = [
        entry
        for entry in entries
        if any(_CUT.search(text.strip()) for text in _long_texts(entry))
        or any(_MENDED_CUT.search(mend) for mend in entry.mends)
    ]
    return finding(
        "truncated",
        "cut off in the middle",
        found,
        f"In {some(len(found), 'row')} the analysis stops in the middle of a sentence or of the "
        "JSON. A model learns to stop there, too.",
    )


_CUT = re.compile(r"(?:[,:(–-]|\b(?:the|a|an|and|or|of|to|with|in|for|by|from|that|which|is))$")
_MENDED_CUT = re.compile(r"truncat|cut (?:off|short)|never (?:ends|closed)|unclosed", re.IGNORECASE)


def error_pages(entries: Sequence[Entry]) -> list[Finding]:
    """A failure of the service that was stored as if it were an analysis."""
    found = [entry for entry in entries if _ERROR.search(entry.text)]
    return finding(
        "error_pages",
        "an error instead of an analysis",
        found,
        f"In {some(len(found), 'row')} there is a message of the service about its own failure.",
        spoils=True,
    )


_ERROR = re.compile(
    r"failed to parse model response|cannot connect to ai service|internal server error"
    r"|traceback \(most recent call last\)|<title>\s*(?:error|500|502|503|504)\b",
    re.IGNORECASE,
)


def empty_texts(entries: Sequence[Entry]) -> list[Finding]:
    """A field that is there and blank."""
    found = [entry for entry in entries if entry.critique and entry.critique.blank()]
    return finding(
        "empty_texts",
        "a text is blank",
        found,
        f"In {some(len(found), 'row')} a description, comment, recommendation or note is blank.",
        action="write what is missing",
    )


def unreadable(entries: Sequence[Entry]) -> list[Finding]:
    """Analyses that cannot be read as a critique any more."""
    found = [entry for entry in entries if entry.critique is None]
    first = f" The first: {found[0].problem}" if found else ""
    return finding(
        "unreadable",
        "not a critique",
        found,
        f"In {some(len(found), 'row')} the analysis cannot be read as a critique.{first}",
        action="link again",
        spoils=True,
    )


def mended(entries: Sequence[Entry]) -> list[Finding]:
    """Analyses that could be read only after a repair."""
    found = [entry for entry in entries if entry.mends]
    counts = Counter(mend for entry in found for mend in entry.mends)
    usual = f" Most often: {counts.most_common(1)[0][0]}." if counts else ""
    return finding(
        "mended",
        "read after a repair",
        found,
        f"In {some(len(found), 'row')} the analysis had to be repaired to be read; the link report "
        f"names the repairs.{usual}",
        action="keep them: a repair changes no meaning",
    )


def texts(critique: Critique) -> list[str]:
    """Every text of a critique, names of dimensions left out, in the schema's order."""
    return [
        critique.image_description or "",
        *(text or "" for d in critique.dimensions for text in (d.comment, d.recommendation)),
        *critique.key_strengths,
        *critique.priority_improvements,
        critique.technical_notes or "",
    ]


def _long_texts(entry: Entry) -> Iterator[str]:
    if entry.critique:
        yield from (text for text in texts(entry.critique) if len(text) >= 40)


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split())

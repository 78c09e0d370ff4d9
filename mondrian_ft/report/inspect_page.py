"""``inspect.html``: the batches that training gets, token by token, as one self-contained page.

It wears the report's clothes: the same style sheet, no network, no script, light and dark, phone
and paper. All it shows is read off the batches' own arrays and patches.
"""

from __future__ import annotations

import base64
import io
import statistics
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write_text
from . import html, page, wording

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

    from ..data.batches import Batch

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, control tokens spelt out."""
Photograph = Callable[["Row"], "Image"]
"""The picture of a row as the model sees it."""

WIDEST = 480
"""Pixels; a wider picture is made smaller for the page."""
PROMPT_WHOLE = 60
"""Tokens; a longer stretch of the prompt is folded, but for its end."""
ANSWER_WHOLE = 200
"""Tokens; a longer answer is folded in its middle."""
EDGE = 32
"""Tokens that stay in sight where a stretch is folded, at either end of it."""
SHOWN_FAULTS = 6
"""Rows that are shown for having failed a check; ``inspect.json`` names all of them."""


class Kind(StrEnum):
    """What training makes of a token."""

    trained = "trained"
    masked = "masked"
    image = "image"
    padding = "padding"


NAMES = {
    Kind.masked: "Given",
    Kind.image: "Picture",
    Kind.trained: "Trained",
    Kind.padding: "Padding",
}
LEGEND = (
    (Kind.masked, "Text the model is shown and not trained on (masked): the question."),
    (Kind.image, "The places where the photograph enters, one token for each square of it."),
    (Kind.trained, "What the model learns to write: the answer and the token that ends it."),
    (
        Kind.padding,
        "Filler that makes the rows of a batch equally long; never seen, never trained.",
    ),
)


@dataclass(frozen=True)
class Row:
    """One row of one batch, as its arrays have it.

    Attributes:
        batch: the batch, B rows by L tokens.
        place: the row's place in it, from 0.
        number: the batch's number in its epoch, from 1.
        kinds: of its L tokens.
    """

    batch: Batch
    place: int
    number: int
    kinds: tuple[Kind, ...]

    @property
    def tokens(self) -> list[int]:
        """All L tokens, padding included."""
        return self.batch.tokens[self.place].tolist()

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return len(self.kinds) - self.count(Kind.padding)

    @property
    def job_id(self) -> str:
        """The row's name."""
        return self.batch.examples[self.place].row.job_id

    def count(self, kind: Kind) -> int:
        """Tokens of a kind."""
        return self.kinds.count(kind)

    def trained_ends(self) -> tuple[int, int] | None:
        """Places of the first and the last trained token, from 0; None without any."""
        where = [at for at, kind in enumerate(self.kinds) if kind is Kind.trained]
        return (where[0], where[-1]) if where else None


def rows_of(batch: Batch, number: int, image_token: int) -> list[Row]:
    """The rows of a batch, each token told by the arrays: a token is trained where it is a target.

    Args:
        batch: as the trainer gets it.
        number: its number in the epoch, from 1.
        image_token: id of the token that stands for a piece of the picture.
    """
    found = []
    for place, example in enumerate(batch.examples):
        # Position i predicts token i + 1, so a token's target stands one place before it.
        targets = [-1, *batch.targets[place].tolist()]
        kinds = []
        for at, token in enumerate(batch.tokens[place].tolist()):
            if targets[at] >= 0:
                kinds.append(Kind.trained)
            elif at >= len(example.tokens):
                kinds.append(Kind.padding)
            else:
                kinds.append(Kind.image if token == image_token else Kind.masked)
        found.append(Row(batch, place, number, tuple(kinds)))
    return found


def facts(row: Row, decode: Decode) -> dict[str, Any]:
    """A row's numbers, as ``inspect.json`` has them; places are counted from 0."""
    ends = row.trained_ends()
    example = row.batch.examples[row.place]
    told = [{"at": at, "text": decode(row.tokens[at : at + 1])} for at in ends or ()]
    return {
        "job_id": row.job_id,
        "photograph": example.row.image_path.name,
        "batch": row.number,
        "row": row.place + 1,
        "tokens": row.length,
        # All that comes before the answer, the picture included.
        "prompt_tokens": ends[0] if ends else row.length,
        "image_tokens": row.count(Kind.image),
        "trained_tokens": row.count(Kind.trained),
        "padding": row.count(Kind.padding),
        "grid": list(example.pixels.grid),
        "first_trained": told[0] if told else None,
        "last_trained": told[1] if told else None,
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What an epoch holds: spreads over its rows, sums, and the longest and shortest row."""
    counts = {
        "tokens": [row.length for row in rows],
        "image_tokens": [row.count(Kind.image) for row in rows],
        "trained_tokens": [row.count(Kind.trained) for row in rows],
        "padding": [row.count(Kind.padding) for row in rows],
    }
    tokens, padding = sum(counts["tokens"]), sum(counts["padding"])
    longest, shortest = ends_of(rows)
    return {
        "rows": len(rows),
        "batches": max(row.number for row in rows),
        **{
            name: {
                "min": min(values),
                "median": round(statistics.median(values)),
                "max": max(values),
                "sum": sum(values),
            }
            for name, values in counts.items()
        },
        "trained_share": round(sum(counts["trained_tokens"]) / tokens, 4),
        "padding_share": round(padding / (tokens + padding), 4),
        "longest": longest.job_id,
        "shortest": shortest.job_id,
    }


def ends_of(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The longest and the shortest row; of equals, the first."""
    return max(rows, key=lambda row: row.length), min(rows, key=lambda row: row.length)


def write(out: Path | str, rows: Sequence[Row], **options: Any) -> Path:
    """Write the page of an epoch's ``rows`` to ``out`` and return its path; see :func:`render`.

    Raises:
        MondrianError: ``out`` cannot be written.
    """
    out = Path(out)
    atomic_write_text(out, render(rows, **options))
    return out


def render(
    rows: Sequence[Row],
    *,
    checks: Sequence[str],
    faults: Sequence[tuple[int, str, str]],
    batches: int | None,
    decode: Decode,
    control: frozenset[int],
    photograph: Photograph,
    title: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page as text. All that a database, a tokenizer or a config wrote is escaped.

    Args:
        rows: every row of the first epoch, in the order of its batches.
        checks: what was asked of every row, in words.
        faults: what was found, as (place in ``rows``, which of ``checks``, what is wrong).
        batches: how many batches to show; None for all.
        decode: the text of tokens.
        control: ids of tokens that are no text but signs to the model.
        photograph: a row's picture as the model sees it.
        title: whose batches these are.
        settings: groups of settings by heading.
    """
    environment = page.environment()
    environment.filters |= {"count": wording.count, "thousands": _thousands}
    found = summary(rows)
    widest = found["tokens"]["max"]
    pictures: dict[tuple[int, int], dict[str, Any]] = {}

    def shown(row: Row, mark: str = "", sentence: str = "") -> dict[str, Any]:
        key = (row.number, row.place)
        if key not in pictures:
            pictures[key] = picture(row, photograph(row))
        return {
            "mark": mark,
            "sentence": sentence,
            "facts": facts(row, decode),
            "bar": bar(row),
            "picture": pictures[key],
            "stretches": list(stretches(row, decode, control)),
        }

    longest, shortest = ends_of(rows)
    failed: dict[int, list[str]] = {}
    for place, _, sentence in faults:
        failed.setdefault(place, []).append(sentence)
    last = found["batches"] if batches is None else min(batches, found["batches"])
    together = [list(group) for _, group in groupby(rows, key=lambda row: row.number)]
    return environment.get_template("inspect.html.j2").render(
        style=page.source(environment, "report.css", "inspect.css"),
        title=title,
        date=date.today().isoformat(),
        heading=heading(len(failed)),
        said=outcome(found, len(failed)),
        legend=[(kind, NAMES[kind], words) for kind, words in LEGEND],
        counts=[
            ("training rows", _thousands(found["rows"])),
            ("tokens in a row", _span(found["tokens"])),
            ("of the tokens are trained", wording.percent(found["trained_share"])),
            ("of the batches is padding", wording.percent(found["padding_share"])),
        ],
        checks=[
            (words, found["rows"] - len({place for place, name, _ in faults if name == words}))
            for words in checks
        ],
        rows=found["rows"],
        failed=[
            shown(rows[place], "Failed", " ".join(sentences))
            for place, sentences in list(failed.items())[:SHOWN_FAULTS]
        ],
        failures=len(failed),
        extremes=[
            shown(longest, "Longest row"),
            *([shown(shortest, "Shortest row")] if shortest is not longest else []),
        ],
        batches=[
            {
                "number": group[0].number,
                "width": len(group[0].kinds),
                "padding": wording.percent(
                    sum(row.count(Kind.padding) for row in group)
                    / sum(len(row.kinds) for row in group)
                ),
                "trained": sum(row.count(Kind.trained) for row in group),
                "share": round(100 * len(group[0].kinds) / widest, 2),
                "rows": [shown(row) for row in group],
            }
            for group in together[:last]
        ],
        total=found["batches"],
        widest=WIDEST,
        settings=[
            (name, [(key, html.plain(v)) for key, v in values.items() if html.told(v)])
            for name, values in (settings or {}).items()
        ],
    )


def heading(failed: int) -> str:
    """The page's title: whether one may train."""
    if not failed:
        return "The answer is trained, and nothing else"
    return f"{wording.count(failed, 'row')} would be trained wrongly"


def outcome(found: Mapping[str, Any], failed: int) -> str:
    """What the page shows and what the checks said, for someone who did not write it."""
    rows = wording.count(found["rows"], "training row")
    batches = wording.count(found["batches"], "batch", "batches")
    trained, tokens = found["trained_tokens"]["sum"], found["tokens"]["sum"]
    shown = (
        f"This page shows what the model will be given and what it will learn: {rows} in "
        f"{batches}, exactly as training gets them."
    )
    if failed:
        return (
            f"{shown} {wording.count(failed, 'row')} did not pass the checks, so do not train yet."
        )
    return (
        f"{shown} All of them passed every check: each answer begins at {{, each end is trained, "
        f"and of {_thousands(tokens)} tokens {_thousands(trained)} are trained."
    )


def bar(row: Row) -> list[tuple[Kind, int]]:
    """A row from left to right as (kind, tokens), for the drawing of its batch."""
    return [(kind, len(list(group))) for kind, group in groupby(row.kinds)]


def picture(row: Row, image: Image) -> dict[str, Any]:
    """A row's picture as the page holds it: a ``data:`` address, sizes in pixels, and its squares.

    PNG where it is shown whole, so that it is the model's picture to the last bit; JPEG where it
    had to be made smaller.
    """
    example = row.batch.examples[row.place]
    width, height = image.size
    _, high, wide = example.pixels.grid
    if width <= WIDEST:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    else:
        small = image.resize((WIDEST, max(1, round(height * WIDEST / width))))
        source = html.data_uri(html.jpeg(small, quality=85))
    return {
        "src": source,
        "width": width,
        "height": height,
        "smaller": width > WIDEST,
        "columns": wide // example.pixels.merge,
        "rows": high // example.pixels.merge,
        "file": _file_size(example.row.image_path),
    }


def stretches(row: Row, decode: Decode, control: frozenset[int]) -> Iterator[dict[str, Any]]:
    """A row's tokens from first to last, neighbours of one kind together.

    What is long is folded, but never the tokens on either side of where the answer begins, nor the
    last ones. The HTML of tokens is escaped.
    """
    tokens, ends, at = row.tokens, row.trained_ends(), 0
    for kind, size in bar(row):
        texts = pieces(tokens[at : at + size], decode, control)
        if ends and kind is Kind.trained:
            texts[0].first = at == ends[0]
            texts[-1].last = at + size - 1 == ends[1]
        folded: list[dict[str, Any]] = []
        if kind in (Kind.masked, Kind.trained):
            whole = PROMPT_WHOLE if kind is Kind.masked else ANSWER_WHOLE
            head = EDGE if kind is Kind.trained or at == 0 else 0
            parts = [(texts, False)]
            if len(texts) > whole:
                tail = _word_start(texts, len(texts) - EDGE)
                parts = [
                    (texts[:head], False),
                    (texts[head:tail], True),
                    (texts[tail:], False),
                ]
            folded = [
                {
                    "html": _tokens_html(part),
                    "folded": hide,
                    "n": sum(piece.tokens for piece in part),
                    "hint": _hint(part) if hide else "",
                }
                for part, hide in parts
                if part
            ]
        yield {"kind": kind, "name": NAMES[kind], "n": size, "at": at + 1, "parts": folded}
        at += size


@dataclass
class Piece:
    """The least that can be spelt: a token, or several that only together make a character.

    Attributes:
        text: what it says.
        tokens: how many tokens it is.
        control: whether it is a sign to the model rather than text.
        first, last: whether it holds the first or the last trained token.
    """

    text: str
    tokens: int = 1
    control: bool = False
    first: bool = False
    last: bool = False


def pieces(tokens: Sequence[int], decode: Decode, control: frozenset[int]) -> list[Piece]:
    """Tokens as text. A character that takes several tokens makes them one piece."""
    found: list[Piece] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = decode(waiting)
        # A character has at most four bytes; what is no text after that never will be.
        if "\ufffd" not in text or len(waiting) == 4:
            found.append(Piece(text, len(waiting), token in control))
            waiting = []
    if waiting:
        found.append(Piece(decode(waiting), len(waiting)))
    return found


def _tokens_html(found: Sequence[Piece]) -> Markup:
    from markupsafe import Markup

    written = []
    for piece in found:
        names = [
            name
            for name, is_so in (("k", piece.control), ("first", piece.first), ("last", piece.last))
            if is_so
        ]
        named = f' class="{" ".join(names)}"' if names else ""
        several = f' data-n="{piece.tokens}"' if piece.tokens > 1 else ""
        spelt = _spelt(piece.text)
        # A line breaks before a token and not within its frame, which would leave an empty one.
        before = "<wbr>" if spelt.startswith("<wbr>") else ""
        written.append(f"{before}<i{named}{several}>{spelt.removeprefix('<wbr>')}</i>")
    return Markup("".join(written))


def _spelt(text: str) -> str:
    """A token's text as HTML: blanks and line breaks as signs, what cannot be seen by its number.

    Letters that turn the direction of writing or join what is beside them would let a prompt
    rearrange the page.
    """
    from markupsafe import escape

    written = []
    for sign in text:
        if sign == " ":
            written.append("<wbr><u>·</u>")
        elif sign == "\n":
            written.append("<u>↵</u><br>")
        elif sign == "\t":
            written.append("<u>⇥</u><wbr>")
        elif unicodedata.category(sign)[0] in "CZ":
            written.append(f"<u>U+{ord(sign):04X}</u>")
        else:
            written.append(str(escape(sign)))
    return "".join(written) or "<u>(nothing)</u>"


def _word_start(found: Sequence[Piece], at: int) -> int:
    """Where the word begins that piece ``at`` belongs to, if it is near: half words confuse."""
    for place in range(at, max(0, at - EDGE // 2), -1):
        if found[place].text[:1].isspace() or found[place - 1].text[-1:].isspace():
            return place
    return at


def _hint(found: Sequence[Piece]) -> str:
    """How a folded stretch begins, on one line, without what cannot be seen."""
    text = " ".join("".join(piece.text for piece in found[:40]).split())
    text = "".join(sign for sign in text if unicodedata.category(sign)[0] != "C")
    return text if len(text) <= 64 else f"{text[:63].rstrip()}…"


def _span(values: Mapping[str, int]) -> str:
    low, high = values["min"], values["max"]
    return _thousands(low) if low == high else f"{_thousands(low)}–{_thousands(high)}"


def _thousands(number: int) -> str:
    """With the narrow blanks of :func:`wording.count`."""
    return f"{number:,}".replace(",", "\u202f")


def _file_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a photograph's file, upright; None where it is gone meanwhile."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return (height, width) if turned else (width, height)

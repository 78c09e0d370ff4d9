"""The page of the batches: what the arrays say, whole, escaped, and readable where it matters."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mondrian_ft.data.batches import Batch, Example, collate
from mondrian_ft.data.pixels import Pixels
from mondrian_ft.data.rows import Row as DataRow
from mondrian_ft.report import inspect_page, inspect_screen
from mondrian_ft.report.inspect_page import Kind

EVIL = "</script><script>alert('x')</script>"
IMAGE, END, PAD = 900, 901, 902
VOCABULARY = {IMAGE: "<|image_pad|>", END: "<|im_end|>", PAD: "<|endoftext|>"}
CHECKS = ("something is trained", "what is trained begins with {")


class Words:
    """A tokenizer of bytes: a token below 256 is a byte, so letters beyond ASCII take several."""

    @staticmethod
    def encode(text: str) -> list[int]:
        return list(text.encode())

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        parts = [VOCABULARY[t].encode() if t in VOCABULARY else bytes([t]) for t in tokens]
        return b"".join(parts).decode("utf-8", "replace")


def example(name: str, prompt: str, answer: str, *, squares: tuple[int, int] = (2, 3)) -> Example:
    """A row whose picture has ``squares`` (rows, columns), before the prompt."""
    high, wide = squares
    given = [*Words.encode("<"), *[IMAGE] * (high * wide), *Words.encode(prompt)]
    tokens = np.array([*given, *Words.encode(answer), END], np.int32)
    row = DataRow(name, "ansel", Path(f"{name}.jpg"), prompt, answer, name)
    pixels = Pixels(np.zeros((high * wide * 4, 4), np.float32), (1, 2 * high, 2 * wide), 2)
    return Example(row, tokens, len(given), 1, pixels)


def epoch(examples: Sequence[Example], size: int = 2) -> list[Batch]:
    """The examples in batches, in order."""
    indices = range(len(examples))
    return [
        collate(examples, list(indices[at : at + size]), PAD)
        for at in range(0, len(examples), size)
    ]


def rows_of(batches: Sequence[Batch]) -> list[inspect_page.Row]:
    return [r for n, b in enumerate(batches, 1) for r in inspect_page.rows_of(b, n, IMAGE)]


def photograph(row: inspect_page.Row) -> Image.Image:
    high, wide = row.batch.examples[row.place].pixels.grid[1:]
    noise = np.random.default_rng(len(row.job_id)).integers(0, 256, (high * 16, wide * 16, 3))
    return Image.fromarray(noise.astype(np.uint8))


def page(rows: Sequence[inspect_page.Row], **changes: Any) -> str:
    options: dict[str, Any] = {
        "checks": CHECKS,
        "faults": (),
        "batches": None,
        "decode": Words.decode,
        "control": frozenset({END, PAD}),
        "photograph": photograph,
    }
    return inspect_page.render(rows, **{**options, **changes})


class Reader(HTMLParser):
    """Reads tokens off a page: how many each batch's cards show of each kind, and what of them is
    in sight without unfolding."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.card: tuple[str, str] | None = None
        self.kind = ""
        self.counts: dict[tuple[tuple[str, str], str], int] = {}
        self.sight: list[str] = []
        self.marked: dict[str, str] = {}
        self.mark = ""
        self.in_batches = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in ("img", "meta", "link", "input", "br", "wbr"):
            self.open.append(tag)
        if tag == "section" and given.get("class") == "batch":
            self.in_batches = True
        if tag == "article":
            self.card = (given["data-batch"], given["data-row"])
        if tag == "li" and self.card:
            self.kind = given.get("class", "")
        if tag == "i" and "li" in self.open and self.in_batches and self.card:
            key = (self.card, self.kind)
            self.counts[key] = self.counts.get(key, 0) + int(given.get("data-n", 1))
            self.mark = given.get("class", "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"a {tag} closes what it did not open"
        if tag == "article":
            self.card = None
        if tag == "i":
            self.mark = ""

    def handle_data(self, data: str) -> None:
        if self.card and "details" not in self.open and "i" in self.open:
            self.sight.append(data)
        if self.mark:
            self.marked.setdefault(self.mark, data)


def test_kinds_are_read_off_the_targets() -> None:
    """A token is trained where it is a target, whatever its example meant."""
    batch = collate([example("a", "Judge.", '{"a":1}'), example("b", "Go.", "{}")], [0, 1], PAD)
    for row in rows_of([batch]):
        targets = [-1, *batch.targets[row.place].tolist()[:-1]]
        assert [k is Kind.trained for k in row.kinds] == [t >= 0 for t in targets]
        assert row.count(Kind.image) == 6
        assert row.length == len(batch.examples[row.place].tokens)
        assert set(row.kinds[row.length :]) <= {Kind.padding}
    targets = batch.targets.copy()
    targets[0, 16:] = -1
    targets[1, 14] = PAD
    first, second = rows_of([dataclasses.replace(batch, targets=targets)])
    assert (
        "".join(
            Words.decode([t])
            for t, k in zip(first.tokens, first.kinds, strict=True)
            if k is Kind.trained
        )
        == '{"a"'
    )
    # A trained filler would be a fault, and is shown as one.
    assert second.kinds[15] is Kind.trained
    assert second.count(Kind.trained) == 4


def test_the_numbers_of_a_row() -> None:
    """Counted by hand."""
    rows = rows_of(epoch([example("a", "Judge.", '{"a":1}'), example("b", "Go.", "{}")]))
    assert inspect_page.facts(rows[1], Words.decode) == {
        "job_id": "b",
        "photograph": "b.jpg",
        "batch": 1,
        "row": 2,
        "tokens": 1 + 6 + 3 + 3,
        "prompt_tokens": 10,
        "image_tokens": 6,
        "trained_tokens": 3,
        "padding": 8,
        "grid": [1, 4, 6],
        "first_trained": {"at": 10, "text": "{"},
        "last_trained": {"at": 12, "text": "<|im_end|>"},
    }
    found = inspect_page.summary(rows)
    assert found["tokens"] == {"min": 13, "median": 17, "max": 21, "sum": 34}
    assert found["trained_share"] == round(11 / 34, 4)
    assert found["padding_share"] == round(8 / 42, 4)
    assert (found["longest"], found["shortest"]) == ("a", "b")


def test_every_token_is_on_the_page_once() -> None:
    """Folded or not, in each batch: what is counted there is what the arrays hold."""
    examples = [
        example("short", "Go.", "{}"),
        example("long", "Judge the photograph. " * 30, '{"a": "' + "far ridge " * 60 + '"}'),
        example("wide", "Zoë’s 写真 ☀️ at the fjord.", '{"a":"é’—"}'),
    ]
    batches = epoch(examples)
    read = Reader(page(rows_of(batches)))
    shown = 0
    for row in rows_of(batches):
        card = (str(row.number), str(row.place + 1))
        assert read.counts[card, "trained"] == row.count(Kind.trained)
        assert read.counts[card, "masked"] == row.count(Kind.masked)
        shown += row.count(Kind.trained)
    assert shown == sum(batch.supervised for batch in batches)


def test_the_edge_of_the_answer_is_in_sight() -> None:
    """The last words of the prompt, the first of the answer and its end, however long both are."""
    long = example("long", "Start. " + "Judge it. " * 99 + "Now answer.", "{" + "far " * 200 + "}")
    read = Reader(page(rows_of(epoch([long]))))
    sight = "".join(read.sight).replace("·", " ")
    assert "Now answer.{" in sight
    assert "far }<|im_end|>" in sight
    assert sight.count("Judge it.") < 20
    assert read.marked == {"first": "{", "k last": "<|im_end|>"}


def test_letters_of_several_tokens_are_one_piece() -> None:
    """And are counted as several; bytes that are no text are shown and lose nothing."""
    tokens = [*Words.encode("é a—"), 0xFF, 0xFE, 65]
    found = inspect_page.pieces(tokens, Words.decode, frozenset())
    assert [(p.text, p.tokens) for p in found[:4]] == [("é", 2), (" ", 1), ("a", 1), ("—", 3)]
    assert sum(p.tokens for p in found) == len(tokens)
    assert "A" in found[-1].text


def test_nothing_gets_out_of_its_place() -> None:
    """HTML in names, prompts and answers is text; letters that turn the writing are spelt out."""
    spelt = f"\u202eabc\u200b\x07 {EVIL} <img src=x>"
    evil = example(EVIL, f"{spelt} {'Judge. ' * 40} {spelt}", '{"a":"' + spelt * 9 + '"}')
    text = page(rows_of(epoch([evil])), title=EVIL, settings={EVIL: {EVIL: EVIL}})
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;" in text
    for sign in "\u202e\u200b\x07":
        assert sign not in text
        assert f"U+{ord(sign):04X}" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"url\(|@import", text)
    Reader(text)


def test_the_first_sentence_tells_the_outcome() -> None:
    """With numbers, whether all is well or not; failed rows come first, with what is wrong."""
    rows = rows_of(epoch([example("a", "Judge.", '{"a":1}'), example("b", "Go.", "no json")]))
    well = page(rows[:1])
    assert "The answer is trained, and nothing else" in well
    assert "1 training row in 1 batch, exactly as training gets them" in well
    assert well.count("1 of 1") == 2
    ill = page(rows, faults=[(1, CHECKS[1], "row b: it starts with n")])
    assert "1 row would be trained wrongly" in ill
    assert "did not pass the checks, so do not train yet" in ill
    assert "row b: it starts with n" in ill
    assert (ill.count("2 of 2"), ill.count("1 of 2")) == (1, 1)
    assert ill.index("row b: it starts") < ill.index("The longest and the shortest row")


@pytest.mark.parametrize(("wanted", "shown"), [(0, 0), (1, 1), (2, 2), (9, 2), (None, 2)])
def test_as_many_batches_as_were_asked_for(wanted: int | None, shown: int) -> None:
    """Beside the longest and the shortest row."""
    rows = rows_of(epoch([example(n, "Go.", "{" + n) for n in ("a", "bb", "ccc")]))
    text = page(rows, batches=wanted)
    assert text.count('class="batch"') == shown
    assert "Longest row" in text
    assert "Shortest row" in text


def embedded(text: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_pictures_are_the_models_to_the_last_bit_or_said_to_be_smaller() -> None:
    """Up to 480 pixels wide as they are, beyond that made smaller, and told."""
    small, large = example("a", "Go.", "{}"), example("bb", "Go.", "{}", squares=(10, 20))
    rows = rows_of(epoch([small, large]))
    (picture,) = embedded(page(rows[:1], batches=0))
    assert np.array_equal(np.asarray(picture), np.asarray(photograph(rows[0])))
    text = page(rows[1:], batches=0)
    (picture,) = embedded(text)
    assert picture.size == (480, 240)
    assert "640 × 320 pixels" in text
    assert "Kept here 480 pixels wide" in text
    assert "20 × 10 squares = 200 image tokens" in text


def test_terminal() -> None:
    """The spread, the shares, both ends and the paths, in plain ASCII."""
    rows = rows_of(epoch([example("é", "Judge.", '{"a":1}'), example("b", "Go.", "{}")]))
    console = Console(file=io.StringIO(), width=100)
    inspect_screen.show(console, inspect_page.summary(rows), page=Path("x/inspect.html"))
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert text.isascii()
    for words in (
        "2 rows in 1 batch.",
        "longest  ?, 21 tokens",
        "shortest b, 13 tokens",
        "32 % of the tokens are trained; 19 % of the batches is padding.",
        "x/inspect.html",
        "x/inspect.json",
    ):
        assert words in text
    assert re.search(r"whole row +13 +17 +21 +34\n", text)

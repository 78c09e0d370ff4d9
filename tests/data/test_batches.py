"""Rows to tokens and batches: nothing cut, nothing dropped, and an order that can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import (
    BatchStream,
    Cursor,
    Example,
    TooLong,
    collate,
    encode,
    in_order,
)
from mondrian_ft.data.pixels import Pixels
from mondrian_ft.data.rows import Row
from mondrian_ft.errors import DataError


def example(number: int, prompt: int = 4, answer: int = 3) -> Example:
    row = Row(str(number), "ansel", Path("a.jpg"), "p", "r", "0")
    tokens = np.arange(100 * number, 100 * number + prompt + answer, dtype=np.int32)
    return Example(row, tokens, prompt, 0, Pixels(np.zeros((4, 1)), (1, 2, 2), 2))


def stream(count: int, size: int, **options: Any) -> BatchStream:
    examples = [example(n, answer=2 + n) for n in range(count)]
    return BatchStream(examples, batch_size=size, seed=7, pad_token=-5, **options)


def test_padding_is_on_the_right_and_never_trained() -> None:
    """Left padding is wrong for this model. Targets are the next tokens of the answer alone."""
    batch = collate([example(1, 4, 3), example(2, 3, 1)], [0, 1], -5)
    assert batch.tokens.tolist() == [
        [100, 101, 102, 103, 104, 105, 106],
        [200, 201, 202, 203, -5, -5, -5],
    ]
    assert batch.targets.tolist() == [
        [-1, -1, -1, 104, 105, 106, -1],
        [-1, -1, 203, -1, -1, -1, -1],
    ]
    assert batch.supervised == 4
    assert batch.rows == (0, 1)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (6, 2), (1, 4), (5, 1)])
def test_every_row_once_an_epoch_the_tail_included(count, size) -> None:
    """Also where rows do not divide by the batch, or are fewer than it."""
    batches = stream(count, size)
    orders = []
    for epoch in range(3):
        assert batches.cursor == Cursor(epoch, 0)
        rows = [row for _ in range(batches.per_epoch) for row in batches.next().rows]
        assert sorted(rows) == list(range(count))
        orders.append(rows)
    if count > 4:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_change_their_members() -> None:
    """Not only their order: elsewhere the same rows are batched together every epoch."""
    batches = stream(8, 2)
    pairs = [{frozenset(batches.next().rows) for _ in range(4)} for _ in range(3)]
    assert pairs[0] != pairs[1] != pairs[2]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 9])
def test_a_cursor_goes_on_with_the_same_order(taken) -> None:
    """As an uninterrupted stream, in the middle of an epoch or at its end."""
    straight = stream(7, 2)
    rows = [straight.next().rows for _ in range(12)]
    first = stream(7, 2)
    for _ in range(taken):
        first.next()
    second = stream(7, 2, cursor=first.cursor)
    assert [second.next().rows for _ in range(12 - taken)] == rows[taken:]


def test_the_seed_fixes_the_order() -> None:
    """Equal seeds, equal orders."""
    assert stream(9, 2).order(0) == stream(9, 2).order(0)
    other = BatchStream([example(n) for n in range(9)], batch_size=2, seed=8, pad_token=0)
    assert other.order(0) != stream(9, 2).order(0)


def test_an_update_never_straddles_epochs() -> None:
    """Seven rows in batches of two, three to an update: 3 and 1, not 3 and 3."""
    batches = stream(7, 2)
    assert [len(batches.update(3)) for _ in range(4)] == [3, 1, 3, 1]
    assert batches.cursor == Cursor(2, 0)


def test_validation_takes_all_rows_in_order() -> None:
    """The tail included, each once."""
    found = list(in_order([example(n) for n in range(5)], 2, -5))
    assert [batch.rows for batch in found] == [(0, 1), (2, 3), (4,)]
    assert list(in_order([], 2, -5)) == []


def test_a_stream_without_rows_is_refused() -> None:
    """One sentence, rather than an error from deep inside the first update."""
    with pytest.raises(DataError, match="no rows to train on"):
        stream(0, 2)


def test_encoding_a_row(lab, base) -> None:
    """Prompt with as many image tokens as the picture has, then the answer and its end."""
    (row,) = lab.rows(1)
    made = encode(row, base, base.image_processor, lab.settings, base.backbone.image_token)
    image = made.tokens == base.backbone.image_token
    assert image.sum() == made.pixels.tokens == 6
    assert made.image_start == int(np.argmax(image))
    assert image[made.image_start : made.image_start + 6].all()
    assert made.tokens[: made.prompt_length].tolist() == base.prompt_tokens(row.prompt, 6)
    assert base.text(made.tokens[made.prompt_length :].tolist()) == row.response
    assert made.tokens[-1] == base.tokenizer.eos_token_id
    assert made.supervised == len(base.answer_tokens(row.response))


def test_a_row_that_is_too_long_is_named_and_never_cut(lab, base) -> None:
    """Half a critique would teach to stop in the middle."""
    (row,) = lab.rows(1)
    whole = encode(row, base, base.image_processor, lab.settings, base.backbone.image_token)
    size = len(whole.tokens)

    def limited(longest: int) -> Example:
        return encode(
            row,
            base,
            base.image_processor,
            lab.settings,
            base.backbone.image_token,
            longest=longest,
        )

    assert np.array_equal(limited(size).tokens, whole.tokens)
    with pytest.raises(TooLong, match=f"row row0 has {size} tokens .6 of them image tokens"):
        limited(size - 1)
